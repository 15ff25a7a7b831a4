"""The image of a task: from the memory of files, or fetched from where the platform says it is. Which addresses may
be reached at all is decided in backends/common/images.py.
"""

from __future__ import annotations

import base64
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import cachetools

from backends.common.http import BusyError, FetchError, RequestError, UrlError
from backends.common.images import Fetcher, Origin, Refused, decode_data_url, read_local_file
from backends.common.settings import Settings
from backends.label_studio.credentials import Credentials, is_personal_access_token
from backends.label_studio.projects import Project, Projects
from backends.label_studio.trace import Trace
from inter2former.segmenter import ImageInfo, KnownImage

FILES_BYTES = 256 * 2**20  # image files as they came; a click on a known image fetches nothing
FETCHES = 24  # at once; each holds a thread of the server, at worst as long as a fetch may take
FILES_TTL_S = 300.0  # after that a changed file behind the same address is seen
LOCAL_FILES_PATH = "/data/local-files/"
PLATFORM_PATHS = ("/data/", "/storage-data/", "/tasks/")
STORAGE_SCHEMES = ("s3://", "gs://", "azure-blob://", "azure_spi://")


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """The file of a task's image.

    data   its bytes, with the image's name when they were kept: nobody has to hash them again
    key    their place in the memory of files; None when they came in the request
    task   the task's name in errors and the log
    """

    data: bytes | KnownImage = dataclasses.field(repr=False)
    key: tuple[str, str, str] | None
    task: str


class TaskImages:
    """Fetches the images of tasks and remembers their files for a few minutes. Thread-safe."""

    def __init__(self, settings: Settings, projects: Projects, fetcher: Fetcher | None = None) -> None:
        self._projects = projects
        self._root = settings.local_files_root
        self._fetcher = fetcher or Fetcher(
            max_bytes=settings.max_download_mb * 2**20,
            timeout_s=settings.fetch_timeout_s,
            allow_private_hosts=settings.allow_private_hosts,
        )
        self._credentials = Credentials(self._fetcher)
        self._places = threading.BoundedSemaphore(FETCHES)
        self._lock = threading.Lock()
        self._files: cachetools.TTLCache[object, KnownImage] = cachetools.TTLCache(
            FILES_BYTES, FILES_TTL_S, getsizeof=lambda image: image.nbytes
        )

    def close(self) -> None:
        self._fetcher.close()

    def known(self, project: str, address: str) -> bytes | KnownImage | None:
        """The file, when it is there without asking anybody."""
        if _is_data(address):
            return decode_data_url(address, max_bytes=self._fetcher.max_bytes)
        key = self._key(project, address)
        with self._lock:
            return self._files.get(key)

    def get(self, project: str, task: Mapping[str, Any], address: str, trace: Trace) -> ImageFile:
        """What is behind an address of a task: from the memory of files, or fetched now.

        raises  UrlError, FetchError; BusyError at once when too many are being fetched
        """
        known, name = self.known(project, address), task_name(task)
        key = None if _is_data(address) else self._key(project, address)
        if known is not None:
            return ImageFile(known, key, name)
        if not self._places.acquire(blocking=False):
            raise BusyError("Too many images are being fetched.", "Try again in a moment.")
        try:
            with trace.stage("fetch"):
                return ImageFile(self._fetch(task, address, self._projects.get(project)), key, name)
        except (UrlError, FetchError) as error:
            raise _named(name, error) from None
        finally:
            self._places.release()

    def keep(self, file: ImageFile, info: ImageInfo) -> None:
        """Remember a file that turned out to be an image, from when it was first seen."""
        if file.key is None or isinstance(file.data, KnownImage):
            return
        with self._lock:
            if file.key not in self._files and len(file.data) <= self._files.maxsize:
                self._files[file.key] = KnownImage(info, file.data)

    def forget(self, project: str, address: str) -> None:
        with self._lock:
            self._files.pop(self._key(project, address), None)

    def from_platform(self, project: Project, path: str) -> bytes:
        """What the platform itself answers to a GET. Raises FetchError, UrlError."""
        return self._get(project.platform.url + path, project)

    def _key(self, project: str, address: str) -> tuple[str, str, str]:
        known = self._projects.get(project)
        return (known.platform.url if known else "", project, address)

    def _fetch(self, task: Mapping[str, Any], address: str, project: Project | None) -> bytes:
        address = _at_home(address, project)
        local = self._local(address, project)
        if local is not None:
            return local
        if address.lower().startswith(("http://", "https://")):
            return self._get(address, project)
        if project is None:
            raise FetchError(
                "The address of Label Studio is not known.",
                "Set LABEL_STUDIO_URL, or open the labeling page again, which makes Label Studio introduce itself.",
            )
        if address.lower().startswith(STORAGE_SCHEMES):
            number = task.get("id")
            if isinstance(number, bool) or not isinstance(number, int | str) or not str(number)[:20].isdecimal():
                raise RequestError("The task has no number, which is needed to read from its storage.")
            uri = base64.urlsafe_b64encode(address.encode("utf-8", "surrogatepass")).decode("ascii")
            return self._get(f"{project.platform.url}/tasks/{quote(str(number))}/presign/?fileuri={uri}", project)
        if address.startswith("/") and not address.startswith(("//", "/\\")):
            return self._get(_join(project.platform.url, address), project)
        kind = address.split(":", 1)[0] if ":" in address[:40] else "no kind"
        raise UrlError(f"Image addresses of {kind[:20]!r} are not fetched.", "Use http, https, or a platform's own.")

    def _get(self, url: str, project: Project | None) -> bytes:
        url = url.replace(" ", "%20")  # as browsers do, so the page shows such an image
        platform = project.platform if project else None
        if project is None or platform is None or Origin.of(url) != platform.origin:
            return self._fetcher.get(url, platform=platform)
        headers = self._credentials.headers(platform, project.token)
        try:
            try:
                return self._fetcher.get(url, platform=platform, credentials=headers)
            except Refused as error:
                if error.status != 401 or not self._credentials.forget(platform, project.token, headers):
                    raise
            return self._fetcher.get(
                url, platform=platform, credentials=self._credentials.headers(platform, project.token)
            )
        except Refused as error:
            if error.status in (401, 403):
                raise Refused(f"{error.message} {_token_hint(project.token)}", error.status) from None
            raise

    def _local(self, address: str, project: Project | None) -> bytes | None:
        """The file behind a local-files address, when the folder is shared with us and has it; None: ask over HTTP."""
        root = self._root
        if root is None:
            return None
        try:
            parts = urlsplit(address)
            if parts.scheme and (project is None or Origin.of(address) != project.platform.origin):
                return None
            prefix = urlsplit(project.platform.url).path if project else ""
            if parts.path not in (LOCAL_FILES_PATH, prefix + LOCAL_FILES_PATH) or (parts.netloc and not parts.scheme):
                return None
            named = parse_qs(parts.query, max_num_fields=20).get("d", [""])[0]
        except ValueError:
            return None
        try:
            return read_local_file(root, named, max_bytes=self._fetcher.max_bytes)
        except FileNotFoundError:
            if project is None:
                raise FetchError("The local file does not exist in the shared folder.") from None
            return None


