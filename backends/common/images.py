"""Getting the bytes of an image from where a task says it is: HTTP, a local folder, a data: address. What may be
reached is decided here and nowhere else; decoding is the core's work, and what addresses a platform uses is the
platform's door's.

The URL policy:

- http and https only. Public addresses, hosts that the administrator listed, and the platform's own origin.
  Private, loopback, link-local, multicast, reserved and metadata addresses are refused, also inside of IPv6.
- A name is resolved once for a connection, every address it has is checked, and the connection is made to a checked
  address; TLS and the Host header keep the name. A name that changes its answer in between gains nothing.
- Every redirect is a new address and a new check, at most `MAX_REDIRECTS` times.
- Credentials go to the platform's origin (scheme, host and port) alone, and never after a redirect left it.
- Bytes are counted while they are read, and one deadline holds from the first look-up to the last byte.
- An error names the place without user, password, query or fragment, and never shows what the place answered.
"""

from __future__ import annotations

import base64
import binascii
import concurrent.futures
import dataclasses
import functools
import ipaddress
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import httpcore
import httpx

from backends.common.http import FetchError, FetchTimeoutError, UrlError
from backends.common.settings import EVERY_HOST

MAX_REDIRECTS = 3
ATTEMPTS = 4  # of a GET whose place says that it is busy (429, 503): storages limit how often they are asked
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 5.0  # doubled each time; the place's own Retry-After wins
MAX_URL_CHARS = 8192
_CHUNK_BYTES = 1 << 16
_DEFAULT_PORT = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?")
# What looks public and is not: the metadata services of Azure and of Oracle (with the rest of the range that IANA keeps
# for protocols), networks' own translators to IPv4, and site-local IPv6.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text) for text in ("168.63.129.16/32", "192.0.0.0/24", "64:ff9b:1::/48", "fec0::/10")
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Scheme, host (lower case, no brackets, no trailing dot) and port: what credentials belong to."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """UrlError for anything but a plain http or https address with a host."""
        if len(url) > MAX_URL_CHARS:
            raise UrlError(f"The image address has {len(url)} characters; at most {MAX_URL_CHARS} are allowed.")
        if any(ord(char) <= 32 or ord(char) == 127 or char == "\\" for char in url):
            raise UrlError("The image address has blanks, control characters or backslashes in it.")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise UrlError("The image address is not a URL.") from None
        scheme = parts.scheme.lower()
        if scheme not in _DEFAULT_PORT:
            raise UrlError(f"Image addresses of the kind {scheme[:20]!r} are not fetched.", "Use http or https.")
        if "@" in parts.netloc:
            raise UrlError("The image address holds a user name or password.", "Remove it.")
        if port == 0:
            raise UrlError("Port 0 cannot be connected to.")
        return cls(scheme, _host(parts.hostname or ""), port or _DEFAULT_PORT[scheme])


def _host(host: str) -> str:
    """The host, if it is a plain name or an address in its usual spelling. UrlError otherwise."""
    host = host.lower()
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host).compressed
        except ValueError:
            raise UrlError("The host of the image address is not an IPv6 address.") from None
    if not host.isascii():
        raise UrlError("The host of the image address is not ASCII.", "Write it in its xn-- form.")
    name = host.removesuffix(".")
    labels = name.split(".")
    if not name or len(name) > 253 or not all(len(label) < 64 and _LABEL.fullmatch(label) for label in labels):
        raise UrlError("The image address has no usable host name.")
    # Names that end in a number are addresses to a resolver, also as 0177.0.0.1, 2130706433 or 0x7f.1.
    if labels[-1].isdecimal() or re.fullmatch(r"0x[0-9a-f]*", labels[-1]):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise UrlError(
                "The host of the image address is a number, but not an IPv4 address in its usual form."
            ) from None
    return name


@dataclasses.dataclass(frozen=True)
class Platform:
    """The annotation platform itself: credentials go to its origin only.

    addresses   the IP addresses that it may have, private ones too; None: any, because the administrator named it
    """

    url: str
    addresses: frozenset[str] | None = frozenset()

    @property
    def origin(self) -> Origin:
        return Origin.of(self.url)


class Refused(FetchError):
    """The place answered with an HTTP status that is not 200; after how many seconds to try again, if it said so."""

    def __init__(self, message: str, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@functools.cache
def _tls() -> ssl.SSLContext:
    """The trusted certificates of certifi, or those that SSL_CERT_FILE or SSL_CERT_DIR name. Slow to read, so once."""
    return httpx.create_ssl_context()


def system_resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, as the operating system finds them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Fetches with the policy of this file. Thread-safe; keeps no connection open, so no check outlives its use.

    max_bytes            of a body
    timeout_s            for everything from the look-up to the last byte, redirects included
    allow_private_hosts  names, addresses or networks that may be private; `*` is every private or loopback address
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout_s: float,
        allow_private_hosts: Iterable[str] = (),
        resolve: Resolve = system_resolve,
    ) -> None:
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self._allowed = _Allowed(allow_private_hosts)
        self._resolve = resolve
        self._resolvers = concurrent.futures.ThreadPoolExecutor(8, thread_name_prefix="resolve")

    def close(self) -> None:
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    def get(self, url: str, *, platform: Platform | None = None, credentials: Mapping[str, str] | None = None) -> bytes:
        """The body behind a URL. Raises UrlError, FetchError (Refused with the status), FetchTimeoutError.

        A place that is busy (429, 503) is asked again, as long as the time limit allows.
        """
        deadline = time.monotonic() + self.timeout_s
        pause = FIRST_PAUSE_S
        for _ in range(ATTEMPTS - 1):
            try:
                return self._follow("GET", url, platform, credentials or {}, b"", {}, deadline)
            except Refused as error:
                wait = pause if error.retry_after_s is None else min(error.retry_after_s, MAX_PAUSE_S)
                if error.status not in (429, 503) or time.monotonic() + wait >= deadline:
                    raise
            time.sleep(wait)
            pause *= 2
        return self._follow("GET", url, platform, credentials or {}, b"", {}, deadline)

    def post_json(self, url: str, body: bytes, *, platform: Platform) -> bytes:
        """POST to the platform's own origin; redirects are not followed."""
        if Origin.of(url) != platform.origin:
            raise UrlError(f"{shown(url)} is not on the platform's own address.")
        deadline = time.monotonic() + self.timeout_s
        return self._follow("POST", url, platform, {}, body, {"Content-Type": "application/json"}, deadline)

    def _follow(
        self,
        method: str,
        url: str,
        platform: Platform | None,
        credentials: Mapping[str, str],
        body: bytes,
        headers: Mapping[str, str],
        deadline: float,
    ) -> bytes:
        at_home = True
        for _ in range(MAX_REDIRECTS + 1):
            origin = Origin.of(url)
            at_home = at_home and platform is not None and origin == platform.origin
            sent = {**headers, **credentials} if at_home else headers
            answer = self._once(method, url, origin, platform, sent, body, deadline)
            if isinstance(answer, bytes):
                return answer
            if method != "GET":
                raise FetchError(f"{shown(url)} redirects a {method}.")
            url = urljoin(url, answer.location)
        raise FetchError(f"{shown(url)} is behind more than {MAX_REDIRECTS} redirects.")

    def _once(
        self,
        method: str,
        url: str,
        origin: Origin,
        platform: Platform | None,
        headers: Mapping[str, str],
        body: bytes,
        deadline: float,
    ) -> bytes | _Redirect:
        backend = _CheckedBackend(self, origin, platform, deadline)
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        port = "" if origin.port == _DEFAULT_PORT[origin.scheme] else f":{origin.port}"
        parts = urlsplit(url)
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]{}|^`") if parts.query else ""
        request_headers = {
            "Host": host + port,
            "User-Agent": "inter2former",
            "Accept": "image/*, */*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **headers,
        }
        if body:
            request_headers["Content-Length"] = str(len(body))
        target = httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=path + query)
        left = max(deadline - time.monotonic(), 0.001)
        extensions = {"timeout": {"connect": left, "read": left, "write": left, "pool": left}}
        place = shown(url)
        try:
            with (
                httpcore.ConnectionPool(
                    ssl_context=_tls(), max_connections=1, max_keepalive_connections=0, network_backend=backend
                ) as pool,
                pool.stream(
                    method,
                    target,
                    headers=list(request_headers.items()),
                    content=body or None,
                    extensions=extensions,
                ) as response,
            ):
                return self._read(response, place)
        except httpcore.TimeoutException:
            raise FetchTimeoutError(f"{place} did not answer within {self.timeout_s:g} seconds.") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError) as error:
            raise FetchError(f"{place} could not be read: {_cause(error)}.") from None

    def _read(self, response: httpcore.Response, place: str) -> bytes | _Redirect:
        header = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in _REDIRECTS and "location" in header:
            return _Redirect(header["location"])
        if response.status != 200:
            after = header.get("retry-after", "")
            retry_after = float(after) if after.isdecimal() and len(after) < 6 else None
            raise Refused(f"{place} answered HTTP {response.status}.", response.status, retry_after)
        if header.get("content-encoding", "identity").lower() != "identity":
            raise FetchError(f"{place} sent a compressed answer that was not asked for.")
        if header.get("content-type", "").lower().startswith("text/html"):
            raise FetchError(f"{place} sent a web page instead of an image; is it a login page?")
        length = header.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise FetchError(f"{place} has {length[:20]} bytes; at most {self.max_bytes} are fetched.")
        body = bytearray()
        for chunk in response.iter_stream():
            body += chunk
            if len(body) > self.max_bytes:
                raise FetchError(f"{place} has more than {self.max_bytes} bytes, the limit for an image.")
        return bytes(body)

    def checked_addresses(self, origin: Origin, platform: Platform | None, timeout_s: float) -> list[str]:
        """The addresses to connect to, all of them checked. One that is refused refuses the name."""
        try:
            ipaddress.ip_address(origin.host)
            found: Sequence[str] = [origin.host]
        except ValueError:
            future = self._resolvers.submit(self._resolve, origin.host, origin.port)
            try:
                found = future.result(timeout_s)
            except concurrent.futures.TimeoutError:
                raise FetchTimeoutError(f"The name {origin.host} was not resolved in time.") from None
            except (OSError, UnicodeError):
                raise FetchError(f"The name {origin.host} does not resolve.") from None
        if not found:
            raise FetchError(f"The name {origin.host} does not resolve.")
        for address in found:
            self._check(origin, address, platform)
        return list(found)

    def _check(self, origin: Origin, address: str, platform: Platform | None) -> None:
        ip = _unwrapped(address)
        if (
            platform is not None
            and origin == platform.origin
            and (platform.addresses is None or str(ip) in platform.addresses)
        ):
            return
        if not (_is_public(ip) or self._allowed.covers(origin.host, ip)):
            raise UrlError(
                f"The host {origin.host} has a private or reserved address, from which nothing is fetched.",
                "If it is your platform, set its address (LABEL_STUDIO_URL); if it is your storage, list it in "
                "I2F_ALLOW_PRIVATE_HOSTS.",
            )


@dataclasses.dataclass(frozen=True)
class _Redirect:
    location: str


class _Allowed:
    """The private hosts that an administrator listed."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self._every = False
        for host in hosts:
            text = host.strip().lower().strip("[]").removesuffix(".")
            if text == EVERY_HOST:
                self._every = True
                continue
            try:
                self._networks.append(ipaddress.ip_network(text))
            except ValueError:
                self._names.add(text)

    def covers(self, host: str, ip: IpAddress) -> bool:
        if host in self._names or any(ip in network for network in self._networks):
            return True
        # Link-local is where clouds put their metadata: it has to be listed by itself.
        return self._every and (ip.is_private or ip.is_loopback) and not (ip.is_link_local or ip.is_multicast)


def _unwrapped(address: str) -> IpAddress:
    """The address itself; of an IPv6 address that carries an IPv4 one, the IPv4 address that is reached."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip.sixtofour is not None:
            return ip.sixtofour
        if ip in _NAT64 or (int(ip) >> 32 == 0 and int(ip) > 1):
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def _is_public(ip: IpAddress) -> bool:
    if isinstance(ip, ipaddress.IPv6Address) and ip.teredo is not None:
        return False
    return (
        ip.is_global
        and not ip.is_multicast
        and not ip.is_reserved
        and not any(ip in network for network in _NOT_PUBLIC)
    )


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to checked addresses only, and lets nothing outlive the deadline."""

    def __init__(self, fetcher: Fetcher, origin: Origin, platform: Platform | None, deadline: float) -> None:
        self._fetcher, self._origin, self._platform, self._deadline = fetcher, origin, platform, deadline
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = self._fetcher.checked_addresses(self._origin, self._platform, _left(self._deadline))
        for position, address in enumerate(addresses):
            # Every address gets a fair part of the time: one that is silent must not take it from the next.
            part = _left(self._deadline) / (len(addresses) - position)
            try:
                stream = self._sockets.connect_tcp(address, port, part, local_address, socket_options)
                return _DeadlineStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if position == len(addresses) - 1:
                    raise
        raise httpcore.ConnectError("no address")


class _DeadlineStream(httpcore.NetworkStream):
    """A stream whose every operation ends at one deadline, however slowly the other side drips."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(min(max_bytes, _CHUNK_BYTES), _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _DeadlineStream(
            self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the deadline has passed")
    return left


def _cause(error: Exception) -> str:
    """A few words on a failed connection; never what the other side sent."""
    if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE" in str(error):
        return "its certificate is not trusted"
    if isinstance(error, httpcore.ConnectError):
        return "no connection"
    return "the connection broke off"


def shown(url: str) -> str:
    """A URL for people: no user, password, query or fragment, which may be secrets; shortened."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "the image address"
    host = f"[{host}]" if ":" in host else host
    text = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable if len(printable) <= 200 else printable[:197] + "..."


def decode_data_url(url: str, *, max_bytes: int) -> bytes:
    """The bytes of `data:image/...;base64,...`. UrlError for another form or too many bytes."""
    head, comma, data = url.partition(",")
    kind = head.removeprefix("data:").lower()
    if not comma or not kind.startswith("image/") or not kind.endswith(";base64"):
        raise UrlError("A data: address has to be data:image/...;base64,...")
    if len(data) > max_bytes * 4 // 3 + 4:
        raise UrlError(f"The data: address holds more than {max_bytes} bytes, the limit for an image.")
    try:
        return base64.b64decode(unquote_to_bytes(data), validate=True)
    except (binascii.Error, ValueError):
        raise UrlError("The data: address is not base64.") from None


def read_local_file(root: Path, relative: str, *, max_bytes: int) -> bytes:
    """The bytes of a regular file below `root`.

    Links are followed as long as they end below `root`. The file is then opened part by part without following
    anything, so that a link that is put in place meanwhile is not followed either.

    raises  UrlError for a path that leaves the root or is not a plain path; FileNotFoundError when there is no such
            file; FetchError when it cannot be read, is no regular file, or is too large
    """
    if not relative or "\0" in relative or relative.startswith(("/", "~")) or "\\" in relative:
        raise UrlError("A local file is named by a path relative to the shared folder.")
    if ".." in relative.split("/"):
        raise UrlError("The path of a local file must not contain '..'.")
    try:
        root = root.resolve()
        found = (root / relative).resolve()
    except (OSError, RuntimeError, ValueError):
        raise FetchError("The local file cannot be read.") from None
    if not found.is_relative_to(root) or found == root:
        raise UrlError("The path of the local file leads out of the shared folder.")
    *folders, name = found.relative_to(root).parts
    opened: list[int] = []
    try:
        opened.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY))
        for folder in folders:
            opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1])
        opened.append(file)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise FetchError("The local file is not a regular file.")
        if status.st_size > max_bytes:
            raise FetchError(f"The local file has {status.st_size} bytes; at most {max_bytes} are read.")
        with os.fdopen(os.dup(file), "rb") as reader:
            data = reader.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError:
        raise FetchError("The local file cannot be read.") from None
    finally:
        for descriptor in opened:
            os.close(descriptor)
    if len(data) > max_bytes:
        raise FetchError(f"The local file has more than {max_bytes} bytes.")
    return data
