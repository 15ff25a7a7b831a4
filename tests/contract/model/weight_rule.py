"""Weights by rule: what the recorded outputs were computed with, reproducible from a key, a shape and a salt.

Raw PCG64 words seeded by crc32("salt/key") give uniform noise of unit variance; layers scale it by fan-in, and a
planted foreground path makes clicks move the prediction.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32] | npt.NDArray[np.int64]

_PLANTED = {  # first output row: a quarter of the noise, and this much more on input channel 0
    r"neck\.ref_conv\.stem\.0\.weight": 0.75 / 9,
    r"neck\.ref_conv\.stem\.[246]\.weight": 1 / 9,
    r"decode_head\.mlp\.[0246]\.weight": 1.0,
    r"decode_head\.upsamplers\.[0-3]\.conv\.weight": 1 / 9,
}
_FIRST_BIAS = {
    r"neck\.ref_conv\.stem\.[0246]\.bias": 0.0,
    r"decode_head\.mlp\.[024]\.bias": 0.0,
    r"decode_head\.mlp\.6\.bias": -3.0,
    r"decode_head\.upsamplers\.3\.conv\.bias": -0.4,
}
_NORMS = re.compile(
    r".*\.(norm[12]?|shared_ln|select_ln)\.\w+|backbone\.(multi_scale_fusion\.\d\.0|lateral_convs\.\d\.1|out_conv\.2)\.\w+"
)
_GAINS = [
    (r"neck\.ref_conv\..*", 0.5),
    (r"edge_detector\.lateral_convs\..*", 0.15),
    (r"decode_head\.upsamplers\..*", 0.8),
]


def build_state(shapes: Mapping[str, Sequence[int]], salt: str) -> dict[str, Array]:
    """The whole state dict for a salt."""
    return {key: _tensor(key, tuple(shape), salt) for key, shape in shapes.items()}


def _noise(key: str, shape: tuple[int, ...], salt: str) -> npt.NDArray[np.float64]:
    words = np.random.PCG64(zlib.crc32(f"{salt}/{key}".encode())).random_raw(int(np.prod(shape, dtype=np.int64)))
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((2.0 * uniform - 1.0) * np.sqrt(3.0)).reshape(shape)


def _tensor(key: str, shape: tuple[int, ...], salt: str) -> Array:
    leaf = key.rsplit(".", 1)[-1]
    if leaf in ("step", "steps"):
        return np.zeros(shape, np.int64)
    if key == "backbone.rope.freqs":
        return (10000.0 ** (-np.arange(shape[0]) / shape[0])).astype(np.float32)
    if key.startswith("edge_detector.canny."):
        return _canny_kernel(key.split(".")[2])
    z = _noise(key, shape, salt)
    if _NORMS.fullmatch(key):
        z = 0.1 * z + (1.0 if leaf == "weight" else 0.0)
    elif leaf in ("pos_embed", "padding"):
        z *= 0.5
    elif leaf == "codebook":
        z *= 0.7
    elif key == "neck.ref_embeds.weight":
        z[:, 0] = (-40.0, -0.5, 0.5, 5.0, 60.0)
    elif leaf in ("bias", "exp_bias") or leaf.startswith("select_ffn_b"):
        z *= 0.05
        for pattern, value in _FIRST_BIAS.items():
            if re.fullmatch(pattern, key):
                z[0] = value
    else:
        fan_in = shape[-1] if leaf.startswith("select_ffn_w") else int(np.prod(shape[1:]))
        gain = next((g for pattern, g in _GAINS if re.fullmatch(pattern, key)), 2.0 if ".qkv" in key else 1.0)
        z *= gain / np.sqrt(fan_in)
        for pattern, value in _PLANTED.items():
            if re.fullmatch(pattern, key):
                z[0] *= 0.25
                z[0, 0] += value
    return z.astype(np.float32)


def _canny_kernel(name: str) -> npt.NDArray[np.float32]:
    gauss = np.exp(-0.5 * np.arange(-2.0, 3.0) ** 2)
    gauss /= gauss.sum()
    sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float64)
    directions = np.zeros((8, 1, 3, 3))
    for index, (dy, dx) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]):
        directions[index, 0, 1, 1], directions[index, 0, 1 + dy, 1 + dx] = 1, -1
    kernels = {
        "g_h": gauss.reshape(1, 1, 1, 5),
        "g_v": gauss.reshape(1, 1, 5, 1),
        "sobh": sobel.reshape(1, 1, 3, 3),
        "sobv": sobel.T.reshape(1, 1, 3, 3),
        "dirf": directions,
    }
    return kernels[name].astype(np.float32)
