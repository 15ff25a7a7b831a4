"""The click in one native call: what is kept of an image for it, and what stands in for `Inter2Former.decode`.

The function is that of the plain network, its twin in tests. The image is kept in another form: tokens one after the
other, and instead of the edge maps E of the four upsampling stages their convolutions. A stage computes
conv(up(z) + E) = conv(up(z)) + conv(E), and conv(E), made once, has a quarter of the channels. On a crop the
convolution sees zeros outside; what a neighbour outside would have brought to the crop's outermost pixels is kept as
well, for every border a crop can have, and taken off again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from inter2former.config import ModelConfig
from inter2former.nn.layers import rope_tables
from inter2former.nn.model import Decoded, Features, Inter2Former
from inter2former.nn.upsampling import FILL, TokenBox
from inter2former.runtime.native import Precision

_BLOCK = 32  # values that share a unit; kEdgeBlock of csrc/upsampling.h
_BYTES_A_TOKEN = 5800  # 24 MB at T = 1024
_STEPS = 32600  # of int16; some are left for the rounding of the unit


class CompactEncoding(NamedTuple):
    """An encoded image as the native decoder wants it; a third of the bytes of `Features`.

    tokens   float32 [n, n, d]
    maps     a stage each, coarse to fine: convolved edge features and what belongs to borders, in one array of
             int16 (or float32); the order of its parts is described in csrc/upsampling.h
    units    a stage each, bfloat16 [ceil(len(map) / 32)]: the value of one step for 32 of its numbers, not finite where
             one of them is not; empty for float32
    middles  a stage each, float32 [9, channels]: what the numbers of each of the nine parts are relative to
    links    as those of `Features`

    The 16 bits move logits by about 1e-4 at most; at T = 1024 the base model keeps 24 MB an image. Models that stay
    below that with float32 keep float32.
    """

    tokens: Tensor
    maps: list[Tensor]
    units: list[Tensor]
    middles: list[Tensor]
    links: Tensor = torch.empty(0)

    @property
    def edges(self) -> list[Tensor]:
        """All that is kept besides the tokens."""
        return [*self.maps, *self.units, *self.middles]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.edges, self.links))


class Click(NamedTuple):
    """logits float32 [16 h, 16 w] inside `box` (tokens), low-resolution logits [n, n]."""

    inside: npt.NDArray[np.float32]
    box: TokenBox
    low: npt.NDArray[np.float32]


class FusedDecoder:
    """The decoder of a model in evaluation mode, with its weights of now.

    native     the compiled module
    isa        name of an instruction set, for tests
    precision  of the operands of the large products; in bfloat16 the twin is that of runtime/rounding.py
    """

    def __init__(self, model: Inter2Former, native: Any, isa: str = "auto", precision: Precision = "float32") -> None:
        config = model.config
        self._span = config.position_span
        self._attention_dim = config.attention_dim
        self._encode_batch, self._links = model.encode_batch, model.links
        self._kernels = [model.get_parameter(f"upsampling.stages.{index}.conv.weight") for index in range(4)]
        self._native = native.Decoder(_weights(model), _sizes(config), isa, precision)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return int(self._native.nbytes)

    def compact(self, features: Features, *, exact: bool | None = None) -> CompactEncoding:
        """Prepare an encoded image for its clicks; `exact` keeps float32 (or not), else bytes decide."""
        with torch.inference_mode():
            tokens = features.tokens[0].permute(1, 2, 0).float().contiguous()
            parts = [
                _convolved(kernel, edges.float(), 2 << index)
                for index, (kernel, edges) in enumerate(zip(self._kernels, features.edges, strict=True))
            ]
            if exact is None:
                values = tokens.numel() + sum(part.numel() for stage in parts for part in stage)
                exact = 4 * values <= _BYTES_A_TOKEN * tokens.shape[0] * tokens.shape[1]
            packs = [_exact(stage) if exact else _packed(stage) for stage in parts]
        maps, units, middles = (list(column) for column in zip(*packs, strict=True))
        return CompactEncoding(tokens, maps, units, middles)

    def encode(self, image: Tensor) -> CompactEncoding:
        """As Inter2Former.encode: image float32 [3, T, T]."""
        with torch.inference_mode():
            features = self._encode_batch(image.unsqueeze(0))
            return self.compact(features)._replace(links=self._links(features, image.unsqueeze(0))[0])

    def click(
        self,
        encoding: CompactEncoding | Features,
        reference: npt.NDArray[np.uint8] | Tensor,
        box: TokenBox | None = None,
    ) -> Click:
        """One decoder pass, see Inter2Former.decode; `box`: upsample there, wherever the object is."""
        image = encoding if isinstance(encoding, CompactEncoding) else self.compact(encoding, exact=True)
        labels = reference.numpy() if isinstance(reference, Tensor) else reference
        height, width, _ = image.tokens.shape
        cos, sin = rope_tables(height, width, self._attention_dim, image.tokens.device, self._span)
        inside, found, low = self._native.decode(
            image.tokens.numpy(),
            [part.numpy() for part in image.maps],
            [unit.view(torch.uint16).numpy() for unit in image.units],
            [middle.numpy() for middle in image.middles],
            cos.numpy(),
            sin.numpy(),
            labels,
            box,
        )
        return Click(inside, found, low)

    def decode(
        self,
        encoding: CompactEncoding | Features,
        reference: npt.NDArray[np.uint8] | Tensor,
    ) -> Decoded:
        """As Inter2Former.decode."""
        inside, box, low = self.click(encoding, reference)
        left, top, right, bottom = (16 * side for side in box)
        logits = torch.full(tuple(reference.shape), FILL)
        logits[top:bottom, left:right] = torch.from_numpy(inside)
        return Decoded(logits, box, torch.from_numpy(low))


def _convolved(weight: Tensor, maps: Tensor, pixels: int) -> list[Tensor]:
    """conv(E) and its border parts for one stage, `pixels` a token side; E is [1, c, H, W]. The order of csrc."""
    before, behind = slice(pixels - 1, None, pixels), slice(0, None, pixels)  # the last and the first of each token

    def line(part: Tensor, kernel: Tensor, rows: bool) -> Tensor:
        """Rows (or columns) just outside a crop through one row (column) of the kernel."""
        return F.conv2d(part, kernel, padding=(0, 1) if rows else (1, 0))[0]

    def begins(part: Tensor, axis: int) -> Tensor:
        """From the last lines of all tokens: for each token that of the one before, zeros where the image begins."""
        return torch.cat([torch.zeros_like(part.narrow(axis, 0, 1)), part.narrow(axis, 0, part.shape[axis] - 1)], axis)

    def ends(part: Tensor, axis: int) -> Tensor:
        """From the first lines of all tokens: for each token that of the next, zeros where the image ends."""
        return torch.cat([part.narrow(axis, 1, part.shape[axis] - 1), torch.zeros_like(part.narrow(axis, 0, 1))], axis)

    def corner(rows: slice, columns: slice, dy: int, dx: int) -> Tensor:
        return F.conv2d(maps[:, :, rows, columns], weight[:, :, dy : dy + 1, dx : dx + 1])[0]

    above = begins(line(maps[:, :, before], weight[:, :, 0:1], True), 1)
    below = ends(line(maps[:, :, behind], weight[:, :, 2:3], True), 1)
    left = begins(line(maps[:, :, :, before], weight[:, :, :, 0:1], False), 2)
    right = ends(line(maps[:, :, :, behind], weight[:, :, :, 2:3], False), 2)
    return [
        F.conv2d(maps, weight, padding=1)[0].contiguous(),
        above.contiguous(),
        below.contiguous(),
        left.transpose(1, 2).contiguous(),
        right.transpose(1, 2).contiguous(),
        torch.stack(
            [
                begins(begins(corner(before, before, 0, 0), 1), 2),
                ends(begins(corner(before, behind, 0, 2), 1), 2),
                begins(ends(corner(behind, before, 2, 0), 1), 2),
                ends(ends(corner(behind, behind, 2, 2), 1), 2),
            ]
        ),
    ]


def _blocks(part: Tensor) -> Tensor:
    """[.., _BLOCK], zeros behind: every part begins a new block."""
    values = part.flatten()
    return F.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)


def _exact(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    packed = torch.cat([_blocks(part).flatten() for part in parts])
    return packed, torch.empty(0, dtype=torch.bfloat16), torch.empty(0, 0)


def _packed(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of one stage as int16 and their units, see CompactEncoding.

    A pixel of a crop's border is a sum of parts; each part makes up for the rounding of those before it, so that the
    sum is as exact as its last term.
    """
    whole, above, below, left, right, corners = parts
    step = whole.shape[1] // above.shape[1]  # pixels a token side
    first, last = slice(0, None, step), slice(step - 1, None, step)  # of each token
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(part: Tensor, wanted: Tensor) -> Callable[..., Tensor]:
        """Pack what is wanted in the place of a part; returns how far from the part that is, at places to be given."""
        middle = wanted.mean((-1, -2), keepdim=True)
        blocks = _blocks(wanted - middle)
        unit = (blocks.abs().amax(1, keepdim=True) / _STEPS).to(torch.bfloat16)
        by = unit.float().clamp_min(torch.finfo(torch.float32).tiny)
        steps = blocks.div_(by).round_()
        kept.append((steps.to(torch.int16).flatten(), unit.flatten(), middle.reshape(-1, whole.shape[0])))
        packed = steps.mul_(by).flatten()[: part.numel()].view(part.shape)
        return lambda *at: packed[at] + middle - part[at]

    every = slice(None)
    off = keep(whole, whole)
    lines = [keep(part, part + off(every, at)) for part, at in ((above, first), (below, last))]
    columns = [keep(part, part + off(every, every, at).transpose(1, 2)) for part, at in ((left, first), (right, last))]
    owed = [
        line(every, every, across) + column(every, every, down).transpose(1, 2) - off(every, down, across)
        for line, down in zip(lines, (first, last), strict=True)
        for column, across in zip(columns, (first, last), strict=True)
    ]
    keep(corners, corners + torch.stack(owed))
    steps, units, middles = (torch.cat(column) for column in zip(*kept, strict=True))
    return steps, units, middles


def _weights(model: Inter2Former) -> dict[str, npt.NDArray[np.float32]]:
    """Everything but the encoder and CannyNet, under the names of the state dict."""
    wanted = ("prompt.", "blocks.", "upsampling.")
    return {
        name: tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith(wanted)
    }


def _sizes(config: ModelConfig) -> dict[str, int | float]:
    return {
        "embed_dim": config.embed_dim,
        "attention_dim": config.attention_dim,
        "code_bits": config.code_bits,
        "decoder_blocks": config.decoder_blocks,
        **{f"prompt_{i}": width for i, width in enumerate(config.prompt_channels)},
        **{f"up_{i}": width for i, width in enumerate(config.up_channels)},
        "per_pixel_norm": int(config.up_norm == "pixel"),
        "constant_is_edge": int(config.edge_rule == "released"),
        "low_threshold": config.low_threshold,
    }
