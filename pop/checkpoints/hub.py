"""HTTP for `pop download`: requests that end, in an answer or in one sentence, and a token that stays at home.

One thread, the caller of `Hub.together`, waits; the others fetch. It closes the connections that let it wait for too
long, and all of them when one fails or Ctrl-C comes. Whatever a server says is untrusted: sizes, addresses and names.
"""

import base64
import contextlib
import os
import re
import socket
import ssl
import string
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from pop.errors import DownloadError, PopError

THREADS = 8
TIMEOUT = 30  # seconds, to connect and for a silent connection
PACE = (2**16, 60)  # a connection that brings fewer bytes than this in so many seconds is closed
TRIES = 6  # one after the other, none of them bringing MUCH
MUCH = 2**20  # bytes
PAUSE = 1  # seconds behind the first failure; twice as many behind each further one
MOST_PATIENT = 300  # seconds that a server may ask to wait
REDIRECTS = 5
HERE = ("localhost", "127.0.0.1", "::1")  # this machine, which plain HTTP does not leave


class Broken(Exception):
    """A failure that may pass by itself. pause: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause, self.received = pause, 0


class Stopped(Exception):
    """Another thread has failed, or Ctrl-C has come: this one is to end."""


class Hub:
    """One model on the Hugging Face Hub, or on a server like it in $POP_ENDPOINT; $HF_TOKEN opens gated models.

    The token is sent to the endpoint alone: not to another host, port or protocol that it redirects to, nor over
    plain HTTP except to this machine. Raises DownloadError for an endpoint or a token that cannot be one.
    """

    def __init__(self, repository: str):
        given = os.environ.get("POP_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        self._endpoint = _split(given, "POP_ENDPOINT is no address")
        if self._endpoint.username is not None or self._endpoint.query or self._endpoint.fragment:  # not repeated
            raise DownloadError("POP_ENDPOINT must be a protocol, a host, a port and a path; leave out the rest")
        self.name, self.repository = self._endpoint.netloc, repository
        self._token = os.environ.get("HF_TOKEN", "").strip()
        if not re.fullmatch(r"[!-~]*", self._token):  # http.client would print it in its own error
            raise DownloadError("HF_TOKEN holds a character that no token has; set it anew")
        self.notices: deque[str] = deque()
        self._exchanges: set[_Exchange] = set()
        self._stop = threading.Event()

    def together(self, tasks: list[Callable[[], Any]], tick: Callable[[], object] = lambda: None) -> list:
        """Run tasks in threads and return their results. This thread watches them, and calls `tick` now and then."""
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, 0.2, FIRST_EXCEPTION)
                    tick()
                    for exchange in list(self._exchanges):
                        exchange.close_if_late()
                    for future in done:
                        future.result()
            except BaseException:  # KeyboardInterrupt too
                self._stop.set()
                for exchange in list(self._exchanges):
                    exchange.close()
                for future in futures:
                    future.cancel()
                raise
        return [future.result() for future in futures]

    def check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def persist(self, what: str, attempt: Callable[[], Any]) -> Any:
        """The result of `attempt`, which is called again where it raises Broken, after a pause."""
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
                self.notices.append(f"{what}: {broken}; trying again in {pause:.0f} s")
                if self._stop.wait(pause):
                    raise Stopped from None

    def read(self, path: str, most: int) -> bytes:
        """The whole answer to a request, of `most` bytes at most."""

        def attempt() -> bytes:
            with self.get(path) as answer:
                data = bytearray()
                for block in answer.blocks():
                    data += block
                    if len(data) > most:
                        raise DownloadError(f"{self.name}{path} has more than {most} bytes; is POP_ENDPOINT a hub?")
                if answer.length is not None and len(data) < answer.length:
                    raise Broken("the connection broke off")
                return bytes(data)

        return self.persist(f"{self.name}{path}", attempt)

    @contextlib.contextmanager
    def get(self, path: str, start: int = 0) -> Iterator["_Exchange"]:
        """Ask for a file from byte `start` on; yield the answer, whose status is 200, or if `start`, 206 or 416.

        Raises DownloadError for what will not pass by itself, else Broken, also for errors of reading the answer.
        """
        url, token = _split(f"{self._endpoint.geturl()}{path}", self.name), self._token
        if url.scheme == "http" and url.hostname not in HERE:
            token = ""
        for _ in range(REDIRECTS + 1):
            headers = {"User-Agent": "pop", "Accept-Encoding": "identity", "Connection": "close"}
            if token:
                headers["Authorization"] = f"Bearer {token}"
            if start:
                headers["Range"] = f"bytes={start}-"
            with self._exchange(url, headers) as answer:
                if answer.status not in (301, 302, 303, 307, 308):
                    self._check(answer, url, path, bool(token), bool(start))
                    yield answer
                    return
                there = quote(answer.header("Location"), safe=string.punctuation)
            there = _split(there, f"{url.hostname} redirects to what is no address", url.geturl())
            if there.scheme == "http" and url.scheme == "https":
                raise DownloadError(f"{url.hostname} redirects from https to plain http, which is not followed")
            token = token if _origin(there) == _origin(url) else ""
            url = there
        raise DownloadError(f"{self.name} redirects more than {REDIRECTS} times; check POP_ENDPOINT, or try later")

    @contextlib.contextmanager
    def _exchange(self, url: SplitResult, headers: dict[str, str]) -> Iterator["_Exchange"]:
        """Connect, ask and yield the answer. What breaks, inside the block as well, is raised as Broken."""
        connection = exchange = None

        def dial(*args) -> socket.socket:
            """A socket that is watched from now on: through a proxy's answer and TLS's handshake, too."""
            nonlocal exchange
            sock = socket.create_connection(*args)
            exchange = _Exchange(sock.dup())
            self._exchanges.add(exchange)
            self.check_stop()  # only now can `together` close it
            return sock

        try:
            self.check_stop()
            connection, target, more = _connection(url)
            connection._create_connection = dial
            connection.request("GET", target, headers=headers | more)
            exchange.response = connection.getresponse()
            yield exchange
        except (PopError, Broken, Stopped):
            raise
        except ssl.SSLCertVerificationError as error:
            reason = f"the certificate of {url.hostname} cannot be verified ({error.verify_message})"
            raise DownloadError(f"{reason}; if a proxy replaces it, name its authority in SSL_CERT_FILE") from None
        except (OSError, EOFError, HTTPException, ValueError, zlib.error) as error:
            self.check_stop()
            late = "it was too slow" if exchange is not None and exchange.late else _reason(error)
            raise Broken(f"the connection to {url.hostname} failed ({late})") from None
        finally:
            self._exchanges.discard(exchange)
            if exchange is not None:
                exchange.end()
            if connection is not None:
                connection.close()

    def _check(self, answer: "_Exchange", url: SplitResult, path: str, authorized: bool, ranged: bool) -> None:
        """Put into words whatever is no answer to go on with."""
        status, where, pause = answer.status, url.hostname, _retry_after(answer.header("Retry-After"))
        page = f"{self._endpoint.geturl()}/{self.repository}"
        if status == 200 and answer.header("Content-Type").lower().startswith("text/html"):
            raise DownloadError(f"{where} sent a web page instead of a file; does a proxy ask for a log-in?")
        if status == 200 or (ranged and status in (206, 416)):
            return
        if status == 429:
            raise Broken(f"{where} has had too many requests (429)", pause)
        if status == 408 or status >= 500:
            raise Broken(f"{where} has a fault ({status})", pause)
        if _origin(url) != _origin(self._endpoint):  # a signed address that has lapsed: the endpoint gives a new one
            raise Broken(f"{where}, where {self.name} redirects to, refuses the request ({status})")
        if status == 404 or answer.header("X-Error-Code") == "RepoNotFound":
            what = self.repository if path.startswith("/api/") else path
            raise DownloadError(f"{self.name} has no {what} ({status}), or not without a token that may see it")
        if status in (401, 403) and not authorized and self._token:
            raise DownloadError(f"{page} needs HF_TOKEN, which is not sent over plain http: use an https POP_ENDPOINT")
        if status in (401, 403) and not authorized:
            step = f"accept its licence on {page}, and set HF_TOKEN to a token of that account"
            raise DownloadError(f"{self.repository} is gated ({status}): {step}, from its settings")
        if status == 401:
            raise DownloadError(f"{self.name} does not accept HF_TOKEN (401): set it to a token that is still valid")
        if status == 403:
            step = f"accept its licence on {page} and wait for access; a fine-grained token must allow gated models"
            raise DownloadError(f"HF_TOKEN may not read {self.repository} (403): {step}")
        raise DownloadError(f"{where} refuses the request ({status}); check POP_ENDPOINT, or try later")


class _Exchange:
    """A request and its answer. sock: a duplicate of its socket, by which another thread may close it."""

    def __init__(self, sock: socket.socket):
        self.response: HTTPResponse | None = None
        self.late = False
        self._socket = sock
        self._due, self._count = time.monotonic() + PACE[1], 0

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def length(self) -> int | None:
        """Bytes that `blocks` will bring, if the server says so."""
        encoded = self.response.chunked or self.header("Content-Encoding").lower() not in ("", "identity")
        stated = self.header("Content-Length")
        return int(stated) if re.fullmatch(r"[0-9]{1,18}", stated) and not encoded else None

    def header(self, name: str) -> str:
        return self.response.headers.get(name) or ""

    def blocks(self) -> Iterator[bytes]:
        """The body as it comes. Its end may be early: the caller knows the size."""
        encoding = self.header("Content-Encoding").lower()
        if encoding not in ("", "identity", "gzip"):
            raise DownloadError(f"the server compresses files by {encoding!r:.40}, unasked; check POP_ENDPOINT")
        gzip = zlib.decompressobj(31) if encoding == "gzip" else None  # 31: with the header of gzip
        while (gzip is None or not gzip.eof) and (block := self.response.read1(2**20)):
            self._count += len(block)
            if self._count >= PACE[0]:
                self._due, self._count = time.monotonic() + PACE[1], 0
            while gzip is not None and block:  # in steps, since little may become much
                if piece := gzip.decompress(block, 2**20):
                    yield piece
                block = gzip.unconsumed_tail
            if block:
                yield block
        if self.late or (gzip is not None and not gzip.eof):
            raise EOFError("it broke off")

    def close_if_late(self) -> None:
        if time.monotonic() > self._due:
            self.late = True
            self.close()

    def close(self) -> None:
        """Wake the thread that reads: it finds the stream ended."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Let go of the answer and the duplicate."""
        if self.response is not None:
            self.response.close()
        self._socket.close()


