"""The evaluation protocol on masks small enough to check by eye, and the choice of objects from packs made here."""

import io
import itertools
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from inter2former import evaluation
from inter2former.errors import ConfigError, ImageError, PromptError
from inter2former.evaluation import Pack, Score, Target, boundary_iou, depth, evaluate, iou, next_click, noc, summarise
from inter2former.prompts import Click


def mask(*rows: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def block(height, width, top, left, bottom, right):
    result = np.zeros((height, width), bool)
    result[top:bottom, left:right] = True
    return result


EMPTY = np.zeros((20, 30), bool)


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        pytest.param(mask("##.."), mask("##.."), 1.0, id="equal"),
        pytest.param(mask("##.."), mask("..##"), 0.0, id="disjoint"),
        pytest.param(mask("###."), mask(".###"), 0.5, id="half"),
        pytest.param(mask("...."), mask("...."), 1.0, id="both empty"),
        pytest.param(mask("...."), mask("#..."), 0.0, id="nothing predicted"),
    ],
)
def test_iou(prediction, truth, expected):
    assert iou(prediction, truth) == expected


@pytest.mark.parametrize(
    ("prediction", "truth", "named"),
    [
        pytest.param(EMPTY.astype(np.uint8), EMPTY, "prediction is uint8", id="dtype"),
        pytest.param(EMPTY, EMPTY[None], "truth is bool", id="dimensions"),
        pytest.param([[True]], EMPTY, "prediction is list", id="list"),
        pytest.param(EMPTY[:5], EMPTY, "must be equal", id="shapes"),
    ],
)
@pytest.mark.parametrize("function", [iou, boundary_iou, next_click])
def test_masks_that_do_not_fit_are_refused(function, prediction, truth, named):
    with pytest.raises(PromptError, match=named):
        function(prediction, truth)


def test_depth_counts_the_image_border_as_outside():
    assert depth(np.ones((3, 5), bool)).tolist() == [[1, 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]]


def test_depth_is_the_exact_euclidean_distance():
    rng = np.random.default_rng(0)
    region = rng.random((17, 23)) < 0.8
    padded = np.pad(region, 1)
    outside = np.argwhere(~padded)
    brute = np.zeros(region.shape)
    for row, column in np.argwhere(region):
        brute[row, column] = np.sqrt(((outside - (row + 1, column + 1)) ** 2).sum(1).min())
    np.testing.assert_allclose(depth(region), brute, atol=1e-5)  # float32 against float64


def test_boundary_iou_sees_what_iou_does_not():
    truth = block(200, 200, 20, 20, 180, 180)
    holed = truth & ~block(200, 200, 80, 80, 120, 120)
    assert boundary_iou(holed, truth) < iou(holed, truth) - 0.1  # a hole far from the outline adds a false outline
    assert boundary_iou(truth, truth) == 1.0
    assert boundary_iou(np.zeros_like(truth), truth) == 0.0


def test_boundary_band_is_at_least_one_pixel():
    truth = block(10, 10, 2, 2, 8, 8)
    smaller = block(10, 10, 3, 3, 7, 7)
    assert boundary_iou(smaller, truth) == 0.0  # one-pixel rings that do not touch


@pytest.mark.parametrize(
    ("ious", "threshold", "expected"),
    [
        pytest.param([0.2, 0.9, 0.8], 0.85, 2, id="first time, though lost again"),
        pytest.param([0.9, 0.9, 0.9], 0.90, 1, id="reached exactly"),
        pytest.param([0.2, 0.3, 0.4], 0.85, 20, id="never"),
        pytest.param([], 0.85, 20, id="no click"),
    ],
)
def test_noc(ious, threshold, expected):
    assert noc(ious, threshold) == expected


# -- simulated clicks ------------------------------------------------------------------------------------------------


def test_first_click_is_the_middle_of_the_object():
    assert next_click(EMPTY, block(20, 30, 4, 6, 13, 15)) == Click(10.5, 8.5, True)


