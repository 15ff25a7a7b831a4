"""What a click of CVAT does: a request body goes in, a status and a JSON body come out. The one place where the
contract meets the core; it knows neither nuclio nor HTTP servers. Every door of CVAT calls `Interactor.answer`.

Nothing is remembered between clicks but caches, which make answers faster and never different.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from backends.common.http import error_answer, error_body
from backends.common.log import new_request_id
from backends.common.log import request_id as logged_id
from backends.common.metrics import CONTENT_TYPE, Metrics, version
from backends.common.server import Admission
from backends.cvat_nuclio import contract
from inter2former.errors import PromptError
from inter2former.runtime.cache import ByteCache
from inter2former.segmenter import KnownImage, Segmenter

WAIT_S, ENCODE_WAIT_S = 10.0, 20.0  # for a turn; nuclio itself lets a click wait 10 s for a worker, CVAT gives up later
MAX_WAITING, MAX_ENCODES = 64, 12  # people in line; a door's own limit leaves places to those who click
FILES_BYTES = 128 * 2**20  # image files kept by the digest of their base64 text: some twenty photos of 12 megapixels

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reply:
    """An HTTP answer without HTTP: ASCII bytes, gzipped when `headers` say so. `error` is a sentence for people."""

    status: int
    body: bytes = dataclasses.field(repr=False)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    content_type: str = "application/json"
    error: str = ""


class Interactor:
    """Answers CVAT's clicks with one segmenter. Thread-safe; holds at most `files_bytes` of image files.

    Images are encoded one after the other, `at_once` clicks beside them: whoever clicks on an image that is known waits
    for no encoding (R11). Everybody who came to a new image waits for the same encoding.

    form          of answers; "auto": shapes for a server that reads them, except to a page that spells like an old one
    reads_shapes  says of the server, at each click, whether it does
    """

    def __init__(
        self,
        segmenter: Segmenter,
        *,
        form: contract.ResponseForm | Literal["auto"] = "mask",
        reads_shapes: Callable[[], bool] = lambda: False,
        files_bytes: int = FILES_BYTES,
        at_once: int = 2,
    ) -> None:
        self.segmenter = segmenter
        self.form = form
        self._reads_shapes = reads_shapes
        self.metrics = Metrics("cvat", segmenter)
        self._files = ByteCache(files_bytes)
        self._clicks = Admission(running=at_once, waiting=MAX_WAITING, wait_s=WAIT_S)
        self._encodes = Admission(running=1, waiting=MAX_ENCODES - 1, wait_s=ENCODE_WAIT_S)
        self._at_encode = ByteCache(0)  # keeps nothing; people who want the same image wait for the first of them

    def answer(self, body: object, *, accepts_gzip: bool = False, request_id: str | None = None) -> Reply:
        """The answer to an event's body (mapping, bytes or str). Never raises; a broken request is a 4xx.

        request_id   the caller's name for this request; it stands in the log and in the reply, as do the stages
        """
        known_as = new_request_id(request_id)
        token = logged_id.set(known_as)
        try:
            with self.metrics.queue.track_inprogress():
                reply = self._click(body, accepts_gzip)
        except Exception as error:
            reply = failed(error)
            self.metrics.error(json.loads(reply.body)["error"])
        finally:
            logged_id.reset(token)
        self.metrics.request("click", reply.status)
        return dataclasses.replace(reply, headers={**reply.headers, "X-Request-Id": known_as})

    def health(self) -> Reply:
        """Up: an interactor exists only when its weights were loaded and checked."""
        return Reply(200, contract.dump({"status": "UP", "version": version(), "model": self.segmenter.digest}))

    def metrics_page(self) -> Reply:
        return Reply(200, self.metrics.text(), content_type=CONTENT_TYPE)

    def _click(self, body: object, accepts_gzip: bool) -> Reply:
        began = time.perf_counter()
        request = contract.parse(body)
        image, waited = self._image(request)
        key, height, width = image.info
        clicks, box = contract.prompts(request, height, width)
        if request.n_boxes > 1:
            log.warning("%d boxes were drawn; the first one is used", request.n_boxes)
        seconds = {**waited, "read": time.perf_counter() - began - sum(waited.values())}
        if contract.wants_mask(clicks, box):
            asked = time.perf_counter()
            with self._clicks.turn():
                seconds["queue"] += time.perf_counter() - asked
                result = self.segmenter.segment(image, clicks, box=box)
            mask = result.mask
            for stage, spent in result.timing.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
        else:
            mask = np.zeros((height, width), np.bool_)
        found = time.perf_counter()
        form = self._form_for(request)
        answer = contract.answer(mask, form)
        headers = {"X-Image-Key": key}
        if accepts_gzip and len(answer) > contract.GZIP_ABOVE_BYTES[form]:
            answer = gzip.compress(answer, 1, mtime=0)
            headers["Content-Encoding"] = "gzip"
        seconds["reply"] = time.perf_counter() - found
        self.metrics.stages(seconds)
        stages = {stage: f"{1000 * spent:.1f}" for stage, spent in seconds.items() if spent > 0}
        headers["Server-Timing"] = ", ".join(f"{stage};dur={spent}" for stage, spent in stages.items())
        log.info(
            "image %s, %d x %d: %d positive, %d negative%s, %s of %d bytes; ms: %s",
            key, width, height, len(request.positive), len(request.negative), ", box" if box else "",
            form, len(answer), " ".join(f"{stage} {spent}" for stage, spent in stages.items()),
        )  # fmt: skip
        return Reply(200, answer, headers)

    def _form_for(self, request: contract.Request) -> contract.ResponseForm:
        if self.form != "auto":
            return self.form
        return "shapes" if not request.null_box and self._reads_shapes() else "mask"

    def _image(self, request: contract.Request) -> tuple[KnownImage, dict[str, float]]:
        """The image by the digest of its text, encoded or about to be; and the seconds of waiting and encoding.

        A known one is decoded neither from base64 nor from JPEG. What is not encoded yet waits in the line of encodes.
        """
        digest = request.image_digest
        known: KnownImage | None = self._files.get(digest)
        if known is not None and self.segmenter.is_encoded(known):
            return known, {"queue": 0.0, "encode": 0.0}
        spent = {"queue": 0.0, "encode": 0.0}

        def encode() -> KnownImage:
            asked = time.perf_counter()
            with self._encodes.place(), self._encodes.turn():
                begun = time.perf_counter()
                spent["queue"] = begun - asked
                kept, image = self._read(request, digest)
                if self._needs_encoding(request, kept):
                    self.segmenter.prefetch(image)
                spent["encode"] = time.perf_counter() - begun
            return kept

        began = time.perf_counter()
        image = self._at_encode.get_or_make(digest, encode)
        spent["encode"] = spent["encode"] or time.perf_counter() - began  # somebody else's
        return image, spent

    def _needs_encoding(self, request: contract.Request, image: KnownImage) -> bool:
        try:
            prompts = contract.prompts(request, image.info.height, image.info.width)
        except PromptError:  # for this request alone: others may be waiting for the image
            return False
        # Without a budget nothing is kept, and the click itself has to encode.
        return contract.wants_mask(*prompts) and self.segmenter.cache_info().budget_bytes > 0

    def _read(self, request: contract.Request, digest: str) -> tuple[KnownImage, KnownImage]:
        """The image to keep, with the file's bytes, and to encode: whoever comes first has the pixels already."""
        fresh: KnownImage | None = None

        def read() -> KnownImage:
            nonlocal fresh
            data = contract.image_bytes(request)
            fresh = self.segmenter.known(data)
            return dataclasses.replace(fresh, image=data)

        kept = self._files.get_or_make(digest, read)
        return kept, fresh or kept


def failed(error: Exception) -> Reply:
    """The answer to a request that raised `error`. CVAT shows its users the status alone, curl shows the rest."""
    status, fields = error_answer(error)
    headers = {"Retry-After": "1"} if status == 503 else {}
    return Reply(status, contract.dump(fields), headers, error=fields["detail"])


def refused(status: int, code: str, detail: str) -> Reply:
    """An answer to what is no click: an unknown route, method or function."""
    return Reply(status, contract.dump(error_body(code, detail)), error=detail)
