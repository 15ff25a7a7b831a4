"""Which platform a project is on, with which token its images are read, and who is believed about it."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import threading

import cachetools

from backends.common.http import UrlError
from backends.common.images import Origin, Platform
from backends.common.settings import Settings
from backends.label_studio import contract

PROJECTS = 1000

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Project:
    """The platform of a project and the token to read its images with.

    known_as    the address that the platform calls itself, when images are read from another one: people and tasks
                use the public address, a backend in the same network may not reach it
    """

    platform: Platform
    token: str = dataclasses.field(repr=False)
    known_as: str = ""


class Projects:
    """The platforms of projects: the configured one, else what their /setup said. Thread-safe, bounded."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._known: cachetools.LRUCache[str, Project] = cachetools.LRUCache(PROJECTS)
        self._warned: cachetools.LRUCache[tuple[str, str], bool] = cachetools.LRUCache(PROJECTS)

    def learn(self, setup: contract.Setup, peer: str, proven: bool) -> None:
        """Keep what a /setup says, as far as it can be believed; `peer` and `proven` as in `Backend.setup`."""
        project = self._believed(setup, peer, proven)
        if project is not None:
            with self._lock:
                self._known[setup.project] = project

    def get(self, name: str) -> Project | None:
        with self._lock:
            known = self._known.get(name)
        return known or self._configured("")

    def warn(self, about: str, project: str, warnings: tuple[str, ...]) -> None:
        """One line for each new warning of a project."""
        for warning in dict.fromkeys(warnings):
            with self._lock:
                new = (project, warning) not in self._warned
                self._warned[project, warning] = True
            if new:
                log.warning("project %s, %s: %s", project[:40] or "?", about, warning)

    def _believed(self, setup: contract.Setup, peer: str, proven: bool) -> Project | None:
        """Anybody who reaches our port can send a /setup.

        - A configured address wins, and only it gets the configured key, unless the caller has shown the password of
          the backend or runs on this machine.
        - Otherwise images are read from the stated host with the token that came along, but from a private address
          only when it is the caller's own.
        """
        url = setup.hostname.strip().rstrip("/")
        configured = self._configured(setup.access_token)
        if configured is not None:
            return dataclasses.replace(configured, known_as=url)
        if not url:
            return None
        try:
            Origin.of(url)
        except UrlError as error:
            self.warn("hostname", setup.project, (f"The hostname that Label Studio sends is of no use: {error}",))
            return None
        own = _own_addresses(peer)
        token = setup.access_token
        key = self._settings.label_studio_api_key
        if key is not None and (proven or "127.0.0.1" in own):
            token = key.get_secret_value()
        return Project(Platform(url, None if proven else own), token)

    def _configured(self, token: str) -> Project | None:
        url = self._settings.label_studio_url
        if url is None:
            return None
        key = self._settings.label_studio_api_key
        return Project(Platform(url, None), key.get_secret_value() if key is not None else token)


def _own_addresses(peer: str) -> frozenset[str]:
    try:
        ip = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return frozenset()
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    ip = mapped or ip
    return frozenset({"127.0.0.1", "::1"}) if ip.is_loopback else frozenset({str(ip)})
