"""How close the model as it is served comes to recorded click sequences of the released implementation.

    python -m benchmarks.parity tests/fixtures/model                # two sequences at T = 512, a minute
    python -m benchmarks.parity FOLDER --sequence seq_d --threads 1

FOLDER holds sequences.json, released_keys.json, the images, seq_*.npz and canny_*.npz as tests/fixtures/model does. The
weights are made by rule (tests/contract/model/weight_rule.py), the recorded Canny maps are injected.

Forced: each click begins with the recorded reference mask. Equal boxes and edge tokens are counted over the
clicks; the greatest differences of logits are those where the box is the recorded one, float16 records are given a
relative 1e-3. Free: the run keeps its own reference mask; counted are clicks that begin with exactly the recorded one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import typer

from inter2former import reference_mask
from inter2former.checkpoints import from_released
from inter2former.images import Frame
from inter2former.nn.attention import edge_tokens
from inter2former.nn.canny import CannyMaps, canny
from inter2former.nn.prompt_embedding import prompt_box
from inter2former.runtime.packing import pack
from inter2former.terminal import print_rows
from tests.contract.model.weight_rule import build_state


def bits(packed: npt.NDArray[np.uint8], *shape: int) -> npt.NDArray[np.bool_]:
    """np.packbits undone."""
    return np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).astype(np.bool_)


def recorded_maps(folder: Path, image: str, own: CannyMaps) -> CannyMaps:
    """The release's Canny maps; its magnitude is not recorded at every size, and ours stands in for it."""
    shape = own.magnitude.shape
    data = np.load(folder / f"canny_{Path(image).stem}_{shape[-1]}.npz")
    return CannyMaps(
        torch.from_numpy(data["grad_mag"]).view(shape) if "grad_mag" in data else own.magnitude,
        torch.from_numpy(data["orientation_div45"].astype(np.float32)).view(shape),
        torch.from_numpy(bits(data["is_max"], *shape)),
    )


def compare(folder: Path, name: str, info: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    data = np.load(folder / f"{name}.npz")
    size, clicks = info["T"], len(info["clicks"])
    shapes = json.loads((folder / "released_keys.json").read_text())
    model = pack(from_released(build_state(shapes, info["salt"])))
    rgb = np.ascontiguousarray(cv2.imread(str(folder / info["image"]))[..., ::-1])
    frame = Frame(*rgb.shape[:2], size, "released")
    image = frame.prepare(rgb)
    with torch.inference_mode():
        encoding = model.encode_with_canny(image[None], recorded_maps(folder, info["image"], canny(image[None])))

    boxes = edges = same_reference = 0
    low, logits, wrong, wrong_final = [], [0.0], [], []
    overlaps = []
    state = reference_mask.initial(size)
    for k, group in enumerate(info["clicks"]):
        reference, recorded_final = data[f"c{k}_ref_in"], bits(data[f"c{k}_final_sign"], *rgb.shape[:2])
        prompt = prompt_box(reference)
        edge = edge_tokens(reference, prompt).ravel()
        edges += prompt == tuple(info["dpe_boxes"][k]) and np.array_equal(
            edge, bits(data[f"c{k}_edge_tokens"], len(edge))
        )
        decoded = model.decode(encoding, reference)
        low.append(np.abs(decoded.low.numpy() - data[f"c{k}_low"]).max())
        if list(decoded.box) == info["boxes"][k]:
            boxes += 1
            recorded = data[f"c{k}_logits_s8"]
            off = np.abs(decoded.logits.numpy()[4::8, 4::8] - recorded.astype(np.float32))
            slack = 1e-3 * np.abs(recorded.astype(np.float32)) if recorded.dtype == np.float16 else 0
            logits.append((off - slack).max())
        wrong.append(((decoded.logits.numpy() > 0) != bits(data[f"c{k}_logits_sign"], size, size)).mean())
        wrong_final.append((frame.mask_from_logits(decoded.logits) != recorded_final).mean())

        positions = [(*frame.model_pixel(x, y), sign == "positive") for y, x, sign in group]
        state = reference_mask.paint_clicks(state, positions, 5)
        same_reference += np.array_equal(state, reference)
        free = model.decode(encoding, state).logits
        state = reference_mask.apply_prediction(state, free.numpy() > 0)
        final = frame.mask_from_logits(free)
        overlaps.append((final & recorded_final).sum() / max((final | recorded_final).sum(), 1))
    return {
        "sequence": name,
        "T": size,
        "boxes": f"{boxes}/{clicks}",
        "edge tokens": f"{edges}/{clicks}",
        "max low": f"{max(low):.1e}",
        "max logits": f"{max(logits):.1e}",
        "wrong signs": f"{max(wrong):.4%}",
        "wrong final": f"{max(wrong_final):.4%}",
        "reference (free)": f"{same_reference}/{clicks}",
        "least IoU (free)": f"{min(overlaps):.4f}",
    }


def main(
    folder: Path,
    sequence: Annotated[
        list[str] | None, typer.Option(help="One of sequences.json; again for more. All by default.")
    ] = None,
    threads: int = 1,
) -> None:
    """Print the table for the sequences of FOLDER."""
    torch.set_num_threads(threads)
    sequences = json.loads((folder / "sequences.json").read_text())
    rows = [compare(folder, name, sequences[name]) for name in sequence or sorted(sequences)]
    print_rows(f"Served in float32, {threads} threads, against the records of the release", rows)


if __name__ == "__main__":
    typer.run(main)