def test_the_larger_error_is_clicked_with_its_sign():
    truth = block(20, 30, 2, 2, 12, 12)
    prediction = block(20, 30, 2, 10, 18, 28)  # misses 8 columns, adds more
    click = next_click(prediction, truth)
    assert click is not None
    assert not click.positive
    assert prediction[click.pixel(20, 30)]
    assert not truth[click.pixel(20, 30)]


def test_a_tie_is_positive():
    truth, prediction = block(20, 30, 2, 2, 9, 9), block(20, 30, 2, 20, 9, 27)
    assert next_click(prediction, truth) == Click(5.5, 5.5, True)


def test_depth_decides_not_area():
    truth = block(40, 100, 10, 10, 17, 17) | block(40, 100, 30, 0, 33, 100)  # 49 pixels, 4 deep; 300 pixels, 2 deep
    assert next_click(np.zeros_like(truth), truth) == Click(13.5, 13.5, True)


def test_the_border_counts_as_outside():
    assert next_click(np.zeros((9, 9), bool), np.ones((9, 9), bool)) == Click(4.5, 4.5, True)


def test_clicked_pixels_are_never_reused():
    truth = mask("#.....#")
    made = []
    while (click := next_click(np.zeros_like(truth), truth, made)) is not None:
        made.append(click)
    assert [click.pixel(1, 7) for click in made] == [(0, 0), (0, 6)]


def test_no_error_no_click():
    truth = block(20, 30, 4, 4, 10, 10)
    assert next_click(truth, truth) is None


# -- the loop --------------------------------------------------------------------------------------------------------


def target(truth, source="s", name="n"):
    return Target(source, name, np.zeros((*truth.shape, 3), np.uint8), truth)


def discs(radius):
    """A segmenter that knows nothing of the image: discs around positive clicks, later clicks win."""

    def segment(image, clicks):
        rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
        result = np.zeros(image.shape[:2], bool)
        for click in clicks:
            result[np.hypot(rows - click.y, columns - click.x) <= radius] = click.positive
        return result

    return segment


def test_each_click_is_one_call_with_the_list_grown_by_one():
    seen = []

    def segment(image, clicks):
        seen.append(clicks)
        return discs(3)(image, clicks)

    (score,) = evaluate([target(block(40, 60, 5, 5, 35, 50))], segment, clicks=6)
    assert [len(clicks) for clicks in seen] == [1, 2, 3, 4, 5, 6]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(seen))
    assert score.clicks == 6
    assert list(score.ious) == sorted(score.ious)


def test_a_perfect_mask_ends_the_clicks_and_keeps_its_iou():
    truth = block(20, 30, 4, 4, 10, 10)
    (score,) = evaluate([target(truth)], lambda image, clicks: truth.copy())
    assert score.clicks == 1
    assert score.ious == (1.0,) * 20
    assert score.boundary_iou == 1.0


def test_boundary_iou_is_taken_after_five_clicks():
    truth = block(40, 40, 5, 5, 35, 35)
    (score,) = evaluate([target(truth)], lambda image, clicks: truth if len(clicks) > 5 else np.zeros_like(truth))
    assert (score.ious[4], score.boundary_iou, score.ious[5]) == (0.0, 0.0, 1.0)


def test_prepare_is_called_once_a_target_and_scores_are_told():
    prepared, told = [], []
    targets = [target(block(20, 30, 2, 2, 9, 9), name=name) for name in ("a", "b")]
    scores = evaluate(targets, discs(2), clicks=3, prepare=prepared.append, on_score=told.append)
    assert len(prepared) == 2
    assert told == scores
    assert [score.name for score in scores] == ["a", "b"]


def test_at_least_one_click():
    with pytest.raises(ConfigError, match="clicks is 0"):
        evaluate([], discs(1), clicks=0)


def score(source, ious, **changes):
    fields = {"name": "n", "boundary_iou": 0.5, "clicks": len(ious), "prepare_s": 1.0, "click_s": 2.0}
    return Score(source=source, ious=tuple(ious), **{**fields, **changes})


