"""The command line as a program sees it: exit status, JSON fields, files written, one sentence for an error."""

import io
import json
import zipfile

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import make_image, make_tiny_model

from inter2former import Segmenter, bench, cli, masks
from inter2former.checkpoints import save_checkpoint
from inter2former.config import tiny
from inter2former.images import Frame
from inter2former.nn.model import Inter2Former
from inter2former.reference_mask import initial, paint_clicks
from inter2former.runtime import native, packing

WIDTH, HEIGHT = 60, 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(path, Inter2Former(tiny()), provenance={"recipe": "random"})
    return str(path)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def same_threads():
    torch_threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(torch_threads)
    cv2.setNumThreads(cv2_threads)
    native.set_threads(torch_threads)


@pytest.fixture
def run(capsys):
    """Run one command: (status, standard output, standard error)."""

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def answer(result):
    status, out, err = result
    assert (status, err) == (0, "")
    return json.loads(out)


# -- segment ---------------------------------------------------------------------------------------------------------


def test_segment_json(run, photo, checkpoint):
    result = answer(run("segment", photo, "--click", "30,20", "--click", "2,3,-", "--checkpoint", checkpoint, "--json"))
    assert set(result) == {"width", "height", "score", "clicks", "rle", "timing"}
    assert (result["width"], result["height"]) == (WIDTH, HEIGHT)
    assert result["clicks"] == [{"x": 30.0, "y": 20.0, "positive": True}, {"x": 2.0, "y": 3.0, "positive": False}]
    assert 0 <= result["score"] <= 1
    assert {"encode", "click"} <= set(result["timing"])
    mask = masks.rle_decode(result["rle"])
    assert mask[20, 30]
    assert not mask[3, 2]


def test_segment_writes_mask_and_overlay(run, photo, checkpoint, tmp_path):
    out, overlay = tmp_path / "new" / "mask.png", tmp_path / "overlay.png"
    status, text, _ = run(
        "segment", photo, "--click", "30,20,+", "--checkpoint", checkpoint, "--out", out, "--overlay", overlay
    )
    assert status == 0
    assert f"wrote {out}" in text
    assert f"wrote {overlay}" in text
    assert " ms" in text
    with Image.open(out) as mask, Image.open(overlay) as picture:
        assert mask.size == picture.size == (WIDTH, HEIGHT)
        assert set(np.unique(np.asarray(mask))) <= {0, 255}
        assert picture.mode == "RGB"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "overlay.png"}  # no temporary files stay


def test_segment_json_equals_the_file(run, photo, checkpoint, tmp_path):
    out = tmp_path / "mask.png"
    result = answer(run("segment", photo, "--box", "50,30,10,5", "--checkpoint", checkpoint, "--out", out, "--json"))
    assert np.array_equal(masks.rle_decode(result["rle"]), masks.png_to_mask(out.read_bytes()))


def test_segment_corrects_an_initial_mask(run, photo, checkpoint, tmp_path):
    start = np.zeros((HEIGHT, WIDTH), bool)
    start[10:30, 10:40] = True
    path = tmp_path / "start.png"
    path.write_bytes(masks.mask_to_png(start))
    arguments = ("segment", photo, "--initial-mask", path, "--checkpoint", checkpoint, "--model-size", "256", "--json")
    result = answer(run(*arguments, "--click", "20,20,-"))
    assert not masks.rle_decode(result["rle"])[20, 20]


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        pytest.param(["--click", "3"], 2, "'3' is not of the form X,Y", id="one number"),
        pytest.param(["--click", "3,4,?"], 2, "'3,4,?' is not of the form", id="unknown sign"),
        pytest.param(["--click", "nan,4"], 2, "not a finite number", id="not a number"),
        pytest.param(["--box", "1,2,3"], 2, "X0,Y0,X1,Y1", id="three numbers"),
        pytest.param(["--box", "1,2,3,inf"], 2, "not a finite number", id="infinite box"),
        pytest.param(["--click", "3,4", "--model-size", "big"], 2, "'big' is not 'auto'", id="size is a word"),
        pytest.param(["--click", "3,4", "--threads", "0"], 2, "'--threads'", id="no threads"),
        pytest.param(["--clik", "3,4"], 2, "No such option", id="unknown option"),
        pytest.param(["--click", "3,4", "--model-size", "100"], 1, "model_size is 100", id="impossible size"),
        pytest.param(["--click", "60,4"], 1, "outside the image of 60 x 40", id="click outside"),
        pytest.param(["--box", "70,50,80,60"], 1, "no area inside the image", id="box outside"),
        pytest.param([], 1, "no prompt", id="no prompt"),
        pytest.param(["--click", "3,4", "--initial-mask", "no.png"], 1, "no.png cannot be read", id="no mask"),
        pytest.param(
            ["--click", "3,4", "--out", "{photo}/mask.png"], 1, "photo.png: File exists", id="cannot be written"
        ),
    ],
)
def test_segment_errors_are_one_sentence(run, photo, checkpoint, arguments, status, named):
    arguments = [argument.replace("{photo}", photo) for argument in arguments]
    got, out, err = run("segment", photo, "--checkpoint", checkpoint, "--json", *arguments)
    assert (got, out) == (status, "")
    assert err.startswith("inter2former: ")
    assert err.count("\n") == 1
    assert named in err