def task_name(task: Mapping[str, Any]) -> str:
    number = task.get("id")
    good = isinstance(number, int | str) and not isinstance(number, bool) and len(str(number)) <= 20
    return f"Task {number}" if good else "Task"


def _is_data(address: str) -> bool:
    return address[:5].lower() == "data:"


def _at_home(address: str, project: Project | None) -> str:
    """The address as a path of the platform, when it is one under the name that the platform calls itself."""
    if project is None or not project.known_as or not address.lower().startswith(("http://", "https://")):
        return address
    try:
        if Origin.of(address) != Origin.of(project.known_as):
            return address
        parts = urlsplit(address)
        path = parts.path.removeprefix(urlsplit(project.known_as).path)
    except (UrlError, ValueError):
        return address
    if not path.startswith(PLATFORM_PATHS):
        return address
    return path + (f"?{parts.query}" if parts.query else "")


def _join(base: str, path: str) -> str:
    """`path` on the platform; one that repeats the folder that the platform lives in is not doubled."""
    folder = urlsplit(base).path
    if folder and path.startswith(f"{folder}/"):
        base = base[: -len(folder)]
    return base + path


def _token_hint(token: str) -> str:
    if not token:
        return "No token is known: set LABEL_STUDIO_API_KEY to a personal access token."
    if is_personal_access_token(token):
        return "The personal access token in use may be revoked or may not see this project."
    return (
        "Legacy tokens are switched off in new organisations: set LABEL_STUDIO_API_KEY to a personal access token, "
        "or switch legacy tokens on in the organisation's settings."
    )


def _named(name: str, error: UrlError | FetchError) -> UrlError | FetchError:
    """The same error that says which task it is about."""
    text = f"{name}: {error.message}"
    return Refused(text, error.status) if isinstance(error, Refused) else type(error)(text, error.hint)
