"""pop_vllm/start.py, with a server in vLLM's place. These tests need no vLLM."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1]

# It fails in one of several ways if it has a plan. /end ends it with a status.
SERVER = """
import json, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
port, way = [word.removeprefix("--port=") for word in sys.argv[-2:]]
plan = os.environ.get("POP_PLAN")
if plan:
    assert not os.listdir(os.environ["PROMETHEUS_MULTIPROC_DIR"])
if plan and way == "ends":
    sys.exit(3)
if way == "ignores signals":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("pid", os.getpid(), file=sys.stderr, flush=True)
if way == "always hangs" or plan and way in ("hangs", "ignores signals"):
    time.sleep(600)
lengths = []
if way == "slow to stop":
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), os._exit(0)))

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if plan and way == "deaf":
            time.sleep(600)
        if self.path.startswith("/end"):
            os._exit(int(self.path.split("=")[1]))
        pruned = 0 if way == "idle" else sum(lengths) - 96 * len(lengths)
        room = 2050 if way == "small" else 32768
        texts = {
            "/health": "",
            "/v1/models": json.dumps({"data": [{"id": "m", "max_model_len": room}, {"id": "n"}]}),
            "/metrics": f'pop:pruned_tokens_total{{engine="0"}} {pruned}.0\\n',
            "/state": json.dumps([plan, lengths]),
        }
        self.say(texts[self.path])

    def do_POST(self):
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert fields["model"] == "m"
        if way == "key" and self.headers["Authorization"] != "Bearer secret":
            self.send_error(401)
            return
        if way == "refuses":
            self.send_error(500)
            return
        lengths.append(len(fields["prompt"]))
        self.say("{}")

    def say(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


class Started:
    """The program, with the server that it starts."""

    def __init__(self, folder: Path, way: str, options: list[str], says_port: bool):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.ready = folder / "ready"
        self.log = folder / "log"
        url = [] if says_port else ["--url", f"{self.url}/v1/"]
        words = [*url, "--ready", str(self.ready), *options, "my.plan"]
        words_of_port = ["--port", "1", f"--port={port}"] if says_port else [str(port)]
        command = [sys.executable, "-c", SERVER, *words_of_port, way]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pop_vllm.start", *words, *command],
            env=os.environ | {"PYTHONPATH": str(FOLDER), "POP_PLAN": "of the shell"},
            stderr=self.log.open("w"),
        )

    def state(self) -> list:
        """The server's plan, and the lengths of its prompts, once it is ready."""
        self.wait(self.ready.exists)
        with urllib.request.urlopen(f"{self.url}/state") as response:
            return json.load(response)

    def end(self, status: int) -> None:
        """Let the server end."""
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{self.url}/end={status}")

    def wait(self, is_so) -> None:
        since = time.monotonic()
        while not is_so():
            assert time.monotonic() - since < 60, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    started = []

    def start(way: str, *options: str, says_port: bool = False) -> Started:
        started.append(Started(tmp_path, way, list(options), says_port))
        return started[-1]

    yield start
    for one in started:
        one.process.terminate()
        one.process.wait()


def test_a_plan_that_runs_is_served(start):
    one = start("runs")
    assert one.state() == ["my.plan", [1024, 20_000]]
    assert "my.plan runs: 20,832 of 21,024 prompt tokens were pruned" in one.log.read_text()


def test_a_server_that_is_there_already_is_not_tested(start):
    other = start("runs")
    other.state()
    words = ["--url", other.url, "my.plan", sys.executable]
    command = [sys.executable, "-m", "pop_vllm.start", *words]
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(FOLDER)}, capture_output=True, text=True)
    assert found.returncode == 2 and "a server answers" in found.stderr


def test_the_port_is_that_of_the_command(start):
    assert start("runs", says_port=True).state()[0] == "my.plan"


def test_the_longest_prompt_fits_the_context(start):
    assert start("small").state() == ["my.plan", [1024, 2048]]


def test_the_longest_prompt_is_one_that_is_pruned(start, monkeypatch):
    monkeypatch.setenv("POP_LONGEST", "1500")
    assert start("runs").state() == ["my.plan", [1024, 1500]]


@pytest.mark.parametrize(
    ("way", "options", "says"),
    [
        ("ends", [], "status 3"),
        ("hangs", ["--limit", "1"], "not healthy after 1 s"),
        ("deaf", ["--limit", "5"], "not healthy after 5 s"),  # it takes a request, and does not answer
        ("refuses", [], "500"),
        ("idle", [], "no token was pruned"),
        ("key", [], "401"),
    ],
)
def test_without_the_plan_if_it_fails_at_the_start(start, way, options, says):
    one = start(way, *options)
    assert one.state() == [None, []]
    assert says in one.log.read_text()


def test_a_file_of_an_earlier_server_is_not_this_ones(start, tmp_path):
    (tmp_path / "ready").touch()
    one = start("hangs", "--limit", "600")
    one.wait(lambda: not one.ready.exists())


def test_without_the_plan_it_waits_for_as_long_as_it_takes(start):
    one = start("always hangs", "--limit", "1")
    one.wait(lambda: "without the plan" in one.log.read_text())
    time.sleep(3)
    assert one.process.poll() is None
    one.process.terminate()
    assert one.process.wait(60) == 0


def test_a_signal_while_a_hanging_server_is_stopped_kills_it(start):
    one = start("ignores signals", "--limit", "5")  # by then it ignores them
    one.wait(lambda: "not healthy" in one.log.read_text())
    pid = int(one.log.read_text().split("pid ")[1].split()[0])
    one.process.terminate()
    assert one.process.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_key_is_sent(start):
    assert start("key", "--key", "secret").state()[0] == "my.plan"


@pytest.mark.parametrize("status", [0, 5])
def test_without_the_plan_if_it_ends_later(start, status):
    """vLLM's status is 0 after its engine has died."""
    one = start("runs")
    assert one.state()[0] == "my.plan"
    one.end(status)
    one.wait(lambda: "without the plan" in one.log.read_text())
    assert one.state() == [None, []]
    one.end(7)
    assert one.process.wait(60) == 7
    assert not one.ready.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_server(start, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("this process ignores it, and so does what it starts, as after nohup")
    one = start("runs")
    one.state()
    one.process.send_signal(number)
    one.process.wait(60)
    assert not one.ready.exists()
    assert "without the plan" not in one.log.read_text()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{one.url}/health")


def test_a_second_signal_does_not_leave_the_server_behind(start):
    one = start("slow to stop")
    one.state()
    for _ in range(3):
        one.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert one.process.poll() is None  # it waits for the server
    assert one.process.wait(60) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{one.url}/health")


@pytest.mark.parametrize(("words", "says"), [(["my.plan"], "is missing"), (["my.plan", "no-such"], "no program")])
def test_a_command_that_cannot_run_is_refused(words, says):
    found = subprocess.run(
        [sys.executable, "-m", "pop_vllm.start", *words],
        env=os.environ | {"PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and says in found.stderr