def _split(url: str, fault: str, base: str = "") -> SplitResult:
    """The parts of an address; what has none raises DownloadError, which does not repeat it: it may hold a secret."""
    try:
        parts = urlsplit(urljoin(base, url))
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise DownloadError(f"{fault} of http:// or https://")


def _origin(url: SplitResult) -> tuple[str, str, int]:
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}[url.scheme]


def _connection(url: SplitResult) -> tuple[HTTPConnection, str, dict[str, str]]:
    """A connection for an address, directly or by the environment's proxy; what to ask it for; headers to add."""
    secure = url.scheme == "https"

    def to(host: str, port: int | None) -> HTTPConnection:
        if secure:
            return HTTPSConnection(host, port, timeout=TIMEOUT, context=ssl.create_default_context())
        return HTTPConnection(host, port, timeout=TIMEOUT)

    target = quote(f"{url.path or '/'}{'?' if url.query else ''}{url.query}", safe=string.punctuation)
    direct = proxy_bypass(url.hostname) or (not secure and url.hostname in HERE)  # a proxy would read the token
    proxy = None if direct else getproxies().get(url.scheme)
    if not proxy:
        return to(url.hostname, url.port), target, {}
    via = _split(proxy if "//" in proxy else f"http://{proxy}", "the proxy in the environment has no address")
    if via.scheme != "http":
        raise DownloadError("the proxy in the environment is an https one; only http:// ones are supported")
    login = f"{unquote(via.username or '')}:{unquote(via.password or '')}"
    more = {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if via.username else {}
    connection = to(via.hostname, via.port or 80)
    if not secure:
        return connection, f"http://{url.netloc.rpartition('@')[2]}{target}", more
    connection.set_tunnel(url.hostname, url.port or 443, more)
    return connection, target, {}


def _retry_after(text: str) -> float | None:
    """Seconds, from a number of them or a date."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it fell silent"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])  # it may be the server's