def test_summary():
    good, bad = [0.5, 0.6, 0.86] + [0.96] * 17, [0.1] * 20
    summary = summarise([score("b", good), score("a", bad), score("b", bad)])
    assert list(summary["sources"]) == ["a", "b"]
    assert summary["sources"]["b"] == {
        "objects": 2,
        "miou@1": 30.0,
        "miou@3": 48.0,
        "miou@5": 53.0,
        "miou@10": 53.0,
        "biou@5": 50.0,
        "noc85": 11.5,
        "noc90": 12.0,
        "noc95": 12.0,
        "grown@10": 100.0,
        "nof90": 1,
    }
    assert summary["mean"]["miou@5"] == pytest.approx((53.0 + 10.0) / 2)  # sources weigh the same
    assert summary["mean"]["objects"] == 1.5
    assert summary["seconds_per_click"] == pytest.approx(9 / 60)
    assert summary["seconds_per_click_online"] == pytest.approx(6 / 60)
    json.dumps(summary, allow_nan=False)


def test_a_short_run_has_only_the_figures_it_can_have():
    figures = summarise([score("a", [0.1, 0.2, 0.3])])["sources"]["a"]
    assert set(figures) == {"objects", "miou@1", "miou@3", "noc85", "noc90", "noc95", "nof90"}
    assert figures["noc90"] == 3


def test_masks_that_get_worse_are_counted():
    worse, same = [0.1, 0.2, 0.9] + [0.8] * 17, [0.5] * 20
    assert summarise([score("a", worse), score("a", same)])["sources"]["a"]["grown@10"] == 50.0


def test_the_error_of_the_predicted_iou():
    scores = [score("a", [0.2, 0.4, 0.6], predicted=(1, 1, 0.5)), score("a", [0.2] * 3, predicted=(0, 0, 0.5))]
    assert summarise(scores)["sources"]["a"]["score_mae@3"] == pytest.approx(20.0)


def test_what_is_predicted_is_asked_after_each_click():
    target = Target("s", "n", np.zeros((20, 30, 3), np.uint8), block(20, 30, 5, 5, 15, 25))
    (got,) = evaluate([target], discs(2), clicks=4, predict=lambda image, made: len(made) / 10)
    assert got.predicted == (0.1, 0.2, 0.3, 0.4)
    (got,) = evaluate([target], lambda image, made: target.mask, clicks=4, predict=lambda image, made: 0.9)
    assert got.predicted == (0.9,) * 4  # the last one stays, as the IoU does


def test_nothing_evaluated_is_an_empty_summary():
    assert summarise([])["sources"] == {}


# -- packs -----------------------------------------------------------------------------------------------------------


def png(labels):
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


WIDTH, HEIGHT = 100, 60


@pytest.fixture
def folder(tmp_path):
    """Two sources of 6 and 2 validation photos with 4 objects each; one object of each photo is a speck."""
    rows = []
    with zipfile.ZipFile(tmp_path / "shard.zip", "w") as shard:
        for source, photos in (("beans", 6), ("cups", 2)):
            for index in range(photos + 1):
                name = f"{source}_{index}"
                labels = np.zeros((HEIGHT, WIDTH), np.uint8)
                for number in range(3):
                    labels[10:50, 30 * number + 2 : 30 * number + 22] = number + 1
                labels[0:2, 0:2] = 4
                objects = [{"map": 0, "id": i + 1, "kind": "object", "area": (800, 800, 800, 4)[i]} for i in range(4)]
                shard.writestr(f"{name}.jpg", jpeg(WIDTH, HEIGHT))
                shard.writestr(f"{name}.m0.png", png(labels))
                shard.writestr(f"{name}.json", json.dumps({"objects": objects}))
                rows.append([name, source, "val" if index < photos else "train", "shard.zip", WIDTH, HEIGHT, 1, 4])
    fields = ["id", "source", "split", "shard", "w", "h", "maps", "objects"]
    (tmp_path / "index.json").write_text(json.dumps({"version": 1, "fields": fields, "samples": rows}))
    return tmp_path


