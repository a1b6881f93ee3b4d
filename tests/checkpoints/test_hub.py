"""HTTP of `pop download`: broken and slow connections, refusals, redirects, proxies, TLS, and where the token goes."""

import base64
import contextlib
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from support import hub_server
from support.downloads import ONE, TOKEN, TWO, assert_right, fetch, refused
from support.hub_server import COMMIT, LISTING, REPOSITORY, HubServer, cut, other, redirect, stall, status

from pop.checkpoints import hub
from pop.checkpoints.download import INDEX, download
from pop.errors import DownloadError

# ---- Broken and slow connections


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_connection_is_resumed(server, folder, reset):
    server.faults[ONE] = [cut(0.5, reset), cut(0.5, reset)]
    fetch()
    assert_right(folder, server)
    size = len(server.files[ONE])
    half = size // 2
    assert server.asked(ONE) == [None, f"bytes={half}-", f"bytes={half + (size - half) // 2}-"]
    assert server.asked(TWO) == [None]


def test_a_silent_connection_is_resumed(server, folder, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    server.faults[ONE] = [stall(0.5)]
    fetch()
    assert_right(folder, server)
    assert server.asked(ONE) == [None, f"bytes={len(server.files[ONE]) // 2}-"]


@pytest.mark.parametrize("where", [LISTING, ONE])
def test_a_slow_connection_is_closed_and_resumed(server, folder, monkeypatch, where):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    server.faults[where] = [hub_server.drip]
    fetch()
    assert_right(folder, server)
    monkeypatch.setattr(hub, "TRIES", 2)
    shutil.rmtree(folder)
    server.faults[where] = [hub_server.drip] * 2
    refused("too slow")


def test_a_slow_handshake_is_closed(server, monkeypatch):
    """TLS, byte by byte."""
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    monkeypatch.setattr(hub, "TRIES", 1)
    slow = hub_server.Dripping(b"\x16\x03\x03\x40\x00\x02" + bytes(10_000))
    monkeypatch.setenv("POP_ENDPOINT", slow.url.replace("http:", "https:"))
    end = threading.Timer(5, slow.released.set)
    end.start()
    try:
        refused("connection to 127.0.0.1")
        assert not slow.released.is_set()
    finally:
        end.cancel()
        slow.stop()


def test_tries_are_limited(server, folder):
    server.faults[ONE] = [cut(0.1)] * 100
    refused(ONE, "broke off")
    assert len(server.asked(ONE)) == hub.TRIES
    server.faults.clear()
    fetch()
    assert_right(folder, server)


def test_tries_start_again_after_much_progress(server, folder, monkeypatch):
    monkeypatch.setattr(hub, "MUCH", 1000)
    server.faults[ONE] = [cut(0.1)] * 9
    assert len(server.files[ONE]) * 0.9**9 * 0.1 > 1000
    fetch()
    assert_right(folder, server)
    assert len(server.asked(ONE)) == 10


def test_bytes_fetched_again_are_not_progress(server, folder, monkeypatch):
    monkeypatch.setattr(hub, "MUCH", 1000)
    elsewhere = lambda handler: handler.file(shift=1)  # noqa: E731
    server.faults[ONE] = [cut(0.5), elsewhere] * 50
    refused(ONE)
    assert len(server.asked(ONE)) < 2 * hub.TRIES + 2


@pytest.mark.parametrize(("name", "said"), [(LISTING, "list of files"), (ONE, ONE)])
def test_a_compressed_answer_is_refused(server, folder, name, said):
    """Each request asks for identity, and the bytes of a compressed range could not be joined."""
    server.faults[name] = [hub_server.compressed] * 100
    refused(said)
    server.faults.clear()
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in server.requests)
    fetch()
    assert_right(folder, server)


# ---- Refusals and faults


