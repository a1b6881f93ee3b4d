"""The server: tools/serve in a process of its own, under 1, 8 and 50 clients, some of which hang up, and kill -9.

Every answer is compared with that of an empty server, which keeps no cache and has one client.
"""

import atexit
import os
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

import openai

from tools.common import ROOT, table
from tools.fuzz.cases import Counting, random_model

CLIENTS = (1, 8, 50)
SECONDS = 5.0  # for each number of clients in a round
OPTIONS = ("--prune", "0.33", "--batch", "8", "--queue", "64", "--max-seq-len", "1024", "--port", "0")
ASKED = {"stream": True, "temperature": 0, "max_tokens": 16, "logprobs": True, "top_logprobs": 2}
MOST_MIB = 2000  # of the server's memory
MOST_FILES = 40  # that it may have open while nobody is answered


class Server:
    """A running `python -m tools.serve`, and a client."""

    def __init__(self, model: str, cache_mb: int):
        command = [sys.executable, "-m", "tools.serve", model, "--cache-mb", str(cache_mb), *OPTIONS]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)
        address = self.process.stdout.readline().split()[-1]
        self.client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)

    def ask(self, question: dict) -> tuple[float, list[str], float]:
        """Seconds to the first token, the tokens, and the least difference of the two likeliest log-probabilities."""
        began = time.perf_counter()
        times = []
        tokens = []
        for chunk in self.client.chat.completions.create(**question):
            times.append(time.perf_counter() - began)
            if chunk.choices[0].logprobs is not None:
                tokens += chunk.choices[0].logprobs.content
        margins = [token.top_logprobs[0].logprob - token.top_logprobs[1].logprob for token in tokens]
        return times[0], [token.token for token in tokens], min(margins)

    def sizes(self) -> tuple[int, int]:
        """MiB in memory, and open files."""
        process = Path(f"/proc/{self.process.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20, len(os.listdir(process / "fd"))


class Loop(Counting):
    def __init__(self, model: str | None = None):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()  # which is removed with this object
        self.model = model or self.folder.name
        if model is None:
            random_model(Random(0), Path(self.model))
        self.times: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
        self.seconds: Counter[int] = Counter()
        self.answers = []  # pairs of a question and its tokens
        text = (ROOT / "pop/data/alice.txt").read_text(encoding="utf-8")
        empty = Server(self.model, cache_mb=0)
        for length in range(30, 900, 30):
            messages = [{"role": "user", "content": text[:length]}]
            question = ASKED | {"model": Path(self.model).name, "messages": messages}
            _, tokens, margin = empty.ask(question)
            if margin > (0.3 if model else 1e-3):  # otherwise rounding may decide. A given model may be in bfloat16
                self.answers.append((question, tokens))
        empty.process.kill()
        self.server = Server(self.model, cache_mb=64)

    def try_one(self, random: Random, folder: Path) -> None:
        for clients in CLIENTS:
            self.load(random, clients)
        memory, files = self.server.sizes()
        assert memory <= MOST_MIB and files <= MOST_FILES, (memory, files)
        if random.random() < 0.3:
            threading.Timer(random.uniform(0.1, SECONDS / 2), self.server.process.kill).start()
            try:
                self.load(random, 8)
            except Exception as error:  # what clients see of kill -9
                assert not isinstance(error, AssertionError), error
            self.server = Server(self.model, cache_mb=64)
            self.counts["kills"] += 1

    def load(self, random: Random, clients: int) -> None:
        """Clients that ask one question after the other. Some hang up."""
        began = time.monotonic()

        def client(own: Random) -> None:
            while time.monotonic() < began + SECONDS:
                question, expected = own.choice(self.answers)
                if own.random() < 0.1:
                    self.server.client.chat.completions.create(**question).close()
                    continue
                first, tokens, _ = self.server.ask(question)
                self.times[clients].append(first)
                assert tokens == expected

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, [Random(random.random()) for _ in range(clients)]))
        self.seconds[clients] += time.monotonic() - began

    def summary(self) -> str:
        rows = [("clients", "answers", "a second", "TTFT p50", "TTFT p99")]
        for clients, times in self.times.items():
            rate = len(times) / self.seconds[clients]
            median, highest = (1000 * quantiles(times, n=100)[at] for at in (49, 98))
            rows.append((str(clients), str(len(times)), f"{rate:.1f}", f"{median:.0f} ms", f"{highest:.0f} ms"))
        return f"MiB in memory and open files: {self.server.sizes()}; {super().summary()}\n{table(rows, words=())}"
