"""A hub on this machine. It answers like the real one, unless a test has put a fault in its way."""

import gzip
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LISTING = f"/api/models/{REPOSITORY}/revision/main?blobs=true"
OTHER_LISTING = LISTING.replace("main", "refs%2Fpr%2F1")  # of the same files at another revision


class HubServer(ThreadingHTTPServer):
    """Serves `files` (name -> bytes). faults: name, or LISTING -> functions, each of which answers one request."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], certificate: Path | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.commit, self.faults = files, COMMIT, {}
        self.requests: list[tuple[str, dict[str, str]]] = []  # path and headers, in order
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.server_address[1]}"
        self.certificate = certificate
        self.released = threading.Event()  # set at the end, so that stalled answers return
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def process_request_thread(self, request, address):
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            try:
                request = context.wrap_socket(request, server_side=True)
            except OSError:  # the client does not trust the certificate
                return
        super().process_request_thread(request, address)

    def handle_error(self, request, address):
        pass

    def stop(self):
        self.released.set()
        self.shutdown()
        self.server_close()

    def asked(self, name: str) -> list[str | None]:
        """The Range of each request for a file."""
        return [headers.get("Range") for path, headers in self.requests if path.endswith(f"/{name}")]

    def listing(self) -> dict:
        return {"sha": self.commit, "siblings": [entry(name, data) for name, data in self.files.items()]}


def entry(name: str, data: bytes) -> dict:
    """As the hub lists a file: safetensors are large files there, which have a sha256."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    listed = {"rfilename": name, "size": len(data), "blobId": blob}
    if name.endswith(".safetensors"):
        listed["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return listed


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        name = self.path if self.path in (LISTING, OTHER_LISTING) else self.path.rsplit("/", 1)[-1]
        if self.server.faults.get(name):
            self.server.faults[name].pop(0)(self)
        elif name in (LISTING, OTHER_LISTING):
            self.answer(json.dumps(self.server.listing()).encode(), {"Content-Type": "application/json"})
        elif name in self.server.files and self.path == f"/{REPOSITORY}/resolve/{self.server.commit}/{name}":
            self.file()
        else:
            self.answer(b"Entry not found", status=404)

    def body(self) -> bytes:
        """What was asked for."""
        if self.path == LISTING:
            return json.dumps(self.server.listing()).encode()
        return self.server.files[self.path.rsplit("/", 1)[-1]]

    def file(self, shift: int = 0, part: float = 1.0):
        """Answer as asked, but start `shift` bytes later and say so, or break off after a part of the answer."""
        data = self.body()
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        headers = {"Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start + shift}-{len(data) - 1}/{len(data)}"
        rest = data[start + shift :]
        self.answer(rest[: int(part * len(rest))], headers, 206 if wanted else 200, length=len(rest))

    def answer(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200, length: int | None = None):
        """Send an answer. length: a false Content-Length, or a negative number for none."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is None or length >= 0:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


# ---- Faults: each answers one request


def status(code: int):
    return lambda handler: handler.answer(b"<html>no</html>", status=code)


def redirect(to: str):
    return lambda handler: handler.answer(b"", {"Location": to}, 302)


def redirect_home(server: HubServer):
    """To the same path on another server."""
    return lambda handler: handler.answer(b"", {"Location": f"{server.url}{handler.path}"}, 307)


def page(handler):
    """Answer as a proxy does that wants a log-in."""
    handler.answer(b"<html>Please log in</html>", {"Content-Type": "text/html; charset=utf-8"})


def cut(part: float = 0.5, reset: bool = False):
    """Break off after a part of what was asked for."""

    def fault(handler):
        handler.file(part=part)
        handler.wfile.flush()
        if reset:
            handler.server.released.wait(0.2)  # without this pause, the reset would also discard what was sent
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    return fault


def stall(part: float = 0.5):
    """Send a part, and then nothing."""

    def fault(handler):
        cut(part)(handler)
        handler.server.released.wait(60)

    return fault


def whole(handler):
    """Ignore Range."""
    handler.answer(handler.body())


def compressed(handler):
    handler.answer(gzip.compress(handler.body()), {"Content-Encoding": "gzip"})


def other(data: bytes, length: int | None = None):
    return lambda handler: handler.answer(data, length=length)
