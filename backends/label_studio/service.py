"""What the Label Studio backend does: where contract, images, projects and the segmenter meet. It knows no HTTP server;
app.py hands it JSON and writes down what it returns.

What is remembered, all of it bounded: image files for a few minutes (images.py), the platform's address and token of
each project from /setup (projects.py), and the polarity of clicks by region id (polarity.py). None of it is needed: a
mask depends on the request and the image alone, but for polarity.

Two lines of work: clicks on images that are known, and encodes of images that are not, so that nobody who is clicking
waits for somebody else's new image. In the line of encodes those that somebody waits for go first, then what is
encoded ahead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

import cachetools
import numpy as np

from backends.common.http import FetchError
from backends.common.images import Fetcher
from backends.common.metrics import Metrics
from backends.common.server import Admission, Ticket
from backends.common.settings import Settings
from backends.label_studio import contract
from backends.label_studio.ahead import Ahead
from backends.label_studio.images import FETCHES, ImageFile, TaskImages, task_name
from backends.label_studio.polarity import Polarities
from backends.label_studio.projects import Project, Projects
from backends.label_studio.trace import Trace
from inter2former.errors import ImageError, Inter2FormerError
from inter2former.runtime import native
from inter2former.segmenter import KnownImage, Segmentation, Segmenter

DOOR = "label_studio"
PLACES = 24  # clicks that may be in the line, the one included that is answered next
AT_ONCE = 8  # clicks in work; more would wait for each other's Python
# A click in work or waiting holds a thread of the server, and so does a fetch. The others answer /health and /setup.
THREADS = PLACES + AT_ONCE + FETCHES + 8
OBJECTS = 5000  # that are being clicked on; for the order of the line and the counters
# A page shows only the answer to its newest request. Older ones that still wait go behind the others, and when as many
# as this wait, so that others would soon be refused, they are answered with nothing.
DROP_SUPERSEDED = 16
SUPERSEDED, AHEAD = 1, 2  # urgencies; a click that somebody waits for has 0
AHEAD_WAIT_S = 600.0
AHEAD_IMAGES = 4  # of a task that was opened; it may have hundreds of pages
BATCH_S = 80.0  # Label Studio waits 100 s for a batch

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Object:
    """An object that is being clicked on: what was asked last, and the place in the line of that request."""

    ids: tuple[str, ...]
    ticket: Ticket


class Backend:
    """Answers Label Studio's calls with one segmenter. Thread-safe.

    places   clicks that may be in the line; fetching their images has places of its own (FETCHES), so that a host that
             hangs holds up nobody whose image is known. The server needs more threads than both and AT_ONCE together
    """

    def __init__(
        self,
        segmenter: Segmenter,
        settings: Settings,
        *,
        metrics: Metrics | None = None,
        fetcher: Fetcher | None = None,
        places: int = PLACES,
        wait_s: float = 60.0,
    ) -> None:
        self.segmenter = segmenter
        self.metrics = metrics or Metrics(DOOR, segmenter)
        self._settings = settings
        self._projects = Projects(settings)
        self._images = TaskImages(settings, self._projects, fetcher)
        # Of clicks: one a core, and one more for whoever is in Python. They share the threads: together they are
        # answered sooner than one after the other.
        at_once = min(native.status().threads + 1, AT_ONCE)
        self._admission = Admission(running=at_once, waiting=places - 1, wait_s=wait_s)
        self._encodes = Admission(running=1, waiting=places - 1, wait_s=wait_s)
        self._polarity = Polarities(settings.memory_file)
        self._lock = threading.Lock()  # of the objects; nothing slow happens under it
        self._objects: cachetools.LRUCache[tuple[str, str, str], _Object] = cachetools.LRUCache(OBJECTS)
        self._ahead = Ahead()

    @property
    def model_version(self) -> str:
        return f"inter2former-{self.segmenter.digest[:12] or 'unnamed'}"

    def close(self) -> None:
        self._ahead.close()
        self._images.close()
        self._polarity.close()

    # -- calls -------------------------------------------------------------------------------------------------------

    def setup(self, body: Any, *, peer: str, proven: bool) -> dict[str, Any]:
        """Remembers where the platform of a project is. Answers at once, whatever the config says.

        peer     address of the caller when it is known to be the caller's own, else ""
        proven   whether the caller has shown the password of the backend
        """
        setup = contract.parse_setup(body)
        self._projects.warn("config", setup.project, contract.parse_config(setup.label_config).warnings())
        self._projects.learn(setup, peer, proven)
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
        task = request.tasks[0]
        addresses = contract.image_addresses(task, config)
        if request.event == "prewarm":
            if request.wait:
                self._encode(request, task, addresses, waited_for=True)
            known = [self._is_encoded(request, address) for address in addresses]
            if not all(known) and not request.wait:
                self._encode_ahead(request, task)
            numbers = {ready: [n for n, one in enumerate(known) if one is ready] for ready in (True, False)}
            value = {"status": "ok", "cached": numbers[True], "pending": numbers[False]}
        elif request.event == "release":
            for address in addresses:
                self._images.forget(request.project, address)
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
        control = config.mask_control(interaction.to_name, interaction.label)
        interaction = contract.without_spent_points(request.tasks[0], interaction)
        polarity = self._polarities(request, interaction)
        ticket = self._enter(request, interaction)
        if control is None:
            warnings = (*config.warnings(), f"No mask control for {interaction.to_name!r}.")
            self._projects.warn("config", request.project, warnings)
            return None
        existing = self._correctable(request.tasks[0], control, interaction)
        if not (interaction.rectangles or interaction.strokes or existing or any(polarity.values())):
            return None  # negative clicks alone
        address = contract.image_address(request.tasks[0], config, interaction)
        file = self._file(request, request.tasks[0], address, trace)
        with self._admission.place(), self.metrics.queue.track_inprogress():
            answer = self._answer(request, file, interaction, control, polarity, existing, ticket, trace)
        if answer is None or not answer["result"]:
            return None
        return answer

    def _file(self, request: contract.PredictRequest, task: Mapping[str, Any], address: str, trace: Trace) -> ImageFile:
        """The file behind an address. BusyError when there is no place in the line that comes after it."""
        if self._images.known(request.project, address) is None:
            with self._admission.place():  # who cannot be served hears it before the fetch, not after it
                pass
        return self._images.get(request.project, task, address, trace)

    def _answer(
        self,
        request: contract.PredictRequest,
        file: ImageFile,
        interaction: contract.Interaction,
        control: contract.Control,
        polarity: Mapping[contract.Point, bool],
        existing: Sequence[contract.Existing],
        ticket: Ticket,
        trace: Trace,
        *,
        keep_strokes: bool = True,
    ) -> dict[str, Any] | None:
        """Masks and regions of an interaction; None when the answer is not wanted any more.

        keep_strokes   what a person painted just now is inside; a finished mask is only where the model starts from
        """
        image = self._known(file, ticket, trace)
        info = image.info
        trace.image_key = info.key
        if interaction.rectangles and interaction.width is None:  # turned ones need the shape of the image
            drawn = contract.read_context(request.context, (info.width, info.height))
            interaction = dataclasses.replace(interaction, rectangles=drawn.rectangles if drawn else ())
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
                    file.task, width, height, info.width, info.height,
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

    def _known(self, file: ImageFile, ticket: Ticket, trace: Trace, *, wait_s: float | None = None) -> KnownImage:
        """The image with its name and, unless the cache is too small for it, its encoding."""
        try:
            if self.segmenter.is_encoded(file.data):
                return self._named(file, trace)
            with contextlib.ExitStack() as turn:
                with trace.stage("queue"):
                    turn.enter_context(self._encodes.turn(ticket, wait_s=wait_s))
                image = self._named(file, trace)
                with trace.stage("encode"):
                    self.segmenter.prefetch(image)
            return image
        except ImageError as error:
            if file.key is None:
                raise
            raise FetchError(f"{file.task}: {error}") from None

    def _named(self, file: ImageFile, trace: Trace) -> KnownImage:
        """The image with its name; its file is remembered, so that the next click neither fetches nor hashes it."""
        if isinstance(file.data, KnownImage):
            return file.data
        with trace.stage("decode_image"):
            image = self.segmenter.known(file.data)
        self._images.keep(file, image.info)
        return image

    def _enter(self, request: contract.PredictRequest, interaction: contract.Interaction) -> Ticket:
        """A place in the line for a request; an older one about the same object steps back. Counts what people do."""
        ticket = Ticket()
        if not interaction.ids:
            return ticket
        key = (request.project, task_name(request.tasks[0]), interaction.ids[0][:64])
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
        project = self._projects.get(request.project)
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
                log.warning("%s: no masks: %s", task_name(task), error)
                yield None
        if late:
            log.warning("%d of %d tasks got no masks in %g seconds: choose fewer", late, len(request.tasks), BATCH_S)

    def _masks_of(
        self, request: contract.PredictRequest, task: Mapping[str, Any], config: contract.LabelConfig, trace: Trace
    ) -> dict[str, Any] | None:
        regions: list[dict[str, Any]] = []
        scores: list[float] = []
        for interaction in contract.objects_of_task(task, config, self.model_version):
            control = config.mask_control(interaction.to_name, interaction.label)
            if control is None:
                continue
            polarity = {point: point.positive is not False for point in interaction.points}
            ticket = Ticket(AHEAD)
            file = self._images.get(request.project, task, contract.image_address(task, config, interaction), trace)
            answer = self._answer(request, file, interaction, control, polarity, (), ticket, trace, keep_strokes=False)
            if answer is not None and answer["result"]:
                regions += answer["result"]
                scores.append(answer["score"])
        return contract.prediction(regions, float(np.mean(scores)), self.model_version) if regions else None

    # -- ahead -------------------------------------------------------------------------------------------------------

    def _encode_ahead(self, request: contract.PredictRequest, task: Mapping[str, Any]) -> None:
        """Fetch and encode the images of a task in the background, the first of them."""

        def work() -> None:
            addresses = contract.image_addresses(task, contract.parse_config(request.label_config))
            self._encode(request, task, addresses[:AHEAD_IMAGES])

        self._ahead.do(work)

    def _encode(
        self,
        request: contract.PredictRequest,
        task: Mapping[str, Any],
        addresses: Sequence[str],
        *,
        waited_for: bool = False,
    ) -> None:
        """Fetch and encode images of a task, when nobody waits for another one; as many as there is time for.

        raises  the error of the first that failed, after the others
        """
        end = time.monotonic() + BATCH_S
        failed: Inter2FormerError | None = None
        for address in addresses:
            try:
                file = self._file(request, task, address, Trace())
                with self._admission.place() if waited_for else contextlib.nullcontext():
                    self._known(file, Ticket(AHEAD), Trace(), wait_s=AHEAD_WAIT_S)
            except Inter2FormerError as error:
                failed = failed or error
            if time.monotonic() > end:
                break
        if failed is not None:
            raise failed

    def _encode_next(self, request: contract.PredictRequest) -> None:
        """The same for the tasks that the platform shows after this one."""
        count, project = self._settings.ahead_tasks, self._projects.get(request.project)
        number = request.tasks[0].get("id")
        if not count or project is None or isinstance(number, bool) or not isinstance(number, int):
            return

        def work() -> None:
            for task in self._tasks_after(project, request.project, number, count):
                self._encode_ahead(request, task)

        self._ahead.do(work)

    def _tasks_after(self, project: Project, name: str, number: int, count: int) -> list[Mapping[str, Any]]:
        """The next tasks of a project by number, as the platform lists them."""
        identifier = name.partition(".")[0]
        if not identifier.isdecimal():
            return []
        later = {"filter": "filter:tasks:id", "operator": "greater", "value": number, "type": "Number"}
        query = json.dumps({"filters": {"conjunction": "and", "items": [later]}, "ordering": ["tasks:id"]})
        path = f"/api/tasks?project={identifier}&page_size={count}&query={quote(query)}"
        try:
            listed = json.loads(self._images.from_platform(project, path))
        except ValueError:
            raise FetchError("The platform's list of tasks is not JSON.") from None
        tasks = listed.get("tasks") if isinstance(listed, dict) else None
        return [task for task in tasks[:count] if isinstance(task, dict)] if isinstance(tasks, list) else []

    def _is_encoded(self, request: contract.PredictRequest, address: str) -> bool:
        """Whether a click on the image would wait for nothing."""
        data = self._images.known(request.project, address)
        return data is not None and self.segmenter.is_encoded(data)


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
