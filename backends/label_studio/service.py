"""What the Label Studio backend does: where contract, image fetching, credentials and the segmenter meet. It knows no
HTTP server; app.py hands it JSON and writes down what it returns.

What is remembered, all of it bounded: image files for a few minutes, the platform's address and token of each project
from /setup, and the polarity of clicks by region id (polarity.py). None of it is needed: a mask depends on the request
and the image alone, but for polarity.

Two lines of work: clicks on images that are known, and encodes of images that are not, so that nobody who is clicking
waits for somebody else's new image. In the line of encodes those that somebody waits for go first, then what is
encoded ahead.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import ipaddress
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import parse_qs, quote, urlsplit

import cachetools
import numpy as np

from backends.common.http import FetchError, RequestError, UrlError
from backends.common.images import (
    Fetcher,
    Origin,
    Platform,
    Refused,
    decode_data_url,
    read_local_file,
)
from backends.common.metrics import Metrics
from backends.common.server import Admission, Ticket
from backends.common.settings import Settings
from backends.label_studio import contract
from backends.label_studio.credentials import Credentials, is_personal_access_token
from backends.label_studio.polarity import Polarities
from inter2former.errors import ImageError, Inter2FormerError
from inter2former.segmenter import KnownImage, Segmentation, Segmenter

DOOR = "label_studio"
FILES_BYTES = 256 * 2**20  # image files as they came; a click on a known image fetches nothing
FILES_TTL_S = 300.0  # after that a changed file behind the same address is seen
PROJECTS = 1000
OBJECTS = 5000  # that are being clicked on; for the order of the line and the counters
# A page shows only the answer to its newest request. Older ones that still wait go behind the others, and when as many
# as this wait behind them, they are answered with nothing.
DROP_SUPERSEDED = 8
SUPERSEDED, AHEAD = 1, 2  # urgencies; a click that somebody waits for has 0
AHEAD_WAIT_S = 600.0
AHEAD_WAITING = 64  # tasks to be encoded ahead; further ones are forgotten
BATCH_S = 80.0  # Label Studio waits 100 s for a batch
LOCAL_FILES_PATH = "/data/local-files/"
PLATFORM_PATHS = ("/data/", "/storage-data/", "/tasks/")
STORAGE_SCHEMES = ("s3://", "gs://", "azure-blob://", "azure_spi://")

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


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """The bytes of a task's image. `key` is their place in the memory of files; None when they came in the request."""

    data: bytes = dataclasses.field(repr=False)
    key: tuple[str, str, str] | None


@dataclasses.dataclass
class _Object:
    """An object that is being clicked on: what was asked last, and the place in the line of that request."""

    ids: tuple[str, ...]
    ticket: Ticket


