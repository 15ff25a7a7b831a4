"""What a click of CVAT does: a request body goes in, a status and a JSON body come out. The one place where the
contract meets the core; it knows neither nuclio nor HTTP servers. Every door of CVAT calls `Interactor.answer`.

Nothing is remembered between clicks but caches, which make answers faster and never different.
"""

from __future__ import annotations

import dataclasses
import gzip
import logging
import threading
import time
from collections.abc import Mapping

import cachetools
import numpy as np

from backends.common.http import error_answer, error_body
from backends.cvat_nuclio import contract
from inter2former.segmenter import Segmenter

FILES_BYTES = 128 * 2**20  # image files kept by the digest of their base64 text: some twenty photos of 12 megapixels

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reply:
    """An HTTP answer without HTTP: a JSON body, gzipped when `headers` say so. `error` is a sentence for people."""

    status: int
    body: bytes = dataclasses.field(repr=False)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A file that was decoded once, so that its size is known."""

    data: bytes = dataclasses.field(repr=False)
    height: int
    width: int


class Interactor:
    """Answers CVAT's clicks with one segmenter. Thread-safe; holds at most `files_bytes` of image files."""

    def __init__(
        self, segmenter: Segmenter, *, form: contract.ResponseForm = "mask", files_bytes: int = FILES_BYTES
    ) -> None:
        self.segmenter = segmenter
        self.form = form
        self._files: cachetools.LRUCache[str, ImageFile] = cachetools.LRUCache(
            files_bytes, getsizeof=lambda file: len(file.data)
        )
        self._lock = threading.Lock()

    def answer(self, body: object, *, accepts_gzip: bool = False) -> Reply:
        """The answer to an event's body (mapping, bytes or str). Never raises; a broken request is a 4xx."""
        try:
            return self._click(body, accepts_gzip)
        except Exception as error:
            return failed(error)

    def _click(self, body: object, accepts_gzip: bool) -> Reply:
        began = time.perf_counter()
        request = contract.parse(body)
        digest = request.image_digest
        file = self._file(request, digest)
        clicks, box = contract.prompts(request, file.height, file.width)
        if request.n_boxes > 1:
            log.warning("%d boxes were drawn; the first one is used", request.n_boxes)
        encoded = False
        if contract.wants_mask(clicks, box):
            result = self.segmenter.segment(file.data, clicks, box=box)
            mask, encoded = result.mask, result.encoded
        else:
            mask = np.zeros((file.height, file.width), np.bool_)
        answer = contract.answer(mask, self.form)
        headers = {}
        if accepts_gzip and len(answer) > contract.GZIP_ABOVE_BYTES:
            answer = gzip.compress(answer, 1, mtime=0)
            headers["Content-Encoding"] = "gzip"
        log.info(
            "image %s, %d x %d, %s: %d positive, %d negative%s, mask of %d pixels, %d bytes, %.0f ms",
            digest[:12], file.width, file.height, "encoded now" if encoded else "known",
            len(request.positive), len(request.negative), ", box" if box else "",
            int(np.count_nonzero(mask)), len(answer), 1000 * (time.perf_counter() - began),
        )  # fmt: skip
        return Reply(200, answer, headers)

    def _file(self, request: contract.Request, digest: str) -> ImageFile:
        """The image file by the digest of its text: a known one is neither decoded from base64 nor from JPEG."""
        with self._lock:
            file = self._files.get(digest)
        if file is None:
            data = contract.image_bytes(request)
            info = self.segmenter.identify(data)
            file = ImageFile(data, info.height, info.width)
            with self._lock:
                if len(data) <= self._files.maxsize:
                    self._files[digest] = file
        return file


def failed(error: Exception) -> Reply:
    """The answer to a request that raised `error`. CVAT shows its users the status alone, curl shows the rest."""
    status, fields = error_answer(error)
    headers = {"Retry-After": "1"} if status == 503 else {}
    return Reply(status, contract.dump(fields), headers, error=fields["detail"])


def refused(status: int, code: str, detail: str) -> Reply:
    """An answer to what is no click: an unknown route, method or function."""
    return Reply(status, contract.dump(error_body(code, detail)), error=detail)
