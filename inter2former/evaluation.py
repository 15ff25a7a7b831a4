"""The field's protocol: simulated clicks, IoU after every click, mIoU@k, NoC@IoU, boundary IoU; reading of packs.

A segmenter is a function (image, clicks so far) -> mask here, so that any method can be measured under the same
clicks. Nothing about how masks are made, and no printing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from inter2former.errors import ConfigError, ImageError, PromptError
from inter2former.images import decode_image
from inter2former.masks import boundary
from inter2former.prompts import Click

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
SegmentFunction = Callable[[Image, Sequence[Click]], Mask]
PredictFunction = Callable[[Image, Sequence[Click]], float]

MAX_CLICKS = 20  # also the NoC of an object that never reaches the IoU
MIOU_AT = (1, 3, 5, 10)
NOC_AT = (85, 90, 95)
BOUNDARY_IOU_AT = 5
SCORE_AT = 3
GROWN = (3, 10)  # clicks between which a mask should not get worse
BOUNDARY_WIDTH = 0.02  # of the diagonal (Cheng et al., Boundary IoU, CVPR 2021)

# Objects of a pack that say something about clicking: not a speck, not the whole photo, no photo dominates.
MIN_AREA_PIXELS = 150
MIN_AREA_SHARE, MAX_AREA_SHARE = 0.003, 0.70
MAX_OBJECTS_A_PHOTO = 2


def _check_pair(prediction: Mask, truth: Mask) -> None:
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
            kind = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise PromptError(f"The {name} is {kind}, want bool [H, W].")
    if prediction.shape != truth.shape:
        raise PromptError(f"The prediction is {prediction.shape}, the truth {truth.shape}; they must be equal.")


def iou(prediction: Mask, truth: Mask) -> float:
    """Intersection over union of two bool [H, W] masks, in [0, 1]; two empty masks agree: 1."""
    _check_pair(prediction, truth)
    union = int(np.count_nonzero(prediction | truth))
    return int(np.count_nonzero(prediction & truth)) / union if union else 1.0


def depth(region: Mask) -> npt.NDArray[np.float32]:
    """Euclidean distance of each pixel of the region to the nearest one outside it, float32 [H, W], 0 outside.

    Everything beyond the border counts as outside, so a border pixel has depth 1.
    """
    result = np.zeros(region.shape, np.float32)
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not rows.size:
        return result
    # All pixels outside the tight box are outside the region, so the box with a ring of zeros gives the same answer.
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    padded = np.pad(region[box].astype(np.uint8), 1)
    result[box] = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    return result


def boundary_iou(prediction: Mask, truth: Mask, width: float = BOUNDARY_WIDTH) -> float:
    """IoU of the bands inside the two outlines; `width` is a share of the image diagonal, the band at least a pixel."""
    _check_pair(prediction, truth)
    width_px = max(1, round(width * math.hypot(*truth.shape)))
    return iou(boundary(prediction, width_px), boundary(truth, width_px))


def next_click(prediction: Mask, truth: Mask, clicks: Sequence[Click] = ()) -> Click | None:
    """The click a patient annotator would make next: the deepest point of the larger error.

    Both errors (missing, too much) are distance-transformed; the one with the larger maximum gets the click, a tie
    is positive. Pixels clicked before are never chosen again; among equally deep pixels the first in reading order
    wins. The click is placed on the pixel's centre. None when no error is left. Source: the protocol of RITM.
    """
    _check_pair(prediction, truth)
    missing, excess = depth(truth & ~prediction), depth(prediction & ~truth)
    for click in clicks:
        pixel = click.pixel(*truth.shape)
        missing[pixel] = excess[pixel] = 0
    positive = bool(missing.max() >= excess.max())
    error = missing if positive else excess
    row, column = np.unravel_index(int(error.argmax()), error.shape)
    if error[row, column] == 0:
        return None
    return Click(float(column) + 0.5, float(row) + 0.5, positive)


def noc(ious: Sequence[float], threshold: float, max_clicks: int = MAX_CLICKS) -> int:
    """Number of clicks to reach the IoU; `ious[k-1]` is the IoU after click k. `max_clicks` when never reached."""
    reached = (k for k, value in enumerate(ious[:max_clicks], start=1) if value >= threshold)
    return next(reached, max_clicks)


@dataclasses.dataclass(frozen=True)
class Target:
    """One object to be segmented: uint8 [H, W, 3] RGB image and its true bool [H, W] mask."""

    source: str
    name: str
    image: Image
    mask: Mask


@dataclasses.dataclass(frozen=True)
class Score:
    """What one object got; IoUs in [0, 1]. `ious[k-1]` belongs to click k; once nothing is wrong the last one stays."""

    source: str
    name: str
    ious: tuple[float, ...]
    boundary_iou: float  # after BOUNDARY_IOU_AT clicks, or after the last one when there are fewer
    clicks: int  # really made
    prepare_s: float
    click_s: float
    predicted: tuple[float, ...] = ()  # IoUs that the method itself expects, a click each; empty when it was not asked


def evaluate(
    targets: Iterable[Target],
    segment: SegmentFunction,
    *,
    clicks: int = MAX_CLICKS,
    prepare: Callable[[Image], object] | None = None,
    predict: PredictFunction | None = None,
    on_score: Callable[[Score], object] | None = None,
) -> list[Score]:
    """Click through every target from an empty mask.

    segment   called once a click with the list grown by one
    prepare   called once a target before its clicks, to encode the image; timed apart
    predict   the IoU that the method expects of its mask, 0..1; asked after each click, not timed
    on_score  called after each target, for progress and logs
    """
    if clicks < 1:
        raise ConfigError(f"clicks is {clicks}; at least 1 is needed.")
    scores = []
    for target in targets:
        score = _click_through(target, segment, clicks, prepare, predict)
        scores.append(score)
        if on_score is not None:
            on_score(score)
    return scores


def _click_through(
    target: Target,
    segment: SegmentFunction,
    max_clicks: int,
    prepare: Callable[[Image], object] | None,
    predict: PredictFunction | None,
) -> Score:
    start = time.perf_counter()
    if prepare is not None:
        prepare(target.image)
    prepare_s, click_s = time.perf_counter() - start, 0.0
    prediction = np.zeros_like(target.mask)
    made: list[Click] = []
    ious: list[float] = []
    predicted: list[float] = []
    at_boundary = prediction
    while len(made) < max_clicks and (click := next_click(prediction, target.mask, made)) is not None:
        made.append(click)
        start = time.perf_counter()
        prediction = segment(target.image, tuple(made))
        click_s += time.perf_counter() - start
        ious.append(iou(prediction, target.mask))
        if predict is not None:
            predicted.append(predict(target.image, tuple(made)))
        if len(made) <= BOUNDARY_IOU_AT:
            at_boundary = prediction
    ious += [iou(prediction, target.mask)] * (max_clicks - len(ious))
    predicted += predicted[-1:] * (max_clicks - len(predicted))
    return Score(
        source=target.source,
        name=target.name,
        ious=tuple(ious),
        boundary_iou=boundary_iou(at_boundary, target.mask),
        clicks=len(made),
        prepare_s=prepare_s,
        click_s=click_s,
        predicted=tuple(predicted),
    )


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """The figures of a run, IoU in percent.

    {"sources": {name: figures}, "mean": the same figures averaged over sources, "seconds_per_click": with encoding,
    "seconds_per_click_online": without}. Figures: objects, miou@k (k <= clicks), biou@5, noc85/90/95, nof90 (objects
    that never reach 90 %), grown@10 (percent of objects whose IoU after ten clicks is at least that after three), and
    score_mae@3, the mean absolute error of the predicted IoU, when it was asked for.
    """
    by_source: dict[str, list[Score]] = collections.defaultdict(list)
    for score in scores:
        by_source[score.source].append(score)
    sources = {source: _figures(by_source[source]) for source in sorted(by_source)}
    keys = next(iter(sources.values()), {})
    n_clicks = max(1, sum(score.clicks for score in scores))
    click_s, prepare_s = sum(s.click_s for s in scores), sum(s.prepare_s for s in scores)
    return {
        "sources": sources,
        "mean": {key: round(statistics.fmean(f[key] for f in sources.values()), 3) for key in keys},
        "seconds_per_click": round((click_s + prepare_s) / n_clicks, 5),
        "seconds_per_click_online": round(click_s / n_clicks, 5),
    }


def _figures(scores: Sequence[Score]) -> dict[str, float]:
    max_clicks = len(scores[0].ious)
    figures: dict[str, float] = {"objects": len(scores)}
    for k in MIOU_AT:
        if k <= max_clicks:
            figures[f"miou@{k}"] = round(100 * statistics.fmean(s.ious[k - 1] for s in scores), 3)
    if max_clicks >= BOUNDARY_IOU_AT:
        figures[f"biou@{BOUNDARY_IOU_AT}"] = round(100 * statistics.fmean(s.boundary_iou for s in scores), 3)
    for percent in NOC_AT:
        figures[f"noc{percent}"] = round(statistics.fmean(noc(s.ious, percent / 100, max_clicks) for s in scores), 3)
    if max_clicks >= GROWN[1]:
        early, late = (k - 1 for k in GROWN)
        figures[f"grown@{GROWN[1]}"] = round(100 * statistics.fmean(s.ious[late] >= s.ious[early] for s in scores), 3)
    figures["nof90"] = sum(max(s.ious) < 0.90 for s in scores)
    asked = [s for s in scores if s.predicted]
    if max_clicks >= SCORE_AT and asked:
        errors = (abs(s.predicted[SCORE_AT - 1] - s.ious[SCORE_AT - 1]) for s in asked)
        figures[f"score_mae@{SCORE_AT}"] = round(100 * statistics.fmean(errors), 3)
    return figures


# ---------------------------------------------------------------------------------------------------- packs


@dataclasses.dataclass(frozen=True)
class ObjectRef:
    """Where an object stands in a pack: the pixels of label map `map` of photo `sample` that equal `id`."""

    source: str
    sample: str
    shard: str
    map: int
    id: int

    @property
    def name(self) -> str:
        return f"{self.sample}/{self.map}/{self.id}"

    @property
    def order(self) -> str:
        """Key of the drawing order: fixed for ever, unrelated to photo order, size or kind."""
        return hashlib.blake2b(self.name.encode(), digest_size=16).hexdigest()


class Pack:
    """A folder of zip shards with photos, label maps and `index.json`. Use as a context manager; read-only.

    raises ConfigError when the folder is not a pack, ImageError when a photo or a map in it is broken
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "index.json"
        try:
            content = json.loads(index.read_bytes())
            fields = content["fields"]
            self._samples = [dict(zip(fields, row, strict=True)) for row in content["samples"]]
        except OSError as error:
            raise ConfigError(f"{index} cannot be read ({error.strerror}).", "Give the folder of a pack.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{index} is not the index of a pack.") from error
        self._open: dict[str, zipfile.ZipFile] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()
        self._stack.close()

    def _read(self, shard: str, member: str) -> bytes:
        try:
            if shard not in self._open:
                self._open[shard] = self._stack.enter_context(zipfile.ZipFile(self.folder / shard))
            return self._open[shard].read(member)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ConfigError(f"Pack {self.folder}: {member} cannot be read from {shard}.") from error

    def choose(self, split: str, limit: int) -> list[ObjectRef]:
        """At most `limit` objects of each source of a split, the same ones on every machine.

        Per source: objects of 0.3 .. 70 % of the photo and at least 150 pixels, in the order of the blake2b digest of
        "photo/map/id"; the third and later objects of a photo are passed over. A smaller limit gives a prefix.
        The answer is sorted by source and keeps the objects of one photo together.
        """
        if limit < 1:
            raise ConfigError(f"limit is {limit}; at least 1 object a source is needed.")
        candidates: dict[str, list[ObjectRef]] = collections.defaultdict(list)
        for sample in self._samples:
            if sample["split"] == split:
                candidates[sample["source"]] += self._objects(sample)
        if not candidates:
            splits = sorted({str(sample["split"]) for sample in self._samples})
            raise ConfigError(f"Pack {self.folder} has no split {split!r}, it has {', '.join(splits)}.")
        chosen: list[ObjectRef] = []
        for source in sorted(candidates):
            a_photo: dict[str, list[ObjectRef]] = {}
            n_chosen = 0
            for ref in sorted(candidates[source], key=lambda ref: ref.order):
                taken = a_photo.setdefault(ref.sample, [])
                if n_chosen < limit and len(taken) < MAX_OBJECTS_A_PHOTO:
                    taken.append(ref)
                    n_chosen += 1
            chosen += [ref for taken in a_photo.values() for ref in taken]
        return chosen

    def _objects(self, sample: dict[str, Any]) -> Iterator[ObjectRef]:
        photo_area = sample["w"] * sample["h"]
        smallest = max(MIN_AREA_PIXELS, MIN_AREA_SHARE * photo_area)
        for item in json.loads(self._read(sample["shard"], f"{sample['id']}.json"))["objects"]:
            if smallest <= item["area"] <= MAX_AREA_SHARE * photo_area:
                yield ObjectRef(sample["source"], sample["id"], sample["shard"], item["map"], item["id"])

    def targets(self, refs: Iterable[ObjectRef]) -> Iterator[Target]:
        """Photo and true mask of each object; a photo is decoded once for neighbours in the list."""
        photo: tuple[str, Image] | None = None
        for ref in refs:
            if photo is None or photo[0] != ref.sample:
                photo = ref.sample, decode_image(self._read(ref.shard, f"{ref.sample}.jpg"))
            member = f"{ref.sample}.m{ref.map}.png"
            labels = cv2.imdecode(np.frombuffer(self._read(ref.shard, member), np.uint8), cv2.IMREAD_UNCHANGED)
            if labels is None or labels.shape != photo[1].shape[:2]:
                raise ImageError(f"Pack {self.folder}: label map {member} is broken or does not fit its photo.")
            yield Target(ref.source, ref.name, photo[1], labels == ref.id)
