"""Encodings on disk: found again, bounded, and never in the way of an answer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from inter2former.errors import ConfigError
from inter2former.nn.model import Features
from inter2former.prompts import Click
from inter2former.runtime.encoding_folder import EncodingFolder
from inter2former.segmenter import Segmenter, load_segmenter

RNG = np.random.default_rng(5)
IMAGES = [RNG.integers(0, 255, (60, 80, 3), dtype=np.uint8) for _ in range(3)]
CLICKS = [Click(40, 30), Click(10, 10, False)]


def kept(checkpoint: Path, folder: Path, budget: int = 2**30) -> Segmenter:
    segmenter = load_segmenter(checkpoint, model_size=256)
    segmenter.keep_encodings(folder, budget)
    return segmenter


def encoding(value: float) -> Features:
    return Features(torch.full((1, 4, 2, 2), value), [torch.full((1, 2, 4, 4), value), torch.zeros(1, 1, 8, 8)])


def test_another_process_finds_what_was_encoded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = kept(tiny_checkpoint, tmp_path / "made" / "here")
    masks = [first.segment(image, CLICKS).mask for image in IMAGES]
    assert first.encodes == 3
    again = kept(tiny_checkpoint, tmp_path / "made" / "here")
    answers = [again.segment(image, CLICKS) for image in IMAGES]
    assert again.encodes == 0
    assert not any(answer.encoded for answer in answers)
    assert all(np.array_equal(answer.mask, mask) for answer, mask in zip(answers, masks, strict=True))
    info = again.folder_info()
    assert info is not None
    assert (info.files, info.hits, info.evictions) == (3, 3, 0)
    assert info.nbytes == sum(path.stat().st_size for path in (tmp_path / "made").rglob("*.safetensors"))
    again.segment(IMAGES[0], CLICKS, model_size=512)  # another T is another encoding
    assert again.encodes == 1


def test_the_least_recently_used_leave_within_the_budget(tmp_path: Path) -> None:
    size = len_of_one(tmp_path)
    folder = EncodingFolder(tmp_path / "a", 2 * size, "weights", (Features,))
    for number, name in enumerate(("one", "two")):
        folder.store(name, encoding(number))
        os.utime(tmp_path / "a" / "weights" / f"{name}.safetensors", (number, number))
    assert folder.load("one") is not None
    folder.store("three", encoding(3))
    assert folder.load("two") is None
    assert folder.info().nbytes == 2 * size
    assert folder.info().evictions == 1
    # The order is that of use, also after a restart; other owners' files count, and leave too.
    other = EncodingFolder(tmp_path / "a", size, "newer", (Features,))
    assert other.info().files == 1
    assert (tmp_path / "a" / "weights" / "three.safetensors").exists()
    other.store("x", encoding(1))
    assert [path.name for path in (tmp_path / "a").rglob("*.safetensors")] == ["x.safetensors"]
    tight = EncodingFolder(tmp_path / "b", size - 1, "weights", (Features,))
    tight.store("one", encoding(1))
    assert tight.load("one") is None


def len_of_one(tmp_path: Path) -> int:
    probe = EncodingFolder(tmp_path / "probe", 2**20, "weights", (Features,))
    probe.store("one", encoding(1))
    return probe.info().nbytes


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    folder = EncodingFolder(tmp_path, 2**20, "weights", (Features,))
    made = Features(torch.randn(1, 3, 2, 2), [torch.randn(1, 2, 4, 4) for _ in range(12)])
    folder.store("name", made)
    found = folder.load("name")
    assert torch.equal(found.tokens, made.tokens)
    assert all(torch.equal(a, b) for a, b in zip(found.edges, made.edges, strict=True))


@pytest.mark.parametrize("damage", ["short", "empty", "noise", "nan", "foreign", "gone"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = EncodingFolder(tmp_path, 2**20, "weights", (Features,))
    folder.store("name", encoding(float("nan") if damage == "nan" else 1.0))
    (path,) = tmp_path.rglob("*.safetensors")
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        changed = {
            "short": data[:-1],
            "empty": b"",
            "noise": b"?" * 500,
            "foreign": data.replace(b"Features/t", b"Features/x"),
        }
        path.write_bytes(changed.get(damage, data))
    assert folder.load("name") is None
    assert not path.exists()
    assert folder.info().nbytes == 0
    folder.store("name", encoding(2.0))
    assert folder.load("name") is not None


def test_a_folder_that_fails_costs_no_answer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    segmenter = kept(tiny_checkpoint, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inter2former.runtime.encoding_folder.write_atomically", full)
    for image in IMAGES:
        segmenter.segment(image, CLICKS)
    assert segmenter.encodes == 3
    assert caplog.text.count("No space left") == 1
    assert segmenter.folder_info().nbytes == 0  # type: ignore[union-attr]


def test_what_cannot_be_kept_is_said_at_once(tmp_path: Path, tiny_model: object) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        EncodingFolder(tmp_path / "file", 1, "weights", (Features,))
    with pytest.raises(ConfigError, match="digest"):
        Segmenter(tiny_model).keep_encodings(tmp_path, 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="budget"):
        EncodingFolder(tmp_path, -1, "weights", (Features,))