def test_choice_is_bounded_a_source_and_a_photo(folder):
    with Pack(folder) as pack:
        refs = pack.choose("val", 5)
        everything = pack.choose("val", 1000)
    count = {source: sum(ref.source == source for ref in refs) for source in ("beans", "cups")}
    assert count == {"beans": 5, "cups": 4}  # two photos of cups hold two objects each
    assert len(everything) == 6 * 2 + 2 * 2
    assert {ref.id for ref in everything} <= {1, 2, 3}  # never the speck
    assert all(sum(ref.sample == other.sample for other in everything) <= 2 for ref in everything)


def test_choice_is_the_written_order_and_a_smaller_limit_is_a_prefix(folder):
    with Pack(folder) as pack:
        smaller, larger = pack.choose("val", 3), pack.choose("val", 8)
    assert {ref.name for ref in smaller} <= {ref.name for ref in larger}
    # The digest of "photo/map/id" decides; this line is the promise that figures stay comparable for ever.
    assert sorted(ref.name for ref in smaller if ref.source == "beans") == ["beans_0/0/3", "beans_2/0/1", "beans_5/0/3"]


def test_area_limits_are_shares_of_the_photo():
    assert (evaluation.MIN_AREA_PIXELS, evaluation.MIN_AREA_SHARE, evaluation.MAX_AREA_SHARE) == (150, 0.003, 0.70)


def test_targets_are_photo_and_mask(folder):
    with Pack(folder) as pack:
        refs = pack.choose("val", 2)
        targets = list(pack.targets(refs))
    assert [item.name for item in targets] == [ref.name for ref in refs]
    for ref, item in zip(refs, targets, strict=True):
        assert item.image.shape == (HEIGHT, WIDTH, 3)
        assert np.array_equal(item.mask, block(HEIGHT, WIDTH, 10, 30 * ref.id - 28, 50, 30 * ref.id - 8))


def test_maps_with_more_than_255_ids(folder):
    labels = np.full((HEIGHT, WIDTH), 300, np.uint16)
    with zipfile.ZipFile(folder / "wide.zip", "w") as shard:
        shard.writestr("wide.jpg", jpeg(WIDTH, HEIGHT))
        shard.writestr("wide.m0.png", png(labels))
    with Pack(folder) as pack:
        (item,) = pack.targets([evaluation.ObjectRef("s", "wide", "wide.zip", 0, 300)])
    assert item.mask.all()


def test_a_broken_label_map_is_an_image_error(folder):
    with zipfile.ZipFile(folder / "bad.zip", "w") as shard:
        shard.writestr("bad.jpg", jpeg(WIDTH, HEIGHT))
        shard.writestr("bad.m0.png", png(np.zeros((4, 4), np.uint8)))
    with Pack(folder) as pack, pytest.raises(ImageError, match=r"bad\.m0\.png"):
        list(pack.targets([evaluation.ObjectRef("s", "bad", "bad.zip", 0, 1)]))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(lambda folder: (folder / "index.json").unlink(), "index.json cannot be read", id="no index"),
        pytest.param(lambda folder: (folder / "index.json").write_text("{"), "not the index", id="not JSON"),
        pytest.param(lambda folder: (folder / "index.json").write_text("[]"), "not the index", id="not a pack"),
        pytest.param(lambda folder: (folder / "shard.zip").unlink(), "shard.zip", id="no shard"),
        pytest.param(lambda folder: (folder / "shard.zip").write_bytes(b"PK"), "shard.zip", id="broken shard"),
    ],
)
def test_what_is_not_a_pack_is_named(folder, spoil, named):
    spoil(folder)
    with pytest.raises(ConfigError, match=named), Pack(folder) as pack:
        pack.choose("val", 1)


def test_unknown_split_and_empty_limit(folder):
    with Pack(folder) as pack:
        with pytest.raises(ConfigError, match="has no split 'test', it has train, val"):
            pack.choose("test", 1)
        with pytest.raises(ConfigError, match="limit is 0"):
            pack.choose("val", 0)


def test_a_whole_run(folder):
    with Pack(folder) as pack:
        summary = summarise(evaluate(pack.targets(pack.choose("val", 2)), discs(12), clicks=5))
    assert set(summary["sources"]) == {"beans", "cups"}
    assert summary["mean"]["miou@5"] > summary["mean"]["miou@1"] > 30