@pytest.mark.parametrize(
    ("where", "answer", "token", "said"),
    [
        (INDEX, status(401, X_Error_Code="GatedRepo"), "", f"{REPOSITORY} is gated (401)"),
        (LISTING, status(401), "", f"/{REPOSITORY}, and set HF_TOKEN"),
        (LISTING, status(401, X_Error_Code="RepoNotFound"), "", f"has no {REPOSITORY}"),
        (LISTING, status(404, X_Error_Code="RevisionNotFound"), TOKEN, "not this revision of it (404)"),
        (ONE, status(403, X_Error_Code="GatedRepo"), "", "HF_TOKEN is not set"),
        (LISTING, status(401), TOKEN, "(401), and HF_TOKEN is not valid"),
        (ONE, status(403), TOKEN, f"{REPOSITORY} is gated (403)"),
        (LISTING, status(404), "", "(404)"),
        (ONE, status(404), TOKEN, ONE),
        (ONE, status(400), "", "(400)"),
        (ONE, status(204), "", "(204)"),
        (ONE, status(206), "", "(206)"),
        (ONE, status(429, Retry_After="1000"), "", "(429); run this again in 1000 seconds"),
    ],
)
def test_a_refusal_is_not_tried_again(server, folder, monkeypatch, where, answer, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    server.faults[where] = [answer]
    refused(said)
    assert not server.faults[where]
    assert len([path for path, _ in server.requests if path.endswith(where)]) == 1
    fetch()
    assert_right(folder, server)


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_passing_fault_is_tried_again(server, folder, code):
    server.faults = {name: [status(code), status(code, Retry_After="0")] for name in (LISTING, INDEX, ONE)}
    fetch()
    assert_right(folder, server)
    shutil.rmtree(folder)
    server.requests.clear()
    server.faults = {ONE: [status(code)] * 100}
    refused(ONE, f"({code})")
    assert len(server.asked(ONE)) == hub.TRIES


def test_a_listing_that_breaks_off_is_fetched_again(server, folder):
    server.faults[LISTING] = [cut(0.5), cut(0.9, reset=True)]
    fetch()
    assert_right(folder, server)


def test_retry_after(server, folder):
    server.faults[ONE] = [status(429, Retry_After="1"), status(503, Retry_After="soon")]
    begin = time.monotonic()
    fetch()
    assert time.monotonic() - begin >= 1
    assert_right(folder, server)


def test_pauses_double(server, monkeypatch):
    waited = []
    monkeypatch.setattr(hub, "PAUSE", 1)
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waited.append(seconds))

    def fail():
        raise hub.Broken("no")

    with pytest.raises(DownloadError):
        hub.Hub(REPOSITORY).persist("it", fail)
    assert waited == [1, 2, 4, 8, 16]


