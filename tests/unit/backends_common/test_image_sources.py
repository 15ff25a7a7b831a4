"""R37: which addresses are fetched from, what travels along, what an error says. R38: local files. And data: URLs."""

from __future__ import annotations

import base64
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from backends.common.http import FetchError, FetchTimeoutError, UrlError
from backends.common.images import (
    ATTEMPTS,
    Fetcher,
    Origin,
    Platform,
    Refused,
    decode_data_url,
    read_local_file,
    shown,
)

PUBLIC = "93.184.216.34"


class Server:
    """A loopback server; `answer(handler)` plays its part."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = ok(b"image")
        me = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                me.seen.append((self.path, self.headers["Host"], {k.lower(): v for k, v in self.headers.items()}))
                me.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.port: int = self.httpd.server_address[1]
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def ok(body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return reply(200, body, **headers)


def reply(status: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def play(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return play


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.httpd.shutdown()
    made.httpd.server_close()


@contextmanager
def fetcher(**options: Any) -> Iterator[Fetcher]:
    made = Fetcher(**{"max_bytes": 1000, "timeout_s": 2.0, **options})
    try:
        yield made
    finally:
        made.close()


def no_resolver(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host} was looked up")


REFUSED_BY_SPELLING = [
    "",
    "image.png",
    "//host/a.png",
    "http://",
    "http:///a.png",
    "http:a.png",
    "http://:80/a.png",
    "file:///etc/passwd",
    "ftp://example.org/a.png",
    "gopher://example.org/a",
    "data:text/html,hello",
    "javascript:alert(1)",
    "jar:http://example.org!/a",
    "unix:///var/run/docker.sock",
    "http://user:secret@example.org/a.png",
    "http://user@example.org/a.png",
    "http://example.org@127.0.0.1/a.png",
    "http://127.0.0.1@example.org/a.png",
    "http://0177.0.0.1/",
    "http://0x7f.0.0.1/",
    "http://0x7f000001/",
    "http://2130706433/",
    "http://127.1/",
    "http://127.0.1/",
    "http://0/",
    "http://127.0.0.1.2/",
    "http://1.2.3.4.5.6/",
    "http://１２７.0.0.1/",
    "http://127。0。0。1/",
    "http://exämple.org/",
    "http://example.org:99999/",
    "http://example.org:0/",
    "http://example.org:-1/",
    "http://example.org:80a/",
    "http://exa mple.org/",
    "http://example.org/a b",
    "http://example.org\\@127.0.0.1/",
    "http://example.org\t/",
    "http://example.org/\r\nX-Header: 1",
    "http://example..org/",
    "http://.example.org/",
    "http://[::1/",
    "http://[v1.fe80::a]/",
    "http://[fe80::1%25eth0]/",
    "http://exam%70le.org/",
    "http://-example.org/",
    "http://" + "a" * 64 + ".org/",
    "http://example.org/" + "a" * 9000,
]


@pytest.mark.parametrize("url", REFUSED_BY_SPELLING, ids=lambda url: url[:30])
def test_r37_refused_by_its_spelling(url: str) -> None:
    with fetcher(resolve=no_resolver) as fetch, pytest.raises(UrlError):
        fetch.get(url)


REFUSED_ADDRESSES = [
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",  # metadata of most clouds
    "168.63.129.16",  # of Azure, though it looks public
    "100.100.100.200",  # of Alibaba, in the range of carriers
    "192.0.0.192",  # of Oracle
    "0.0.0.0",
    "255.255.255.255",
    "224.0.0.1",
    "240.0.0.1",
    "198.18.0.1",
    "::1",
    "::",
    "fe80::1",
    "fd00:ec2::254",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::7f00:1",
    "fec0::1",
    "2002:7f00:1::",
    "2001:0:7f00:1::1",
]


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
def test_r37_private_addresses_are_refused(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    for url in (f"http://{host}/a.png", f"https://{host}:8443/"):
        with fetcher(resolve=no_resolver) as fetch, pytest.raises(UrlError, match="private or reserved"):
            fetch.get(url)
    # the same behind a name, also when another answer of the name is fine
    for answers in ([address], [PUBLIC, address]):
        with fetcher(resolve=lambda *_, answers=answers: answers) as fetch, pytest.raises(UrlError, match="private"):
            fetch.get("http://example.org/a.png")


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "localhost.", "localhost.:80"])
def test_r37_this_machine_by_name(name: str) -> None:
    with fetcher() as fetch, pytest.raises(UrlError, match="private or reserved"):
        fetch.get(f"http://{name}/")


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:220:1:248:1893:25c8:1946", "8.8.8.8", "::ffff:8.8.8.8"])
def test_r37_public_addresses_pass(address: str) -> None:
    with fetcher(resolve=lambda *_: [address]) as fetch:
        origin = Origin.of("https://example.org/a.png")
        assert fetch.checked_addresses(origin, None, 1.0) == [address]


@pytest.mark.parametrize(
    ("listed", "host", "address", "passes"),
    [
        (["minio"], "minio", "10.0.0.5", True),
        (["minio"], "other", "10.0.0.5", False),
        (["MinIO."], "minio", "10.0.0.5", True),
        (["10.0.0.0/8"], "any", "10.9.9.9", True),
        (["10.0.0.0/8"], "any", "192.168.0.1", False),
        (["127.0.0.1"], "any", "::ffff:127.0.0.1", True),
        (["[fd00::1]"], "any", "fd00::1", True),
        (["*"], "any", "192.168.0.1", True),
        (["*"], "any", "127.0.0.1", True),
        (["*"], "any", "169.254.169.254", False),
        (["*"], "any", "224.0.0.1", False),
        (["169.254.169.254"], "any", "169.254.169.254", True),
    ],
)
def test_r37_listed_hosts(listed: list[str], host: str, address: str, passes: bool) -> None:
    with fetcher(allow_private_hosts=listed, resolve=lambda *_: [address]) as fetch:
        origin = Origin.of(f"http://{host}/")
        if passes:
            assert fetch.checked_addresses(origin, None, 1.0) == [address]
        else:
            with pytest.raises(UrlError):
                fetch.checked_addresses(origin, None, 1.0)


def test_r37_the_checked_address_is_the_one_connected_to(server: Server) -> None:
    """A name that answers differently when it is asked again: it is asked once for a connection."""
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else [PUBLIC]

    with fetcher(allow_private_hosts=["127.0.0.1"], resolve=rebinding) as fetch:
        assert fetch.get(f"http://images.example.org:{server.port}/a.png?q=1#f") == b"image"
    assert asked == ["images.example.org"]
    ((path, host, _),) = server.seen
    assert (path, host) == ("/a.png?q=1", f"images.example.org:{server.port}")

    asked.clear()
    with fetcher(resolve=lambda *_: [PUBLIC] if not asked.append("x") and len(asked) == 1 else ["127.0.0.1"]) as fetch:
        origin = Origin.of(f"http://images.example.org:{server.port}/")
        assert fetch.checked_addresses(origin, None, 1.0) == [PUBLIC]
        with pytest.raises(UrlError):  # the next connection is a new look-up and a new check
            fetch.get(f"http://images.example.org:{server.port}/a.png")
    assert len(server.seen) == 1


def test_r37_the_next_address_is_tried(server: Server) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.2", 0))
    addresses = ["127.0.0.2", "127.0.0.1"]
    with fetcher(allow_private_hosts=["127.0.0.0/8"], resolve=lambda *_: addresses) as fetch:
        assert fetch.get(f"http://images.example.org:{server.port}/") == b"image"


LOCAL = {"allow_private_hosts": ["127.0.0.1"]}


@pytest.mark.parametrize(
    "target",
    [
        "http://10.0.0.1/", "http://[::1]/", "http://127.0.0.2/", "file:///etc/passwd", "data:image/png;base64,AA==",
        "ftp://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "//10.0.0.1/", "http://u:p@127.0.0.1/",
    ],
)  # fmt: skip
def test_r37_a_redirect_is_a_new_check(server: Server, target: str) -> None:
    server.answer = reply(302, Location=target)
    with fetcher(**LOCAL) as fetch, pytest.raises(UrlError):
        fetch.get(server.url + "/a.png")
    assert len(server.seen) == 1


def test_r37_three_redirects_and_no_more(server: Server) -> None:
    def hop(handler: BaseHTTPRequestHandler) -> None:
        left = int(handler.path.rpartition("/")[2])
        (reply(302, Location=f"/{left - 1}") if left else ok(b"image"))(handler)

    server.answer = hop
    with fetcher(**LOCAL) as fetch:
        assert fetch.get(server.url + "/3") == b"image"
        with pytest.raises(FetchError, match="redirects"):
            fetch.get(server.url + "/4")


def test_r37_credentials_stay_at_home(server: Server) -> None:
    other = Server()
    try:
        platform = Platform(server.url, None)
        secret = {"Authorization": "Token canary"}

        def home(handler: BaseHTTPRequestHandler) -> None:
            path = {"/inside": "/image", "/away": f"{other.url}/image"}.get(handler.path)
            (reply(302, Location=path) if path else ok(b"image"))(handler)

        server.answer = home
        other.answer = lambda handler: (
            reply(302, Location=f"{server.url}/image") if handler.path == "/back" else ok(b"image")
        )(handler)
        with fetcher(**LOCAL) as fetch:
            fetch.get(f"{server.url}/inside", platform=platform, credentials=secret)
            assert ["authorization" in headers for _, _, headers in server.seen] == [True, True]
            server.seen.clear()
            fetch.get(f"{server.url}/away", platform=platform, credentials=secret)
            fetch.get(f"{other.url}/image", platform=platform, credentials=secret)
            assert ["authorization" in headers for _, _, headers in other.seen] == [False, False]
            server.seen.clear()
            fetch.get(f"{other.url}/back", platform=platform, credentials=secret)  # a stranger who sends us home
            assert ["authorization" in headers for _, _, headers in server.seen] == [False]
    finally:
        other.httpd.shutdown()
        other.httpd.server_close()


def test_r37_the_platform_may_be_private_but_only_itself(server: Server) -> None:
    with fetcher() as fetch:
        named = Platform(server.url, None)
        assert fetch.get(server.url + "/a.png", platform=named) == b"image"
        assert fetch.get(server.url + "/a.png", platform=Platform(server.url, frozenset({"127.0.0.1"}))) == b"image"
        with pytest.raises(UrlError):
            fetch.get(server.url + "/a.png", platform=Platform(server.url, frozenset({"10.0.0.1"})))
        with pytest.raises(UrlError):
            fetch.get(f"http://127.0.0.1:{server.port + 1}/", platform=named)
        with pytest.raises(UrlError):
            fetch.post_json(f"http://127.0.0.1:{server.port + 1}/", b"{}", platform=named)


@pytest.mark.parametrize("sized", [True, False])
def test_r37_bytes_are_capped_while_reading(server: Server, sized: bool) -> None:
    server.answer = ok(b"x" * 100_000, **({"Content_Length": "100000"} if sized else {}))
    with fetcher(**LOCAL) as fetch, pytest.raises(FetchError, match="1000"):
        fetch.get(server.url)
    server.answer = ok(b"x" * 1000)
    with fetcher(**LOCAL) as fetch:
        assert len(fetch.get(server.url)) == 1000


def test_r37_one_deadline_for_everything(server: Server) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.02)

    server.answer = drip
    with fetcher(timeout_s=0.3, **LOCAL) as fetch, pytest.raises(FetchTimeoutError):
        fetch.get(server.url)
    waiting = threading.Event()
    with fetcher(timeout_s=0.1, resolve=lambda *_: waiting.wait(5) and []) as fetch:
        with pytest.raises(FetchTimeoutError):
            fetch.get("http://example.org/")
        waiting.set()


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 404, 418, 429, 500, 503])
def test_r37_errors_name_the_place_and_not_the_answer(server: Server, status: int) -> None:
    server.answer = reply(status, b"" if status in (204, 304) else b"canary", X_Canary="canary")
    with fetcher(**LOCAL) as fetch, pytest.raises(Refused) as problem:
        fetch.get(server.url + "/a.png?token=canary#canary")
    assert problem.value.status == status
    assert f"127.0.0.1:{server.port}/a.png answered HTTP {status}" in str(problem.value)
    assert "canary" not in str(problem.value)
    assert problem.value.__cause__ is None


def test_r37_broken_connections() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        with fetcher(**LOCAL) as fetch, pytest.raises(FetchError, match="no connection"):
            fetch.get(f"http://127.0.0.1:{port}/")
    with fetcher(resolve=lambda *_: []) as fetch, pytest.raises(FetchError, match="does not resolve"):
        fetch.get("http://example.org/")


def test_r37_garbage_instead_of_http(server: Server) -> None:
    server.answer = lambda handler: handler.wfile.write(b"canary canary\r\n\r\n")
    with fetcher(**LOCAL) as fetch, pytest.raises(FetchError) as problem:
        fetch.get(server.url)
    assert "canary" not in str(problem.value)
    with fetcher(**LOCAL) as fetch, pytest.raises(FetchError):
        fetch.get(server.url.replace("http", "https"))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://user:pw@h.org:8080/p/a.png?sig=1#f", "https://h.org:8080/p/a.png"),
        ("http://h.org", "http://h.org"),
        ("http://[::1", "the image address"),
    ],
)
def test_shown_holds_no_secrets(url: str, text: str) -> None:
    assert shown(url) == text


# -- local files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "set").mkdir(parents=True)
    (root / "set" / "a b.png").write_bytes(b"image")
    (root / "big.png").write_bytes(b"x" * 2000)
    (tmp_path / "outside.png").write_bytes(b"outside")
    (root / "inner").symlink_to(root / "set")
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "out").symlink_to(tmp_path)
    (root / "zero").symlink_to("/dev/zero")
    (root / "up").symlink_to("../..")
    (root / "devup").symlink_to("/dev/../etc")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("path", ["set/a b.png", "./set/a b.png", "inner/a b.png", "set//a b.png"])
def test_r38_files_below_the_root(root: Path, path: str) -> None:
    assert read_local_file(root, path, max_bytes=1000) == b"image"


@pytest.mark.parametrize(
    "path",
    [
        "", "../outside.png", "set/../../outside.png", "/etc/passwd", "out.png", "out/outside.png", "zero", "up/etc",
        "devup/passwd", "set/..", "..", ".", "~/a", "a\0b", "..\\outside.png", "set/../set/a b.png",
    ],
)  # fmt: skip
def test_r38_nothing_outside_of_the_root(root: Path, path: str) -> None:
    with pytest.raises(UrlError):
        read_local_file(root, path, max_bytes=1000)


@pytest.mark.parametrize("path", ["pipe", "set", "big.png", "loop"])
def test_r38_only_regular_files_of_fair_size(root: Path, path: str) -> None:
    with pytest.raises(FetchError):
        read_local_file(root, path, max_bytes=1000)


@pytest.mark.parametrize("path", ["nothing.png", "set/%2e%2e/%2e%2e/outside.png", "..%2foutside.png", "x" * 300])
def test_r38_names_that_are_not_there(root: Path, path: str) -> None:
    with pytest.raises((FileNotFoundError, FetchError)):
        read_local_file(root, path, max_bytes=1000)


def test_r38_a_link_that_appears_meanwhile_is_not_followed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = root / "set" / "a b.png"
    resolve = Path.resolve

    def swap(self: Path, strict: bool = False) -> Path:
        found = resolve(self, strict)
        if found == target:
            target.unlink()
            target.symlink_to(root.parent / "outside.png")
        return found

    monkeypatch.setattr(Path, "resolve", swap)
    with pytest.raises(FetchError):
        read_local_file(root, "set/a b.png", max_bytes=1000)


# -- data: addresses -------------------------------------------------------------------------------------------------


def test_data_urls() -> None:
    data = base64.b64encode(b"image").decode()
    assert decode_data_url(f"data:image/png;base64,{data}", max_bytes=5) == b"image"
    assert decode_data_url(f"data:image/svg+xml;charset=x;base64,{data.replace('=', '%3D')}", max_bytes=9) == b"image"


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png,abc",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,A!A=",
        "data:image/png;base64,A",
        "data:image/png;base64," + "A" * 4000,
        "data:image/png;base64,\ud800",
    ],
    ids=range(7),
)
def test_data_urls_of_another_form(url: str) -> None:
    with pytest.raises(UrlError):
        decode_data_url(url, max_bytes=1000)


@pytest.mark.parametrize("status", [429, 503])
def test_r20_a_busy_place_is_asked_again(server: Server, status: int) -> None:
    def busy_once(handler: BaseHTTPRequestHandler) -> None:
        (reply(status, b"", **{"Retry-After": "0"}) if len(server.seen) < 3 else ok(b"image"))(handler)

    server.answer = busy_once
    with fetcher(**LOCAL) as fetch:
        assert fetch.get(f"{server.url}/a.png") == b"image"
    assert len(server.seen) == 3


def test_r20_a_place_that_stays_busy_is_given_up(server: Server) -> None:
    server.answer = reply(503, b"", **{"Retry-After": "0"})
    with fetcher(**LOCAL) as fetch, pytest.raises(Refused):
        fetch.get(f"{server.url}/a.png")
    assert len(server.seen) == ATTEMPTS
    server.seen.clear()
    server.answer = reply(429, b"", **{"Retry-After": "60"})  # longer than the time limit
    with fetcher(timeout_s=1.0, **LOCAL) as fetch, pytest.raises(Refused):
        fetch.get(f"{server.url}/a.png")
    assert len(server.seen) == 1
