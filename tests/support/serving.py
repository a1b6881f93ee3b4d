"""Servers of tools/serve for tests: in this process, or in another one."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
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
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert " is served at http://127.0.0.1:" in line, line
            yield server, line.split()[-1]
        finally:
            server.send_signal(signal.SIGINT)
            status = server.wait(100)
    assert status == 130, f"the server has ended with {status}"


def until(condition):
    """Wait until the condition holds."""
    ends = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < ends, "it has not happened"
        time.sleep(0.01)