def test_segment_wants_somewhere_to_write(run, photo):
    status, _, err = run("segment", photo, "--click", "3,4")
    assert status == 2
    assert "--out, --overlay or --json" in err


def test_segment_unreadable_image_and_checkpoint(run, photo, checkpoint, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    for arguments in (
        [text, "--checkpoint", checkpoint],
        [tmp_path / "nothing.jpg", "--checkpoint", checkpoint],
        [photo, "--checkpoint", text],
    ):
        status, out, err = run("segment", *arguments, "--click", "3,4", "--json")
        assert (status, out, err.count("\n")) == (1, "", 1)


def test_no_command(run):
    assert run() == (2, "", "inter2former: Missing command. See inter2former --help.\n")


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(f"  {name} " in out for name in ("segment", "evaluate", "bench", "convert", "info"))


def test_interrupt_is_no_traceback(run, photo, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_segmenter", interrupted)
    assert run("segment", photo, "--click", "3,4", "--json") == (130, "", "")


# -- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pack(tmp_path):
    folder = tmp_path / "pack"
    folder.mkdir()
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[10:30, 10:40] = 1
    encoded = {"jpg": io.BytesIO(), "m0.png": io.BytesIO()}
    Image.new("RGB", (WIDTH, HEIGHT), (10, 90, 200)).save(encoded["jpg"], "JPEG")
    Image.fromarray(labels).save(encoded["m0.png"], "PNG")
    with zipfile.ZipFile(folder / "a.zip", "w") as shard:
        for ending, data in encoded.items():
            shard.writestr(f"one.{ending}", data.getvalue())
        shard.writestr("one.json", json.dumps({"objects": [{"map": 0, "id": 1, "area": 600}]}))
    fields = ["id", "source", "split", "shard", "w", "h"]
    index = {"fields": fields, "samples": [["one", "blocks", "val", "a.zip", WIDTH, HEIGHT]]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_evaluate_json(run, pack, checkpoint):
    result = answer(run("evaluate", pack, "--limit", 1, "--clicks", 3, "--checkpoint", checkpoint, "--json"))
    assert set(result) == {"sources", "mean", "seconds_per_click", "seconds_per_click_online", "config"}
    assert set(result["sources"]) == {"blocks"}
    assert {"objects", "miou@1", "miou@3", "noc85", "noc90", "noc95"} <= set(result["sources"]["blocks"])
    assert result["mean"] == result["sources"]["blocks"]
    assert result["config"]["clicks"] == 3
    assert result["config"]["model"]["name"] == "tiny"


def test_evaluate_table(run, pack, checkpoint):
    status, out, err = run("evaluate", pack, "--clicks", 10, "--checkpoint", checkpoint, "--threads", 1)
    assert (status, err) == (0, "")
    assert all(head in out for head in ("source", "mIoU@10", "BIoU@5", "NoC90", "blocks", "mean", "ms a click"))


def test_evaluate_what_is_no_pack(run, checkpoint, tmp_path):
    status, _, err = run("evaluate", tmp_path, "--checkpoint", checkpoint)
    assert status == 1
    assert "index.json" in err


# -- bench, convert, info --------------------------------------------------------------------------------------------


@pytest.fixture
def others(monkeypatch):
    """Stand-ins for the other decoders, which take seconds to make; the list says how often each was clicked."""
    clicks = []
    makers = {name: lambda name=name: lambda: clicks.append(name) for name in bench.OTHERS}
    monkeypatch.setattr(bench, "OTHERS", makers)
    return clicks


@pytest.mark.parametrize("installed", [True, False])
def test_bench_json(run, monkeypatch, others, installed):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(bench, "SESSION_CLICKS", 2)
    status, out, _ = run("bench", "--preset", "tiny", "--runs", 1, "--areas", "0.1,0.2", "--threads", 1, "--json")
    assert status == 0
    result = json.loads(out)
    assert set(result) == {"machine", "threads", "rows"}
    assert result["threads"] == 1
    keys = {"what", "preset", "size", "area", "edge_rule", "contender", "median_ms", "p90_ms", "runs"}
    assert all(set(row) == keys for row in result["rows"])
    ours = {"ours", "ours_pytorch"}
    if native.choose_precision("auto") == "bfloat16":
        ours.add("ours_bfloat16")
    sams = {"sam_vit_b", "sam2_tiny"} if installed else set()
    for what, n_rows in (("encode", 1), ("first_click", 1), ("click", 2), ("session20", 1)):
        contenders = [row["contender"] for row in result["rows"] if row["what"] == what]
        wanted = ours | sams if "click" in what else ours
        assert sorted(contenders) == sorted([*wanted] * n_rows)
    assert set(others) == sams
    assert all(0 < row["median_ms"] <= row["p90_ms"] for row in result["rows"])


def test_bench_table_of_a_checkpoint(run, monkeypatch, others, checkpoint):
    monkeypatch.setattr(bench, "SESSION_CLICKS", 1)
    status, out, _ = run("bench", "--checkpoint", checkpoint, "--runs", 1, "--areas", "0.1", "--sizes", "256")
    assert status == 0
    assert "median_ms" in out
    assert "first_click" in out


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        pytest.param(["--preset", "huge"], 1, "'huge' is unknown", id="preset"),
        pytest.param(["--sizes", "100"], 1, "multiples of 256", id="size"),
        pytest.param(["--areas", "2"], 1, "between 0 and 1", id="area"),
        pytest.param(["--areas", "a"], 2, "'a' is not a list of numbers", id="not a number"),
    ],
)
def test_bench_errors(run, arguments, status, named):
    got, _, err = run("bench", *arguments)
    assert got == status
    assert named in err


@pytest.mark.parametrize("packed", [True, False])
def test_a_benchmark_says_what_is_upsampled(packed):
    model = make_tiny_model()
    image = Frame(120, 160, 256).prepare(make_image())
    if packed:
        packing.pack(model)
    encoding, reference = model.encode(image), paint_clicks(initial(256), [(90, 100, True)], 5)
    found = model.decode(encoding, reference).box
    box = bench.box_of(bench.disc(256, 0.2))
    assert box not in (found, (0, 0, 16, 16))
    for wanted, want in ((box, box), (None, found)):
        bench.upsample_in(model, wanted)
        inside = Segmenter(model)._decode(encoding, reference)
        assert inside.box == want


def test_a_disc_covers_its_area():
    assert bench.disc(256, 0.1).mean() == pytest.approx(0.1, abs=0.002)


def test_convert_refuses_what_is_not_released(run, tmp_path):
    torch.save({"stranger": torch.zeros(1)}, tmp_path / "odd.pth")
    status, _, err = run("convert", tmp_path / "odd.pth", tmp_path / "out.safetensors")
    assert status == 1
    assert "stranger" in err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("as_json", [True, False])
def test_convert_says_what_it_wrote(run, monkeypatch, tmp_path, as_json):
    # The conversion itself, of a 94 M model, has its own tests; here it is the arguments that count.
    calls = []
    monkeypatch.setattr(cli, "convert_released", lambda *arguments: calls.append(arguments) or "abc")
    target = tmp_path / "out.safetensors"
    status, out, _ = run("convert", "r.pth", target, "--edge-rule", "released", *(["--json"] if as_json else []))
    assert status == 0
    assert [str(argument) for argument in calls[0]] == ["r.pth", str(target), "released"]
    if as_json:
        assert json.loads(out) == {"out": str(target), "sha256": "abc", "edge_rule": "released"}
    else:
        assert str(target) in out


def test_info(run, checkpoint):
    result = answer(run("info", "--checkpoint", checkpoint, "--json"))
    assert set(result) == {"version", "native", "torch", "machine", "checkpoint"}
    assert result["torch"] == torch.__version__
    assert {"available", "instruction_set", "threads"} <= set(result["native"])
    assert result["checkpoint"]["provenance"] == {"recipe": "random"}
    assert result["checkpoint"]["config"]["name"] == "tiny"
    status, out, _ = run("info", "--checkpoint", checkpoint)
    assert status == 0
    assert "recipe: random" in out


def test_machine_where_there_is_no_cpuinfo(monkeypatch):
    monkeypatch.setattr(bench, "Path", lambda _: _NoFile())
    assert bench.machine()["cpu"]


class _NoFile:
    def read_text(self):
        raise FileNotFoundError


def test_version_of_a_source_tree():
    assert bench.version("no-such-distribution") is None
