"""HTTP for `pop download`: every request ends in an answer or in a DownloadError, and only the endpoint gets the token.

`Hub.together` runs requests in threads. When one of them fails or Ctrl-C comes, the others stop at their next block.
Whatever a server sends is untrusted.
"""

import contextlib
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request

from pop.errors import DownloadError, PopError, some

THREADS = 8
TIMEOUT = 10  # seconds to connect, to wait for anything at all, and to receive the next PACE bytes of a file
PACE = 2**14  # bytes
TRIES = 6  # failures in a row, with less than MUCH received between them
MUCH = 2**20  # bytes
PAUSE = 1  # seconds after the first failure; doubled after each further one
MOST_PATIENT = 300  # seconds: the longest pause that a server gets
HERE = ("localhost", "127.0.0.1", "::1")  # this machine: plain HTTP to it crosses no network


class Broken(Exception):
    """A failure that may pass. `pause` is the number of seconds that the server asks to wait, or None."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class Hub:
    """One model on the Hugging Face Hub, or on a server like it at $POP_ENDPOINT. $HF_TOKEN opens gated models.

    The token goes to the endpoint's origin (protocol, host and port) only, and over plain HTTP to this machine only.
    No message repeats the token or a malformed endpoint.
    """

    def __init__(self, repository: str, progress: bool = False):
        self.repository, self.progress = repository, progress  # progress: whether to print a line before each retry
        self.url = os.environ.get("POP_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        try:
            scheme, host, _ = self._origin = _origin(self.url)
        except ValueError:
            host = ""
        if not host or set("@?#") & set(self.url):
            raise DownloadError("POP_ENDPOINT must be http:// or https:// with a host, a port and a path only")
        self.name = urlsplit(self.url).netloc
        token = os.environ.get("HF_TOKEN", "").strip()
        if not re.fullmatch(r"[!-~]*", token):  # http.client would print it in its own error
            raise DownloadError("HF_TOKEN contains a character that no token has; set it again")
        self._token = token if scheme == "https" or host in HERE else ""
        proxies = urllib.request.getproxies()
        if scheme == "http" and host in HERE:
            proxies.pop("http", None)  # it would read the token
        kind, found, _ = proxies.get(scheme, "").lower().partition("://")
        if found and kind != "http" and not urllib.request.proxy_bypass(host):
            raise DownloadError(f"the proxy in the environment is a {kind}:// one; only http:// ones are supported")
        self._stop = threading.Event()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _Redirects)

    def together(self, task: Callable[[str], Any], names: Iterable[str]) -> None:
        """Run a task for each name, in threads. The first exception stops all of them."""
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for future in as_completed([pool.submit(task, name) for name in names]):
                    future.result()
            except BaseException:  # includes KeyboardInterrupt
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def check_stop(self) -> None:
        """Raise CancelledError if another thread has failed or Ctrl-C has come."""
        if self._stop.is_set():
            raise CancelledError

    def persist(self, what: str, attempt: Callable[[], Any], received: Callable[[], int] = lambda: 0) -> Any:
        """Return the result of `attempt`; call it again, after a pause, whenever it raises Broken.

        `received` returns the number of bytes received. After MUCH more bytes, failures are counted from 0 again.
        """
        failures, most = 0, received()
        while True:
            try:
                return attempt()
            except Broken as broken:
                self.check_stop()
                if received() >= most + MUCH:
                    failures, most = 0, received()
                failures += 1
                pause = PAUSE * 2 ** (failures - 1) if broken.pause is None else broken.pause
                if failures == TRIES or pause > MOST_PATIENT:
                    step = f"run this again in {pause:.0f} seconds"
                    raise DownloadError(f"{what} could not be fetched: {broken}; {step}") from None
                if self.progress:
                    print(f"{what}: {broken}; trying again in {pause:.0f} s", file=sys.stderr)
                self._stop.wait(pause)

    def read(self, path: str, most: int) -> bytes:
        """Return the whole answer to a request for `path`, which must have `most` bytes at most."""

        def attempt() -> bytes:
            with self.get(path) as answer:
                return b"".join(self.blocks(answer, most))

        return self.persist(f"{self.name}{path}", attempt)

    def blocks(self, answer: HTTPResponse, most: int) -> Iterator[bytes]:
        """Yield the body as it comes; raise DownloadError if it has more than `most` bytes."""
        stated, received = answer.length or 0, 0  # `length` is None if the server does not state it
        due, goal = time.monotonic() + TIMEOUT, PACE
        with _network(answer.url):
            while block := answer.read1(2**20):
                self.check_stop()
                received += len(block)
                if received > most:
                    host = urlsplit(answer.url).hostname
                    raise DownloadError(f"{host} sent more than the {most} bytes expected; try again later")
                yield block
                if received >= goal:
                    due, goal = time.monotonic() + TIMEOUT, received + PACE
                elif time.monotonic() > due:
                    raise TimeoutError("it was too slow")
            if received < stated:
                raise EOFError("it broke off")

    @contextlib.contextmanager
    def get(self, path: str, start: int = 0) -> Iterator[HTTPResponse]:
        """Ask for a file from byte `start` on and yield the answer: status 200 or, with a `start`, 206 or 416."""
        request = Request(self.url + path, headers={"User-Agent": "pop"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        self.check_stop()
        try:
            with _network(self.url):
                answer = self._opener.open(request, timeout=TIMEOUT)
        except HTTPError as error:  # a status other than 2xx
            answer = error
        with contextlib.closing(answer):
            self._check(answer, path, bool(start))
            yield answer

    def _check(self, answer: HTTPResponse | HTTPError, path: str, ranged: bool) -> None:
        """Raise DownloadError or Broken for an answer that cannot be used."""
        status, where, headers = answer.status, urlsplit(answer.url).hostname, answer.headers
        if status == 200 or (ranged and status in (206, 416)):
            return
        if status in (408, 429) or status >= 500:
            pause = headers.get("Retry-After", "")
            seconds = float(pause) if re.fullmatch("[0-9]{1,9}", pause) else None
            raise Broken(f"{where} cannot answer now ({status})", seconds)
        if status >= 400 and _origin(answer.url) != self._origin:
            # A signed address has expired. The endpoint will give a new one.
            raise Broken(f"{where}, where {self.name} redirects to, refuses the request ({status})")
        if headers.get("X-Error-Code") in ("RepoNotFound", "RevisionNotFound"):
            step = "check the names, or set HF_TOKEN if it is private"
            raise DownloadError(f"{self.name} has no {self.repository}, or not this revision of it ({status}); {step}")
        if status not in (401, 403):
            raise DownloadError(f"{self.name} refuses {path} ({status}); check POP_ENDPOINT, or try later")
        token = "is not valid, or does not open it" if self._token else "is not set, or not sent over plain http"
        page = f"{self.url}/{self.repository}"
        step = f"accept the licence on {page}, and set HF_TOKEN to a token of that account that may read gated models"
        raise DownloadError(f"{self.repository} is gated ({status}), and HF_TOKEN {token}; {step}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects that leave the token at its origin and never step down from https to http."""

    def redirect_request(self, request, answer, code, message, headers, url: str) -> Request:
        answer.close()  # urllib would read the body, of any length
        before, after = _origin(request.full_url), _origin(url)
        if after[0] == "http" and before[0] == "https":
            raise DownloadError(f"{before[1]} redirects from https to plain http, which is not followed")
        new = super().redirect_request(request, answer, 302, message, headers, url)
        new.remove_header("Proxy-authorization")  # added again where a proxy is used
        if before == after and request.has_header("Authorization"):
            new.add_unredirected_header("Authorization", request.get_header("Authorization"))
        return new

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 lacks it


def _origin(url: str) -> tuple[str, str, int]:
    """Return (protocol, host, port) of an address of http or https; raise ValueError for any other."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a redirect or a proxy is not an http:// or https:// address")
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    """Turn errors of the network into Broken."""
    try:
        yield
    except (PopError, HTTPError):
        raise
    except (OSError, EOFError, ValueError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        text = some([str(cause) or type(cause).__name__])  # it may be the server's
        raise Broken(f"the connection to {urlsplit(url).hostname} failed ({text})") from None
