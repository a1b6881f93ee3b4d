"""Servers of tools/serve for tests: in this process, or in another one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADERS = {"content-type": "application/json"}


@contextlib.contextmanager
def serving(model, key=None, plans=None, **options):
    """Serve a model in threads of this process. Yields the server and its address."""
    import uvicorn

    from tools.serve.app import Server
    from tools.serve.engine import Engine

    engine = Engine(model, **{"most_rows": 4, "most_waiting": 16, "kept_bytes": 2**24, **options})
    threading.Thread(target=engine.run, daemon=True).start()
    server = Server(engine, "tiny", key, plans=plans)
    config = uvicorn.Config(server.app, port=0, log_level="warning", lifespan="off")
    with config.bind_socket() as listener:
        listener.listen()
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            http.should_exit = http.force_exit = True
            thread.join(100)


@contextlib.contextmanager
def process(*words, **environment):
    """Run `python -m tools.serve` with these words. Yields the process and its address."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "tools.serve", *map(str, words), "--port", "0"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    ) as server:
        try:
            line = server.stdout.readline()
            assert " is served at http://127.0.0.1:" in line, line
            yield server, line.split()[-1]
        finally:
            server.send_signal(signal.SIGINT)
            status = server.wait(100)
    assert status == 130, f"the server has ended with {status}"


@contextlib.contextmanager
def fake(models, answer):
    """Run a server of another kind in threads of this process. Yields its address.

    models: The JSON that lists its models, or other bytes. None: it fails to list them.
    answer: The parts of an answer, as bytes, for the JSON of a request.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = models if isinstance(models, bytes) else json.dumps(models).encode()
            self.say([body], 500 if models is None else 200)

        def do_POST(self):
            self.say(answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def say(self, parts, status=200):
            self.send_response(status)
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # which ends within 10 ms
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def until(condition):
    """Wait until the condition holds."""
    ends = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < ends, "it has not happened"
        time.sleep(0.01)
