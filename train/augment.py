"""What happens to pixels, and to nothing else: colour, noise and compression of a crop; blending of a pasted object.

Geometry lives in data.py, because labels have to follow it. Everything takes an explicit random generator.
"""

from __future__ import annotations

import cv2
import numpy as np

Array = np.ndarray
Rng = np.random.Generator


def photometric(rgb: Array, rng: Rng) -> Array:
    """uint8 [H, W, 3] -> uint8 [H, W, 3]: brightness, contrast, gamma, cast, grey, inversion, blur, noise, JPEG.

    Every step has its own probability; ranges are wide enough for scans, X-rays and phones.
    """
    if rng.random() < 0.8:  # one look-up table a channel covers brightness, contrast, gamma and colour cast
        ramp = np.arange(256, dtype=np.float32) / 255
        ramp = ramp ** np.exp(rng.uniform(-0.45, 0.45))
        ramp = (ramp - 0.5) * (1 + rng.uniform(-0.3, 0.4)) + 0.5 + rng.uniform(-0.2, 0.2)
        cast = rng.uniform(-0.06, 0.06, 3) if rng.random() < 0.6 else np.zeros(3)
        table = np.clip((ramp[:, None] + cast) * 255, 0, 255).astype(np.uint8)
        rgb = cv2.LUT(rgb, table[None])
    roll = rng.random()
    if roll < 0.12:
        rgb = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    elif roll < 0.20:
        rgb = np.ascontiguousarray(rgb[..., rng.permutation(3)])
    elif roll < 0.45:
        hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + rng.integers(-10, 11)) % 180
        hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(0.5, 1.5), 0, 255).astype(np.uint8)
        rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if rng.random() < 0.03:
        rgb = 255 - rgb
    if rng.random() < 0.12:
        rgb = cv2.GaussianBlur(rgb, (0, 0), rng.uniform(0.4, 1.6))
    if rng.random() < 0.12:
        noise = rng.normal(0, rng.uniform(2, 14), (*rgb.shape[:2], 1 if rng.random() < 0.5 else 3))
        rgb = np.clip(rgb + noise.astype(np.float32), 0, 255).astype(np.uint8)
    if rng.random() < 0.15:
        _, data = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 91))])
        rgb = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return rgb


def dihedral(array: Array, turns: int, flip: bool) -> Array:
    """Quarter turns, then a mirror image left to right; the first two axes are rows and columns."""
    array = np.rot90(array, turns)
    return np.ascontiguousarray(array[:, ::-1] if flip else array)


def blend(canvas: Array, cutout: Array, alpha: Array, top: int, left: int, *, feather: float = 0.0) -> Array:
    """Lay `cutout` uint8 [h, w, 3] with `alpha` uint8 [h, w] onto `canvas` in place; parts outside are cut off.

    feather    sigma in pixels of a blur of the edge, so that the network cannot learn the seam
    returns    bool [H, W]: where the pasted object is (alpha above one half)
    """
    where = np.zeros(canvas.shape[:2], bool)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + alpha.shape[0], canvas.shape[0]), min(left + alpha.shape[1], canvas.shape[1])
    if y1 <= y0 or x1 <= x0:
        return where
    part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    where[y0:y1, x0:x1] = alpha[part] > 127
    soft = cv2.GaussianBlur(alpha, (0, 0), feather) if feather > 0 else alpha
    a = soft[part].astype(np.float32)[..., None] / 255
    base = canvas[y0:y1, x0:x1]
    base[...] = (base + a * (cutout[part].astype(np.float32) - base) + 0.5).astype(np.uint8)
    return where
