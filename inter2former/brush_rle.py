"""Label Studio's brush run-length code: a mask as the byte list that stands in `value.rle`. Nothing else lives here:
no JSON, no labels; COCO's run lengths are in masks.py.

The code packs the RGBA bytes of the whole image, row by row, most significant bit first:

    32 bits   number of values, 4 * height * width
     5 bits   bits of a value - 1 (always 7)
    4 x 4     bits of a run length - 1, for four classes (the page and we write 2, 3, 7, 15: 3, 4, 8, 16 bits)
    then runs until all values are there:
     1 bit    1: one value repeated, 0: that many values in full
     2 bits   class of the run length, then the run length - 1 in the bits of that class
     8 bits   the value, or 8 bits for each value
    then zero bits to the next byte

A pixel belongs to the mask when its alpha byte is not 0; we write all four bytes as 255 (mask) or 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from inter2former.errors import PromptError

MAX_PIXELS = 100_000_000  # the images' own limit: a mask belongs to an image
HEADER_BITS = 32 + 5 + 4 * 4
WIDTHS = (3, 4, 8, 16)  # bits of a run length by class, as the platform writes them
_HEADER_TAIL = [bit == "1" for bit in format(7, "05b") + "".join(format(width - 1, "04b") for width in WIDTHS)]
_TOKENS_AT_ONCE = 1 << 16  # bounds the scratch memory of a speckled mask


def encode(mask: NDArray[np.generic]) -> list[int]:
    """The byte values (0..255) for a mask [H, W] of any real dtype; not 0 is inside. PromptError on another shape."""
    inside = np.asarray(mask)
    if inside.ndim != 2 or inside.size == 0:
        raise PromptError(f"A brush mask is an array [height, width], not one of shape {list(inside.shape)}.")
    _check_size(*inside.shape)
    flat = (inside if inside.dtype == np.bool_ else inside != 0).ravel()

    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    lengths = np.diff(starts, append=flat.size) * 4  # in values: four channels a pixel
    longest = 1 << WIDTHS[-1]
    pieces = (lengths - 1) // longest + 1  # a run that is too long for a token becomes full tokens and a rest
    last = np.cumsum(pieces) - 1
    token_length = np.full(int(pieces.sum()), longest, dtype=np.int64)
    token_length[last] = lengths - (pieces - 1) * longest
    token_value = np.repeat(np.where(flat[starts], 255, 0), pieces)

    token_class = np.searchsorted([1 << width for width in WIDTHS], token_length)
    width = np.asarray(WIDTHS)[token_class]
    token = (((4 | token_class) << width | (token_length - 1)) << 8) | token_value  # 1, class, length - 1, value
    token_bits = 3 + width + 8

    bits = [np.array([bit == "1" for bit in format(flat.size * 4, "032b")] + _HEADER_TAIL)]
    for first in range(0, token.size, _TOKENS_AT_ONCE):
        some = slice(first, first + _TOKENS_AT_ONCE)
        ends = np.cumsum(token_bits[some])
        shift = np.repeat(ends, token_bits[some]) - np.arange(1, ends[-1] + 1)  # bits to the right of this one
        bits.append((np.repeat(token[some], token_bits[some]) >> shift & 1).astype(bool))
    return np.packbits(np.concatenate(bits)).tolist()


def decode(
    rle: Sequence[int] | bytes | NDArray[np.uint8], height: int, width: int, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.bool_]:
    """bool [height, width]: where alpha is not 0.

    The bytes may come from anybody: PromptError when they are not bytes, are cut short, run past the end, or belong
    to an image of another size. Memory is checked before it is taken, and the work is linear in the number of bytes.
    Bytes after the last run are ignored.
    """
    _check_size(height, width, max_pixels)
    data = _as_bytes(rle)
    total = len(data) * 8
    if total < HEADER_BITS:
        raise PromptError(f"The brush RLE has {len(data)} bytes and ends inside its header.")
    header = int.from_bytes(data[:7], "big") >> (56 - HEADER_BITS)
    n_values = header >> 21
    if n_values != 4 * height * width:
        raise PromptError(
            f"The brush RLE holds {n_values} values; an image of {width} x {height} pixels has {4 * height * width}.",
            "Was the mask drawn on another image, or on one of another size?",
        )
    if (value_bits := (header >> 16 & 31) + 1) != 8:
        raise PromptError(f"The brush RLE has values of {value_bits} bits; Label Studio writes 8.")
    widths = [(header >> shift & 15) + 1 for shift in (12, 8, 4, 0)]

    # Where a run starts is known only after the one before it: the one part that has to be a loop.
    padded = data + bytes(8)
    position, done = HEADER_BITS, 0
    ends: list[int] = []  # value index after each run
    places: list[int] = []  # bit position of its value, or of its first value minus one (a sign) when spelt out
    while done < n_values:
        byte = position >> 3
        window = int.from_bytes(padded[byte : byte + 4], "big") >> 13 - (position & 7)  # 19 bits: flag, class, length
        n_bits = widths[window >> 16 & 3]
        length = ((window & 0xFFFF) >> 16 - n_bits) + 1
        done += length
        position += 3 + n_bits
        ends.append(done)
        if window >> 18 & 1:
            places.append(position)
            position += 8
        else:
            places.append(~position)
            position += 8 * length
        if position > total:
            raise PromptError(f"The brush RLE of {len(data)} bytes is cut short.")
    if done != n_values:
        raise PromptError(f"A run of the brush RLE goes past the end of the image of {width} x {height} pixels.")

    end = np.asarray(ends, dtype=np.int64)
    place = np.asarray(places, dtype=np.int64)
    start = np.concatenate(([0], end[:-1]))
    octets = np.frombuffer(padded, dtype=np.uint8)

    def value_at(bit: NDArray[np.int64]) -> NDArray[np.int64]:
        byte = bit >> 3
        pair: NDArray[np.int64] = octets[byte].astype(np.int64) << 8 | octets[byte + 1]
        return pair >> (8 - (bit & 7)) & 255

    repeated = place >= 0
    inside = np.zeros(place.size, dtype=bool)
    inside[repeated] = value_at(place[repeated]) != 0
    # Value 4p + 3 is the alpha of pixel p, so the values before index i hold the alphas of i // 4 pixels.
    mask = np.repeat(inside, end // 4 - start // 4)

    if not repeated.all():
        start, place, count = start[~repeated], ~place[~repeated], (end - start)[~repeated]
        nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        index = np.repeat(start, count) + nth
        alpha = index % 4 == 3
        mask[index[alpha] // 4] = value_at((np.repeat(place, count) + 8 * nth)[alpha]) != 0
    return mask.reshape(height, width)


def _check_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise PromptError(f"The {name} of a brush mask is {value!r}; it is a number of pixels, at least 1.")
    if int(height) * int(width) > max_pixels:
        raise PromptError(f"A brush mask of {width} x {height} pixels is over the limit of {max_pixels} pixels.")


def _as_bytes(rle: object) -> bytes:
    if isinstance(rle, np.ndarray) and rle.dtype == np.uint8 and rle.ndim == 1:
        return rle.tobytes()
    if isinstance(rle, list | tuple | bytes | bytearray):  # bytes(7) would be seven zeros: not any type will do
        try:
            return bytes(rle)
        except (TypeError, ValueError, OverflowError):
            pass
    raise PromptError("A brush RLE is a list of byte values 0..255.")
