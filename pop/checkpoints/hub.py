"""HTTP for `pop download`: every request ends in an answer or in a DownloadError, and only the endpoint sees the token.

`Hub.together` runs requests in threads. When one of them fails or Ctrl-C comes, the others stop within a moment.
Whatever a server sends is untrusted.
"""

import contextlib
import io
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, InvalidURL
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request

from pop.errors import DownloadError, PopError
from pop.progress import note

THREADS = 8
TIMEOUT = 30  # seconds to connect, and to receive the next PACE bytes
PACE = 2**15  # bytes
TRIES = 6  # failures in a row, with less than MUCH received between them
MUCH = 2**20  # bytes
PAUSE = 1  # seconds after the first failure; doubled after each further one
MOST_PATIENT = 300  # seconds: the longest pause that a server may ask for
REDIRECTS = 5
HERE = ("localhost", "127.0.0.1", "::1")  # this machine: plain HTTP to it crosses no network


class Broken(Exception):
    """A failure that may pass. pause: seconds to wait, if the server states them; received: new bytes before it."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause, self.received = pause, 0


class Hub:
    """One model on the Hugging Face Hub, or on a server like it at $POP_ENDPOINT. $HF_TOKEN opens gated models.

    The token goes to the endpoint's origin (protocol, host and port) only, and over plain HTTP to this machine only.

    Args:
        repository: such as "Qwen/Qwen3-0.6B".
        progress: print a line on stderr before each retry.

    Raises:
        DownloadError: the endpoint or the token is malformed. The message does not repeat it.
    """

    def __init__(self, repository: str, progress: bool = False):
        self.repository = repository
        self.note = note if progress else lambda line: None
        self.url = os.environ.get("POP_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        try:
            scheme, host, port = self._origin = _origin(self.url)
        except ValueError:
            port = 0
        if not port or set("@?#") & set(self.url):
            raise DownloadError("POP_ENDPOINT must be http:// or https:// with a host, a port and a path only")
        self.name = urlsplit(self.url).netloc
        token = os.environ.get("HF_TOKEN", "").strip()
        if not re.fullmatch(r"[!-~]*", token):  # http.client would print the token in its own error
            raise DownloadError("HF_TOKEN contains a character that no token has; set it again")
        self._token = token if scheme == "https" or host in HERE else ""
        self._withheld = token != self._token
        self._stop = threading.Event()
        proxies = urllib.request.getproxies()
        if scheme == "http" and host in HERE:
            proxies.pop("http", None)  # it would read the token
        kind, found, _ = proxies.get(scheme, "").lower().partition("://")
        if found and kind != "http" and not urllib.request.proxy_bypass(host):
            raise DownloadError(f"the proxy in the environment is a {kind}:// one; only http:// ones are supported")
        connections = _Connections(context=ssl.create_default_context())
        connections.check_stop = self.check_stop
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _Redirects, connections)

    def together(self, tasks: list[Callable[[], Any]]) -> list:
        """Run `tasks` in threads and return their results. The first exception stops all of them."""
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                while (state := wait(futures, 0.2, FIRST_EXCEPTION)).not_done:  # returns often, so that Ctrl-C is seen
                    for future in state.done:
                        future.result()
                return [future.result() for future in futures]
            except BaseException:  # includes KeyboardInterrupt
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def check_stop(self) -> None:
        """Raise CancelledError if another thread has failed or Ctrl-C has come."""
        if self._stop.is_set():
            raise CancelledError

    def persist(self, what: str, attempt: Callable[[], Any]) -> Any:
        """Return the result of `attempt`; call it again, after a pause, whenever it raises Broken.

        Raises:
            DownloadError: TRIES failures in a row, or the server asks for too long a pause.
        """
        failures = 0
        while True:
            try:
                return attempt()
            except Broken as broken:
                self.check_stop()
                failures = 1 if broken.received >= MUCH else failures + 1
                pause = PAUSE * 2 ** (failures - 1) if broken.pause is None else broken.pause
                if failures == TRIES:
                    raise DownloadError(f"{what} could not be fetched: {broken}; run this again later") from None
                if pause > MOST_PATIENT:
                    raise DownloadError(f"{what}: {broken}; run this again in {pause:.0f} seconds") from None
                self.note(f"{what}: {broken}; trying again in {pause:.0f} s")
                if self._stop.wait(pause):
                    raise CancelledError from None

    def read(self, path: str, most: int) -> bytes:
        """Return the whole answer to a request for `path`, which must have `most` bytes at most."""

        def attempt() -> bytes:
            with self.get(path) as answer:
                data = bytearray()
                for block in blocks(answer):
                    data += block
                    if len(data) > most:
                        raise DownloadError(f"{self.name}{path} has more than {most} bytes; check POP_ENDPOINT")
                return bytes(data)

        return self.persist(f"{self.name}{path}", attempt)

    @contextlib.contextmanager
    def get(self, path: str, start: int = 0) -> Iterator[HTTPResponse]:
        """Ask for a file from byte `start` on and yield the answer. Its status is 200 or, if `start` > 0, 206 or 416.

        Raises:
            DownloadError: trying again would not help.
            Broken: trying again may help.
        """
        request = Request(self.url + path, headers={"User-Agent": "pop"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        self.check_stop()
        try:
            answer = self._opener.open(request, timeout=TIMEOUT)
        except HTTPError as error:  # a status other than 2xx
            answer = error
        except (ValueError, InvalidURL):
            what = "a redirect, or the proxy in the environment, is not an address of http:// or https://"
            raise DownloadError(f"{self.name}: {what}; check POP_ENDPOINT and the proxy") from None
        with contextlib.closing(answer):
            self._check(answer, path, bool(start))
            yield answer

    def _check(self, answer: HTTPResponse | HTTPError, path: str, ranged: bool) -> None:
        """Raise DownloadError or Broken for an answer that cannot be used."""
        status, where, page = answer.status, urlsplit(answer.url).hostname, f"{self.url}/{self.repository}"
        if status == 200 and (answer.headers["Content-Type"] or "").lower().startswith("text/html"):
            raise DownloadError(f"{where} sent a web page instead of a file; check whether a proxy asks for a log-in")
        if (answer.headers["Content-Encoding"] or "identity").lower() != "identity":
            raise DownloadError(f"{where} compresses files, although {self.name} was asked not to; try another network")
        if status == 200 or (ranged and status in (206, 416)):
            return
        if 300 <= status < 400:
            raise DownloadError(f"{where} redirects more than {REDIRECTS} times, or nowhere; check POP_ENDPOINT")
        if status in (408, 429) or status >= 500:
            raise Broken(f"{where} cannot answer now ({status})", _retry_after(answer.headers["Retry-After"] or ""))
        if _origin(answer.url) != self._origin:  # a signed address has expired; the endpoint will give a new one
            raise Broken(f"{where}, where {self.name} redirects to, refuses the request ({status})")
        if status == 404 or answer.headers["X-Error-Code"] == "RepoNotFound":
            what = self.repository if path.startswith("/api/") else path
            raise DownloadError(f"{self.name} has no {what} ({status}), or only for a token that may see it")
        if status not in (401, 403):
            raise DownloadError(f"{where} refuses the request ({status}); check POP_ENDPOINT, or try later")
        if self._withheld:
            raise DownloadError(f"{page} needs HF_TOKEN, which is not sent over plain http; use an https POP_ENDPOINT")
        fault = "HF_TOKEN is not valid, or does not open it" if self._token else "HF_TOKEN is not set"
        step = f"accept the licence on {page}, and set HF_TOKEN to a token of that account that may read gated models"
        raise DownloadError(f"{self.repository} is gated ({status}), and {fault}; {step}")


def blocks(answer: HTTPResponse) -> Iterator[bytes]:
    """Yield the body as it comes; raise Broken if it ends early or cannot be read."""
    left = answer.length  # bytes to come, or None if the server does not state it
    with _network(answer.url):
        while block := answer.read1(2**20):
            left = left and left - len(block)
            yield block
        if left:
            raise EOFError("it broke off")


class _Stream(io.RawIOBase):
    """A reader of a socket. It gives up when the server is silent or too slow, or when the download stops."""

    def __init__(self, sock: socket.socket, check_stop: Callable[[], None]):
        self._sock, self._check_stop = sock, check_stop
        self._file = sock.makefile("rb", buffering=0)  # keeps the socket open until this stream is closed
        self._due, self._count = time.monotonic() + TIMEOUT, 0

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the buffered reader that HTTPResponse asks its socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._sock.settimeout(0.1)
        try:
            while True:
                self._check_stop()
                if time.monotonic() > self._due:
                    raise TimeoutError("it was silent or too slow")
                with contextlib.suppress(TimeoutError):
                    count = self._sock.recv_into(buffer)
                    break
        finally:
            self._sock.settimeout(TIMEOUT)
        self._count += count
        if self._count >= PACE:
            self._due, self._count = time.monotonic() + TIMEOUT, 0
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Connections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Connections that read through a _Stream."""

    def do_open(self, kind: type[HTTPConnection], request: Request, **options) -> HTTPResponse:
        def connect(host: str, **more) -> HTTPConnection:
            connection = kind(host, **more)
            connection.response_class = lambda sock, **rest: HTTPResponse(_Stream(sock, self.check_stop), **rest)
            return connection

        with _network(request.full_url):
            return super().do_open(connect, request, **options)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects that leave the token at its origin and never step down from https to http."""

    max_repeats = max_redirections = REDIRECTS

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
        raise ValueError("not an http address")
    default = {"http": 80, "https": 443}[parts.scheme]
    return parts.scheme, parts.hostname, default if parts.port is None else parts.port


def _retry_after(text: str) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or as a date."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    """Turn errors of the network into Broken, and a certificate that cannot be verified into DownloadError."""
    try:
        yield
    except PopError:
        raise
    except (OSError, EOFError, HTTPException) as error:
        cause, host = error.reason if isinstance(error, URLError) else error, urlsplit(url).hostname
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = f"the certificate of {host} cannot be verified ({cause.verify_message})"
            raise DownloadError(f"{reason}; if a proxy replaces it, name its authority in SSL_CERT_FILE") from None
        text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        text = "".join(letter if letter.isprintable() else "?" for letter in text[:200])  # it may be the server's
        raise Broken(f"the connection to {host} failed ({text})") from None
