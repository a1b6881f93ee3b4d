"""The server: tools/serve in a process of its own, under 1, 8 and 50 clients, hostile ones, and kill -9.

Every answer is compared with that of an empty server, which keeps no cache and has one client. Where two tokens are as
likely up to rounding, either may come. All prompts begin alike, so they share kept caches.
"""

import atexit
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import quantiles

from tools.common import ROOT, table
from tools.fuzz.cases import Counting, Wrong, random_config, write_checkpoint, write_tokenizer
from tools.fuzz.junk import as_json, spoilt_json

CLIENTS = (1, 8, 50)
SECONDS = 5.0  # for each number of clients in a case
PROMPTS = 24
OPTIONS = ("--prune", "0.33", "--batch", "8", "--queue", "64", "--max-seq-len", "1024")
ASKED = {"stream": True, "temperature": 0, "max_tokens": 16, "logprobs": True, "top_logprobs": 2}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HALF_A_REQUEST = HEAD + b"content-length: 9\r\n\r\n{"
MORE_BYTES = 100 * 2**20  # that the server may have in memory after many cases
MORE_FILES = 20  # that it may have open


class Server:
    """A running `python -m tools.serve`."""

    def __init__(self, model: str, cache_mb: int):
        command = [sys.executable, "-m", "tools.serve", model, "--port", "0", "--cache-mb", str(cache_mb), *OPTIONS]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)
        line = self.process.stdout.readline()
        self.port = int(line.rpartition(":")[2].partition("/")[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def request(self, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
        return connection.getresponse()

    def chat(self, asked) -> http.client.HTTPResponse:
        return self.request("/v1/chat/completions", as_json(asked))

    def ask(self, asked: dict) -> tuple[float, list[dict]]:
        """Seconds to the first token of an answer, and its tokens with their log-probabilities."""
        began = time.perf_counter()
        tokens = []
        with self.chat(asked) as answer:
            if answer.status != 200:
                raise Wrong(f"status {answer.status}: {answer.read()!r:.300}")
            while (line := answer.readline()) != b"data: [DONE]\n":
                if not line:
                    raise http.client.IncompleteRead(b"")
                if not tokens:
                    first = time.perf_counter() - began
                if line.startswith(b"data: "):
                    (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]
                    tokens += (choice["logprobs"] or {}).get("content", ())
        return first, tokens

    def memory_and_files(self) -> tuple[int, int]:
        """Bytes in memory, and open files, once nobody is answered."""
        ends = time.monotonic() + 120
        while json.load(self.request("/health")) != {"status": "ok", "running": 0, "waiting": 0}:
            if time.monotonic() > ends:
                raise Wrong("the server is still busy two minutes after the last request")
            time.sleep(0.1)
        process = Path(f"/proc/{self.process.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(process / "fd"))


class Loop(Counting):
    def __init__(self, model: str | None = None):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()  # which is removed with this object
        self.model = model or make_model(Path(self.folder.name))
        self.rounding = 0.3 if model else 1e-3  # of log-probabilities; a given model may be in bfloat16
        self.times: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
        self.seconds: Counter[int] = Counter()
        words = (ROOT / "pop/data/alice.txt").read_text(encoding="utf-8").split()
        system = {"role": "system", "content": " ".join(words[:40])}
        questions = [" ".join(words[20 * n : 23 * n]) for n in range(1, PROMPTS + 1)]
        named = ASKED | {"model": Path(self.model).name}
        self.asked = [named | {"messages": [system, {"role": "user", "content": text}]} for text in questions]
        empty = Server(self.model, cache_mb=0)
        self.expected = [empty.ask(asked)[1] for asked in self.asked]
        empty.kill()
        self.start()

    def start(self) -> None:
        self.server = Server(self.model, cache_mb=64)
        self.first: tuple[int, int] | None = None  # its memory and open files after its first case

    def try_one(self, random: Random) -> None:
        for clients in CLIENTS:
            began = time.monotonic()
            self.times[clients] += self.load(random, clients, SECONDS)
            self.seconds[clients] += time.monotonic() - began
        with ThreadPoolExecutor(1) as pool:
            hostile = pool.submit(self.harass, random)
            self.load(random, 8, SECONDS)
            hostile.result()
        now = self.server.memory_and_files()
        self.first = self.first or now
        if now[0] > self.first[0] + MORE_BYTES or now[1] > self.first[1] + MORE_FILES:
            raise Wrong(f"the server has {now} bytes in memory and open files, and had {self.first} at first")
        if random.random() < 0.3:
            self.counts["kills"] += 1
            self.kill_and_start(random)

    def load(self, random: Random, clients: int, seconds: float) -> list[float]:
        """Clients that ask one question after the other. Returns the seconds to each first token."""
        ends = time.monotonic() + seconds
        times = []

        def client(seed: float) -> None:
            own = Random(seed)
            while time.monotonic() < ends:
                number = own.randrange(PROMPTS)
                first, tokens = self.server.ask(self.asked[number])
                self.check(self.expected[number], tokens)
                times.append(first)

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, [random.random() for _ in range(clients)]))
        self.counts["answers"] += len(times)
        return times

    def check(self, expected: list[dict], found: list[dict]) -> None:
        """Raise Wrong unless an answer is the empty server's. From a tie on it may differ."""
        for one, other in zip(expected, found, strict=False):
            likeliest, second = (top["logprob"] for top in one["top_logprobs"])
            if one["token"] != other["token"] and likeliest - second < self.rounding:
                self.counts["ties"] += 1
                return
            if one["token"] != other["token"] or abs(one["logprob"] - other["logprob"]) > self.rounding:
                raise Wrong(f"the answer has {other}, and that of an empty server {one}")
        if len(expected) != len(found):
            raise Wrong(f"the answer has {len(found)} tokens, and that of an empty server {len(expected)}")

    def harass(self, random: Random) -> None:
        """Send junk, and leave before a request is sent or answered."""
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            asked = random.choice(self.asked)
            with self.server.chat(spoilt_json(random, asked)) as answer:
                if answer.status not in (200, 400, 404):
                    raise Wrong(f"junk gets status {answer.status}: {answer.read()!r:.300}")
            self.server.chat(asked).close()
            with socket.create_connection(("127.0.0.1", self.server.port)) as half:
                half.sendall(HALF_A_REQUEST)
                time.sleep(random.uniform(0, 0.2))
            self.counts["hostile clients"] += 3

    def kill_and_start(self, random: Random) -> None:
        """kill -9 in the middle of answers. Another server answers as the first one did."""
        timer = threading.Timer(random.uniform(0.1, 1), self.server.process.kill)
        timer.start()
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):  # what clients see of it
            self.load(random, 8, seconds=3)
        timer.join()
        self.server.kill()
        self.start()

    def summary(self) -> str:
        rows = [("clients", "requests a second", "TTFT p50", "TTFT p99")]
        for clients, times in self.times.items():
            cuts = quantiles(times, n=100)
            rate = len(times) / self.seconds[clients]
            rows.append((str(clients), f"{rate:.1f}", f"{1000 * cuts[49]:.0f} ms", f"{1000 * cuts[98]:.0f} ms"))
        sizes = [(size >> 20, files) for size, files in (self.first or (0, 0), self.server.memory_and_files())]
        memory = f"MiB in memory and open files after the first case of the last server, and now: {sizes}"
        return f"{super().summary()}; {memory}\n{table(rows, words=())}"


def make_model(folder: Path) -> str:
    """Write a tiny chat model."""
    size = write_tokenizer(folder)
    config = random_config(Random(0), "llama", vocab_size=size, num_hidden_layers=6)
    write_checkpoint(folder, config, seed=0)
    return str(folder)