@dataclasses.dataclass
class Trace:
    """What happened in one request, for its log line and its reply."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    image_key: str = ""
    note: str = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


class Backend:
    """Answers Label Studio's calls with one segmenter. Thread-safe.

    places   clicks that may be in work or waiting; the server needs more threads than that, so that /health and
             /setup are answered meanwhile
    """

    def __init__(
        self,
        segmenter: Segmenter,
        settings: Settings,
        *,
        metrics: Metrics | None = None,
        fetcher: Fetcher | None = None,
        places: int = 24,
        wait_s: float = 60.0,
    ) -> None:
        self.segmenter = segmenter
        self.metrics = metrics or Metrics(DOOR, segmenter)
        self._settings = settings
        self._fetcher = fetcher or Fetcher(
            max_bytes=settings.max_download_mb * 2**20,
            timeout_s=settings.fetch_timeout_s,
            allow_private_hosts=settings.allow_private_hosts,
        )
        self._credentials = Credentials(self._fetcher)
        self._admission = Admission(running=1, waiting=places - 1, wait_s=wait_s)  # of clicks
        self._encodes = Admission(running=1, waiting=places - 1, wait_s=wait_s)
        self._polarity = Polarities(settings.memory_file)
        self._lock = threading.Lock()  # of the memories below; nothing slow happens under it
        self._files: cachetools.TTLCache[object, bytes] = cachetools.TTLCache(FILES_BYTES, FILES_TTL_S, getsizeof=len)
        self._projects: cachetools.LRUCache[str, Project] = cachetools.LRUCache(PROJECTS)
        self._objects: cachetools.LRUCache[tuple[str, str, str], _Object] = cachetools.LRUCache(OBJECTS)
        self._warned: cachetools.LRUCache[tuple[str, str], bool] = cachetools.LRUCache(PROJECTS)
        self._ahead = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._ahead_places = threading.BoundedSemaphore(AHEAD_WAITING)

    @property
    def model_version(self) -> str:
        return f"inter2former-{self.segmenter.digest[:12] or 'unnamed'}"

    def close(self) -> None:
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._fetcher.close()
        self._polarity.close()

    # -- calls -------------------------------------------------------------------------------------------------------

    def setup(self, body: Any, *, peer: str, proven: bool) -> dict[str, Any]:
        """Remembers where the platform of a project is. Answers at once, whatever the config says.

        peer     address of the caller when it is known to be the caller's own, else ""
        proven   whether the caller has shown the password of the backend
        """
        setup = contract.parse_setup(body)
        self._warn("config", setup.project, contract.parse_config(setup.label_config).warnings())
        project = self._project_of(setup, peer, proven)
        if project is not None:
            with self._lock:
                self._projects[setup.project] = project
        return {"model_version": self.model_version}

    def predict(self, body: Any, trace: Trace | None = None) -> dict[str, Any]:
        """{"results": [...]}, one entry a task, in order. Raises Inter2FormerError."""
        trace = trace if trace is not None else Trace()
        request = contract.parse_predict(body)
        nothing = contract.prediction([], 0.0, self.model_version)
        if request.event != "predict":
            return {"results": [self._event(request) or nothing]}
        interaction = contract.read_context(request.context)
        if interaction is None:
            if request.context:  # nothing in it is a prompt
                return {"results": [nothing]}
            if self._settings.batch == "prompts":
                with self._admission.place():
                    return {"results": [answer or nothing for answer in self._batch(request, trace)]}
            if len(request.tasks) == 1:  # somebody has opened this task: a click will follow
                self._encode_ahead(request, request.tasks[0])
                self._encode_next(request)
            return {"results": [nothing for _ in request.tasks]}
        with self._admission.place(), self.metrics.queue.track_inprogress():
            answer = self._click(request, interaction, trace)
        self.metrics.stages(trace.seconds)
        return {"results": [answer or nothing]}

    def _event(self, request: contract.PredictRequest) -> dict[str, Any] | None:
        """The prediction that answers what newer pages ask for beside masks; None for what we do not know."""
        config = contract.parse_config(request.label_config)
        if request.event == "capabilities":
            return contract.prediction([contract.capabilities(self.model_version)], 0.0, self.model_version)
        if len(request.tasks) != 1:
            return None
        if request.event == "prewarm":
            ready = self._is_encoded(request, request.tasks[0], config)
            if not ready and request.wait:
                with self._admission.place():
                    self._encode(request, request.tasks[0])
                ready = True
            elif not ready:
                self._encode_ahead(request, request.tasks[0])
            value = {"status": "ok", "cached": [0] if ready else [], "pending": [] if ready else [0]}
        elif request.event == "release":
            self._forget_file(request, request.tasks[0], config)
            value = {"status": "released"}
        else:
            return None
        event: Literal["prewarm", "release"] = "prewarm" if request.event == "prewarm" else "release"
        return contract.prediction([contract.acknowledgement(event, config, value)], 0.0, self.model_version)

    # -- a click -----------------------------------------------------------------------------------------------------

    def _click(
        self, request: contract.PredictRequest, interaction: contract.Interaction, trace: Trace
    ) -> dict[str, Any] | None:
        """The prediction, or None for nothing to say."""
        config = contract.parse_config(request.label_config)
        control = config.mask_control(interaction.to_name)
        polarity = self._polarities(request, interaction)
        ticket = self._enter(request, interaction)
        if control is None:
            self._warn("config", request.project, (*config.warnings(), f"No mask control for {interaction.to_name!r}."))
            return None
        existing = self._correctable(request.tasks[0], control, interaction)
        if not (interaction.rectangles or interaction.strokes or existing or any(polarity.values())):
            return None  # negative clicks alone
        answer = self._answer(request, request.tasks[0], interaction, control, polarity, existing, ticket, trace)
        if answer is None or not answer["result"]:
            return None
        return answer

    def _answer(
        self,
        request: contract.PredictRequest,
        task: Mapping[str, Any],
        interaction: contract.Interaction,
        control: contract.Control,
        polarity: Mapping[contract.Point, bool],
        existing: Sequence[contract.Existing],
        ticket: Ticket,
        trace: Trace,
        *,
        keep_strokes: bool = True,
    ) -> dict[str, Any] | None:
        """Image, masks and regions of an interaction; None when the answer is not wanted any more.

        keep_strokes   what a person painted just now is inside; a finished mask is only where the model starts from
        """
        config = contract.parse_config(request.label_config)
        file = self._image(request, task, contract.image_address(task, config, interaction), trace)
        name = _task_name(task)
        image = self._known(file, name, ticket, trace)
        info = image.info
        trace.image_key = info.key
        height, width = contract.shown_size(interaction, info.height, info.width)
        prompts = contract.prompts(interaction, info.height, info.width, polarity.__getitem__)
        corrected = None
        if existing:
            within = self._settings.correct_within / 100.0 * max(height, width)
            corrected = contract.nearest(existing, interaction.points[0], height, width, within)
        if corrected is not None:
            start = contract.resize_mask(corrected[1], info.height, info.width)
            prompts = tuple(dataclasses.replace(prompt, strokes=start) for prompt in prompts)
        answers: list[tuple[Segmentation, contract.Prompt]] = []
        with contextlib.ExitStack() as turn:
            with trace.stage("queue"):
                turn.enter_context(self._admission.turn(ticket))
            if ticket.urgency == SUPERSEDED and self._admission.waiting >= DROP_SUPERSEDED:
                trace.note = "superseded"
                return None
            for prompt in prompts:
                if prompt.says_something:
                    result = self.segmenter.segment(image, prompt.clicks, box=prompt.box, initial_mask=prompt.strokes)
                    answers.append((result, prompt))
                    trace.add(result.timing)
        with trace.stage("reply"):
            if (width, height) != (info.width, info.height):
                log.warning(
                    "%s: the page shows %d x %d pixels, the image has %d x %d; the mask is scaled",
                    name, width, height, info.width, info.height,
                )  # fmt: skip
            regions = []
            for result, prompt in answers:
                mask = _with_strokes(result.mask, prompt) if keep_strokes and corrected is None else result.mask
                regions += contract.regions(
                    contract.resize_mask(mask, height, width),
                    result.score,
                    control,
                    interaction,
                    region_id=corrected[0].region if corrected else None,
                    meta=contract.provenance(
                        prompt,
                        model_version=self.model_version,
                        model_size=result.model_size,
                        score=result.score,
                        corrects=corrected is not None,
                    ),
                    tolerance=self._settings.polygon_tolerance,
                )
        score = float(np.mean([result.score for result, _ in answers])) if answers else 0.0
        trace.note = (
            f"{len(interaction.points)} clicks, {len(interaction.rectangles)} rectangles, "
            f"{len(interaction.strokes)} strokes, {info.width} x {info.height} pixels, {len(regions)} regions"
        )
        return contract.prediction(regions, score, self.model_version)

    def _known(
        self, file: ImageFile, name: str, ticket: Ticket, trace: Trace, *, wait_s: float | None = None
    ) -> KnownImage:
        """The image with its name and, unless the cache is too small for it, its encoding."""
        try:
            if self.segmenter.is_encoded(file.data):
                with trace.stage("decode_image"):
                    return self.segmenter.known(file.data)
            with contextlib.ExitStack() as turn:
                with trace.stage("queue"):
                    turn.enter_context(self._encodes.turn(ticket, wait_s=wait_s))
                with trace.stage("decode_image"):
                    image = self.segmenter.known(file.data)
                self._keep(file)
                with trace.stage("encode"):
                    self.segmenter.prefetch(image)
            return image
        except ImageError as error:
            if file.key is None:
                raise
            raise FetchError(f"{name}: {error}") from None

    def _enter(self, request: contract.PredictRequest, interaction: contract.Interaction) -> Ticket:
        """A place in the line for a request; an older one about the same object steps back. Counts what people do."""
        ticket = Ticket()
        if not interaction.ids:
            return ticket
        key = (request.project, _task_name(request.tasks[0]), interaction.ids[0][:64])
        with self._lock:
            before = self._objects.get(key)
            self._objects[key] = _Object(interaction.ids, ticket)
        self.metrics.annotation("prompts")
        if before is None:
            self.metrics.annotation("objects")
        else:
            before.ticket.urgency = SUPERSEDED
            self.metrics.annotation("undone", len(set(before.ids) - set(interaction.ids)))
        return ticket

    def _correctable(
        self, task: Mapping[str, Any], control: contract.Control, interaction: contract.Interaction
    ) -> list[contract.Existing]:
        """The masks that clicks alone may be about, when clicks near a mask are to correct it."""
        if not self._settings.correct_within or interaction.rectangles or interaction.strokes:
            return []
        return contract.existing_masks(task, control, interaction)

    def _polarities(
        self, request: contract.PredictRequest, interaction: contract.Interaction
    ) -> dict[contract.Point, bool]:
        """What the page says, else what was said before, else what the task's drafts say, else positive."""
        project = self._project(request.project)
        platform = project.platform.url if project else ""
        task = str(request.tasks[0].get("id"))[:40]
        saved: dict[str, bool] | None = None
        known: dict[contract.Point, bool] = {}
        for point in interaction.points:
            key = (platform, request.project[:80], task, point.region[:64])
            positive = point.positive
            if point.region:
                if positive is not None:
                    self._polarity.set(key, positive)
                else:
                    # What was said before the platform introduced itself stands under no platform.
                    positive = self._polarity.get(key)
                    positive = self._polarity.get(("", *key[1:])) if positive is None else positive
            if positive is None:
                if saved is None:
                    saved = contract.polarities(request.tasks[0])
                positive = saved.get(point.region, True)
            known[point] = positive
        return known

    # -- many tasks --------------------------------------------------------------------------------------------------

    def _batch(self, request: contract.PredictRequest, trace: Trace) -> Iterator[dict[str, Any] | None]:
        """For each task the masks of what it already points at; None for nothing. What is wrong is only logged."""
        end = time.monotonic() + BATCH_S
        config = contract.parse_config(request.label_config)
        late = 0
        for task in request.tasks:
            if time.monotonic() > end:
                late += 1
                yield None
                continue
            try:
                yield self._masks_of(request, task, config, trace)
            except Inter2FormerError as error:
                log.warning("%s: no masks: %s", _task_name(task), error)
                yield None
        if late:
            log.warning("%d of %d tasks got no masks in %g seconds: choose fewer", late, len(request.tasks), BATCH_S)

    def _masks_of(
        self, request: contract.PredictRequest, task: Mapping[str, Any], config: contract.LabelConfig, trace: Trace
    ) -> dict[str, Any] | None:
        regions: list[dict[str, Any]] = []
        scores: list[float] = []
        for interaction in contract.objects_of_task(task, config, self.model_version):
            control = config.mask_control(interaction.to_name)
            if control is None:
                continue
            polarity = {point: point.positive is not False for point in interaction.points}
            ticket = Ticket(AHEAD)
            answer = self._answer(request, task, interaction, control, polarity, (), ticket, trace, keep_strokes=False)
            if answer is not None and answer["result"]:
                regions += answer["result"]
                scores.append(answer["score"])
        return contract.prediction(regions, float(np.mean(scores)), self.model_version) if regions else None

    # -- ahead -------------------------------------------------------------------------------------------------------

    def _encode_ahead(self, request: contract.PredictRequest, task: Mapping[str, Any]) -> None:
        """Fetch and encode the image of a task in the background."""
        self._in_background(lambda: self._encode(request, task))

    def _encode(self, request: contract.PredictRequest, task: Mapping[str, Any]) -> None:
        """Fetch and encode the first image of a task, when nobody waits for another one."""
        config = contract.parse_config(request.label_config)
        file = self._image(request, task, contract.image_address(task, config), Trace())
        self._known(file, _task_name(task), Ticket(AHEAD), Trace(), wait_s=AHEAD_WAIT_S)
        self._keep(file)

    def _encode_next(self, request: contract.PredictRequest) -> None:
        """The same for the tasks that the platform shows after this one."""
        count, project = self._settings.ahead_tasks, self._project(request.project)
        number = request.tasks[0].get("id")
        if not count or project is None or isinstance(number, bool) or not isinstance(number, int):
            return

        def work() -> None:
            for task in self._tasks_after(project, request.project, number, count):
                self._encode_ahead(request, task)

        self._in_background(work)

    def _tasks_after(self, project: Project, name: str, number: int, count: int) -> list[Mapping[str, Any]]:
        """The next tasks of a project by number, as the platform lists them."""
        identifier = name.partition(".")[0]
        if not identifier.isdecimal():
            return []
        later = {"filter": "filter:tasks:id", "operator": "greater", "value": number, "type": "Number"}
        query = json.dumps({"filters": {"conjunction": "and", "items": [later]}, "ordering": ["tasks:id"]})
        url = f"{project.platform.url}/api/tasks?project={identifier}&page_size={count}&query={quote(query)}"
        try:
            listed = json.loads(self._get(url, project))
        except ValueError:
            raise FetchError("The platform's list of tasks is not JSON.") from None
        tasks = listed.get("tasks") if isinstance(listed, dict) else None
        return [task for task in tasks[:count] if isinstance(task, dict)] if isinstance(tasks, list) else []

    def _in_background(self, work: Callable[[], None]) -> None:
        """Once there is time; what goes wrong is only logged, and what does not fit in line is forgotten."""
        if not self._ahead_places.acquire(blocking=False):
            return

        def run() -> None:
            try:
                work()
            except Inter2FormerError as error:
                log.info("not encoded ahead: %s", error)
            except Exception:
                log.exception("encoding ahead failed")
            finally:
                self._ahead_places.release()

        try:
            self._ahead.submit(run)
        except RuntimeError:  # shutting down
            self._ahead_places.release()

    def _is_encoded(
        self, request: contract.PredictRequest, task: Mapping[str, Any], config: contract.LabelConfig
    ) -> bool:
        """Whether a click on the task's first image would wait for nothing."""
        address = contract.image_address(task, config)
        if address[:5].lower() == "data:":
            return self.segmenter.is_encoded(decode_data_url(address, max_bytes=self._fetcher.max_bytes))
        key = self._file_key(request, address)
        with self._lock:
            data = self._files.get(key)
        return data is not None and self.segmenter.is_encoded(data)

    def _forget_file(
        self, request: contract.PredictRequest, task: Mapping[str, Any], config: contract.LabelConfig
    ) -> None:
        key = self._file_key(request, contract.image_address(task, config))
        with self._lock:
            self._files.pop(key, None)

    # -- images ------------------------------------------------------------------------------------------------------

    def _file_key(self, request: contract.PredictRequest, address: str) -> tuple[str, str, str]:
        project = self._project(request.project)
        return (project.platform.url if project else "", request.project, address)

    def _image(
        self, request: contract.PredictRequest, task: Mapping[str, Any], address: str, trace: Trace
    ) -> ImageFile:
        """What is behind an address of a task: from the memory of files, or fetched now."""
        if address[:5].lower() == "data:":
            return ImageFile(decode_data_url(address, max_bytes=self._fetcher.max_bytes), None)
        project = self._project(request.project)
        key = self._file_key(request, address)
        with self._lock:
            known = self._files.get(key)
        if known is not None:
            return ImageFile(known, key)
        name = _task_name(task)
        try:
            with trace.stage("fetch"):
                return ImageFile(self._fetch(task, address, project), key)
        except (UrlError, FetchError) as error:
            raise _named(name, error) from None

    def _keep(self, file: ImageFile) -> None:
        """Remember a file that turned out to be an image, from when it was first seen."""
        with self._lock:
            if file.key is not None and file.key not in self._files and len(file.data) <= self._files.maxsize:
                self._files[file.key] = file.data

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
        root = self._settings.local_files_root
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

    # -- platforms ---------------------------------------------------------------------------------------------------

    def _project_of(self, setup: contract.Setup, peer: str, proven: bool) -> Project | None:
        """What /setup says, as far as it can be believed: anybody who reaches our port can send one.

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
            self._warn("hostname", setup.project, (f"The hostname that Label Studio sends is of no use: {error}",))
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

    def _project(self, name: str) -> Project | None:
        with self._lock:
            known = self._projects.get(name)
        return known or self._configured("")

    def _warn(self, about: str, project: str, warnings: tuple[str, ...]) -> None:
        """One line for each new warning of a project."""
        for warning in dict.fromkeys(warnings):
            with self._lock:
                new = (project, warning) not in self._warned
                self._warned[project, warning] = True
            if new:
                log.warning("project %s, %s: %s", project[:40] or "?", about, warning)


def _with_strokes(mask: Any, prompt: contract.Prompt) -> Any:
    """What was painted is inside, but for pixels of negative clicks."""
    if prompt.strokes is None:
        return mask
    both = mask | prompt.strokes
    for click in prompt.clicks:
        if not click.positive:
            row, column = click.pixel(*both.shape)
            both[row, column] = mask[row, column]
    return both


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


def _own_addresses(peer: str) -> frozenset[str]:
    try:
        ip = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return frozenset()
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    ip = mapped or ip
    return frozenset({"127.0.0.1", "::1"}) if ip.is_loopback else frozenset({str(ip)})


def _token_hint(token: str) -> str:
    if not token:
        return "No token is known: set LABEL_STUDIO_API_KEY to a personal access token."
    if is_personal_access_token(token):
        return "The personal access token in use may be revoked or may not see this project."
    return (
        "Legacy tokens are switched off in new organisations: set LABEL_STUDIO_API_KEY to a personal access token, "
        "or switch legacy tokens on in the organisation's settings."
    )


def _task_name(task: Mapping[str, Any]) -> str:
    number = task.get("id")
    good = isinstance(number, int | str) and not isinstance(number, bool) and len(str(number)) <= 20
    return f"Task {number}" if good else "Task"


def _named(name: str, error: UrlError | FetchError) -> UrlError | FetchError:
    """The same error that says which task it is about."""
    text = f"{name}: {error.message}"
    return Refused(text, error.status) if isinstance(error, Refused) else type(error)(text, error.hint)
