"""The judge of the CVAT tests: what CVAT's server and its page, new and old, make of an interactor's answer.

Re-tells the rules of the platform's sources; `test_the_judge_agrees_with_the_recorded_verdicts` holds it to the
recorded cases. Knows nothing of our code.
"""

import numpy as np


class Wrong(Exception):
    """The server or the page would fail, or draw something else than was meant."""


def draws(answer, width, height, page="new"):
    """The masks that the page shows, bool [H, W] each; [] is its message "No shapes to display"."""
    if not isinstance(answer, dict):
        raise Wrong("the page reads keys of an object")
    if "mask" in answer:
        return _draws_mask(answer, width, height, page)
    if page == "old":
        raise Wrong("Cannot read properties of undefined (reading 'length')")
    if not isinstance(answer.get("shapes"), list):
        raise Wrong("response.shapes is not iterable")
    shown = []
    for shape in answer["shapes"]:
        if not isinstance(shape, dict) or not isinstance(shape.get("points"), list):
            raise Wrong("a shape without points")
        if shape.get("type", "mask") != "mask":
            continue  # the page drops other types
        confidence = _confidence(shape.get("attributes"))
        mask = decode_points(shape["points"], width, height)
        if mask is not None and mask.sum() >= 3 and confidence >= 0.5:  # fewer contour points, lower than the slider
            shown.append(mask)
    return shown


def decode_points(points, width, height):
    """bool [H, W] of CVAT's run lengths; None for fewer than six numbers, which the page drops."""
    if len(points) < 6:
        return None
    if any(isinstance(number, bool) or number != int(number) for number in points):
        raise Wrong("whole numbers are expected")
    *runs, left, top, right, bottom = (int(number) for number in points)
    if not (0 <= left <= right < width and 0 <= top <= bottom < height):
        raise Wrong("the box is not inside the image")
    if min(runs) < 0 or 0 in runs[1:]:
        raise Wrong("the runs are not canonical")
    if sum(runs) != (right - left + 1) * (bottom - top + 1):
        raise Wrong("the runs do not fill the box")
    mask = np.zeros((height, width), bool)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask[top : bottom + 1, left : right + 1] = flat.reshape(bottom - top + 1, right - left + 1)
    return mask


def move_to_full_image(answer, region, width, height):
    """What the server does with the answer for a crop; `region` is left, top, right, bottom (half-open)."""
    left, top, right, bottom = region
    if "mask" in answer:
        part = np.array(answer["mask"])
        if part.shape != (bottom - top, right - left):
            raise Wrong("could not broadcast input array: 500")
        full = np.zeros((height, width), part.dtype)
        full[top:bottom, left:right] = part
        return {"mask": full.tolist()}
    moved = []
    for shape in answer["shapes"]:
        *runs, x1, y1, x2, y2 = shape["points"]
        moved.append({**shape, "points": [*runs, x1 + left, y1 + top, x2 + left, y2 + top]})
    return {"shapes": moved}


def _draws_mask(answer, width, height, page):
    rows = answer["mask"]
    if not isinstance(rows, list) or not rows or any(not isinstance(row, list) for row in rows):
        raise Wrong("mask is no list of rows")
    if len({len(row) for row in rows}) != 1:
        raise Wrong("rows differ in length")
    mask = np.array(rows)
    if mask.dtype.kind not in "bi":
        raise Wrong("mask holds no numbers")
    if "bounds" in answer:
        if page == "new":
            raise Wrong("the page ignores bounds and draws at the top left")
        left, top, right, bottom = answer["bounds"]
        full = np.zeros((height, width), mask.dtype)
        full[top : bottom + 1, left : right + 1] = mask
        mask = full
    if mask.shape != (height, width):
        raise Wrong("drawn at the top left, unscaled")
    if len(set(np.unique(mask).tolist()) - {0}) > 1:
        raise Wrong("every change of value counts as an edge")
    return [mask > 0] if (mask > 0).any() else []


def _confidence(attributes):
    if not attributes:
        return 1.0
    if not all(isinstance(one["spec_id"], int) and isinstance(one["value"], str) for one in attributes):
        raise Wrong("the page throws all attributes away")
    return next((float(one["value"]) for one in attributes if one["spec_id"] == 0), 1.0)