def test_no_server(server, folder, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("POP_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        refused("Connection refused")

    def nameless(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nameless)
    refused("127.0.0.1", "Name or service not known")


@pytest.mark.parametrize(
    "junk", [b"SSH-2.0-server\r\n", b"\0" * 100, b"HTTP/1.1 OK\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n" * 200]
)
def test_an_answer_that_is_not_http(server, folder, junk):
    def fault(handler):
        handler.wfile.write(junk)

    server.faults[LISTING] = [fault] * hub.TRIES
    refused("the connection to 127.0.0.1")


@pytest.mark.parametrize(
    "endpoint",
    ["ftp://x", "huggingface.co", "http://", "http://x:port", "https://me:pass@host", "https://h?x=1"],
)
def test_a_malformed_endpoint_is_not_repeated(server, monkeypatch, endpoint):
    monkeypatch.setenv("POP_ENDPOINT", endpoint)
    assert "pass" not in refused("POP_ENDPOINT")


# ---- Redirects, proxies and the token


def authorizations(server: HubServer) -> set[str | None]:
    return {headers.get("Authorization") for _, headers in server.requests}


def test_the_token_goes_to_the_endpoint(server, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    server.faults[ONE] = [redirect(f"/{REPOSITORY}/resolve/{COMMIT}/{ONE}?again"), status(500)]
    server.faults[f"{ONE}?again"] = [redirect(ONE)]
    download("tiny")
    assert_right(folder, server)
    assert authorizations(server) == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capsys.readouterr())
    assert all(TOKEN.encode() not in path.read_bytes() for path in folder.iterdir())


def test_the_token_does_not_follow_a_redirect_to_another_origin(server, folder, start, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    elsewhere, back = start(), []
    server.faults = {name: [hub_server.redirect_home(elsewhere)] for name in (LISTING, INDEX, ONE, TWO, "config.json")}
    elsewhere.faults[TWO] = [hub_server.redirect_home(server)]  # nor does it get it for sending us back
    server.faults[TWO].append(lambda handler: back.append(dict(handler.headers)) or handler.file())
    fetch()
    assert_right(folder, server)
    assert len(elsewhere.requests) == 5 and authorizations(elsewhere) == {None}
    assert len(back) == 1 and "Authorization" not in back[0]


def test_a_range_follows_a_redirect_and_an_expired_address_is_renewed(server, folder, start):
    elsewhere = start()
    server.faults[ONE] = [hub_server.redirect_home(elsewhere)] * 3
    elsewhere.faults[ONE] = [cut(0.5), status(403)]
    fetch()
    assert_right(folder, server)
    half = f"bytes={len(server.files[ONE]) // 2}-"
    assert elsewhere.asked(ONE) == [None, half, half]


def test_a_loop_of_redirects(server, folder):
    server.faults[LISTING] = [redirect(LISTING)] * 100
    refused("(302)")
    assert len(server.requests) < 12


@pytest.mark.parametrize("token", ["hf_Secret\nX-More: 1", "hf_Sécret", "hf Secret", "hf_Secret\x7f"])
def test_a_malformed_token_is_not_repeated(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    assert "cret" not in refused("HF_TOKEN")
    assert server.requests == []


def test_plain_http_goes_through_a_proxy_and_without_the_token(server, folder, monkeypatch):
    monkeypatch.setenv("POP_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:pass@"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch()
    assert_right(folder, server)
    assert all(path.startswith("http://hub.invalid/") for path, _ in server.requests)
    assert authorizations(server) == {None}
    assert {headers["Proxy-Authorization"] for _, headers in server.requests} == {
        f"Basic {base64.b64encode(b'me:pass').decode()}"
    }
    shutil.rmtree(folder)
    server.faults[LISTING] = [status(401)]
    refused("HF_TOKEN", "plain http")


def test_plain_http_to_this_machine_bypasses_the_proxy(server, folder, start, monkeypatch):
    """Over plain HTTP it would read the token."""
    proxy = start()
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch()
    assert_right(folder, server)
    assert proxy.requests == [] and authorizations(server) == {f"Bearer {TOKEN}"}


def test_the_body_of_a_redirect_is_not_read(server, folder):
    sent = []

    def endless(handler):
        handler.answer(b"", {"Location": f"{handler.path}?again"}, 308, length=-1)
        with contextlib.suppress(OSError):
            for _ in range(2**5):
                handler.wfile.write(bytes(2**20))
                sent.append(2**20)

    server.faults[ONE], server.faults[f"{ONE}?again"] = [endless], [other(server.files[ONE])]
    fetch()
    assert_right(folder, server)
    assert sum(sent) < 2**24


def test_the_login_of_a_proxy_does_not_follow_a_redirect(server, folder, start, monkeypatch):
    elsewhere = start()
    monkeypatch.setenv("POP_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:pass@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.faults[ONE] = [hub_server.redirect_home(elsewhere)]
    fetch()
    assert_right(folder, server)
    ((_, headers),) = elsewhere.requests
    assert "Proxy-Authorization" not in headers


@pytest.mark.parametrize("proxy", ["https://me:pass@proxy.invalid", "socks5://me:pass@proxy.invalid"])
def test_a_proxy_that_is_not_http_is_not_repeated(server, monkeypatch, proxy):
    monkeypatch.setenv("POP_ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("https_proxy", proxy)
    assert "pass" not in refused("proxy")


# ---- TLS, with a certificate of 127.0.0.1 and localhost that only these tests use


@pytest.fixture
def secure(server, start, monkeypatch):
    certificate = Path(__file__).parents[1] / "support" / "localhost.pem"
    secure = start(certificate)
    monkeypatch.setenv("POP_ENDPOINT", secure.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return secure


def test_https(secure, folder):
    secure.faults[ONE] = [cut(0.5), stall(0.5)]
    secure.faults[TWO] = [cut(0.5, reset=True)]
    stalled = threading.Timer(0.5, secure.released.set)
    stalled.start()
    fetch()
    assert_right(folder, secure)
    assert authorizations(secure) == {f"Bearer {TOKEN}"}
    stalled.join()


def test_a_redirect_from_https_to_http(secure, server):
    secure.faults[ONE] = [hub_server.redirect_home(server)]
    refused("redirects from https to plain http")
    assert server.requests == []


def test_a_slow_https_connection_is_closed_and_resumed(secure, folder, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    secure.faults[ONE] = [hub_server.drip]
    fetch()
    assert_right(folder, secure)
    assert len(secure.asked(ONE)) == 2 and secure.asked(ONE)[1] is not None


def test_a_certificate_that_cannot_be_verified(secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    refused("connection to 127.0.0.1", "certificate verify failed")
    assert secure.requests == []


def test_https_through_a_proxy(secure, folder, monkeypatch):
    """The proxy sees where to connect to, and neither what is asked for nor the token."""
    seen = []

    def connect(handler):
        seen.append((handler.path, dict(handler.headers)))
        handler.send_response(200)
        handler.end_headers()
        with socket.create_connection(("127.0.0.1", secure.server_address[1])) as there:
            back = threading.Thread(target=pump, args=(there, handler.connection))
            back.start()
            pump(handler.connection, there)
            back.join()

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    monkeypatch.setattr(hub_server.Handler, "do_CONNECT", connect, raising=False)
    proxy = HubServer({})
    try:
        monkeypatch.setenv("POP_ENDPOINT", secure.url.replace("127.0.0.1", "localhost"))
        monkeypatch.setenv("https_proxy", proxy.url)
        fetch()
    finally:
        proxy.stop()
    assert_right(folder, secure)
    assert {path for path, _ in seen} == {f"localhost:{secure.server_address[1]}"}
    assert TOKEN not in repr(seen) and authorizations(secure) == {f"Bearer {TOKEN}"}
