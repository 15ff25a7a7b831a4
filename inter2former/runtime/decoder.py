"""The click in one native call: what is kept of an image for it, and what stands in for `Inter2Former.decode`.

The function is that of the plain network, its twin in tests. The image is kept in another form: tokens one after the
other, and instead of the edge maps E of the four upsampling stages their convolutions. A stage computes
conv(up(z) + E) = conv(up(z)) + conv(E), and conv(E), made once, has a quarter of the channels. On a crop the
convolution sees zeros outside; what a neighbour outside would have brought to the crop's outermost pixels is kept as
well, for every border a crop can have, and taken off again.
"""

from __future__ import annotations

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

_STEPS = 32767  # of int16


class CompactEncoding(NamedTuple):
    """An encoded image as the native decoder wants it; a third of the bytes of `Features`.

    tokens   float32 [n, n, d]
    maps     a stage each, coarse to fine: convolved edge features and what belongs to borders, in one array of
             int16 (or float32, then scales are 1); the order of its parts is described in csrc/upsampling.h
    scales   a stage each, float32 [channels]: the value of one step; not finite where a map is not
    """

    tokens: Tensor
    maps: list[Tensor]
    scales: list[Tensor]

    @property
    def edges(self) -> list[Tensor]:
        """All that is kept besides the tokens."""
        return [*self.maps, *self.scales]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.edges))


class Click(NamedTuple):
    """logits float32 [16 h, 16 w] inside `box` (tokens), low-resolution logits [n, n]."""

    inside: npt.NDArray[np.float32]
    box: TokenBox
    low: npt.NDArray[np.float32]


class FusedDecoder:
    """The decoder of a model in evaluation mode, with its weights of now.

    native    the compiled module
    isa       name of an instruction set, for tests
    """

    def __init__(self, model: Inter2Former, native: Any, isa: str = "auto") -> None:
        config = model.config
        self._span = config.position_span
        self._attention_dim = config.attention_dim
        self._encode = model.encode
        self._kernels = [model.get_parameter(f"upsampling.stages.{index}.conv.weight") for index in range(4)]
        self._native = native.Decoder(_weights(model), _sizes(config), isa)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return int(self._native.nbytes)

    def compact(self, features: Features, *, exact: bool = False) -> CompactEncoding:
        """Prepare an encoded image for its clicks; `exact` keeps float32 instead of 16-bit steps."""
        with torch.inference_mode():
            tokens = features.tokens[0].permute(1, 2, 0).float().contiguous()
            maps, scales = [], []
            for index, (kernel, edges) in enumerate(zip(self._kernels, features.edges, strict=True)):
                parts = _convolved(kernel, edges.float(), 2 << index)
                channels = parts[0].shape[0]
                if exact:
                    scale = torch.ones(channels)
                    packed = torch.cat([part.flatten() for part in parts])
                else:
                    scale = torch.stack([part.flatten(1).abs().amax(1) for part in parts]).amax(0) / _STEPS
                    step = scale.clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1, 1)
                    packed = torch.cat([(part / step).round_().to(torch.int16).flatten() for part in parts])
                maps.append(packed)
                scales.append(scale)
        return CompactEncoding(tokens, maps, scales)

    def encode(self, image: Tensor) -> CompactEncoding:
        """As Inter2Former.encode: image float32 [3, T, T]."""
        return self.compact(self._encode(image))

    def click(
        self,
        encoding: CompactEncoding | Features,
        reference: npt.NDArray[np.uint8] | Tensor,
        box: TokenBox | None = None,
    ) -> Click:
        """One decoder pass on the reference mask, uint8 [T, T]; `box`: upsample there, wherever the object is."""
        image = encoding if isinstance(encoding, CompactEncoding) else self.compact(encoding, exact=True)
        labels = reference.numpy() if isinstance(reference, Tensor) else reference
        height, width, _ = image.tokens.shape
        cos, sin = rope_tables(height, width, self._attention_dim, image.tokens.device, self._span)
        inside, found, low = self._native.decode(
            image.tokens.numpy(),
            [part.numpy() for part in image.maps],
            [scale.numpy() for scale in image.scales],
            cos.numpy(),
            sin.numpy(),
            labels,
            box,
        )
        return Click(inside, found, low)

    def decode(self, encoding: CompactEncoding | Features, reference: npt.NDArray[np.uint8] | Tensor) -> Decoded:
        """As Inter2Former.decode."""
        inside, box, low = self.click(encoding, reference)
        left, top, right, bottom = (16 * side for side in box)
        logits = torch.full((16 * low.shape[0], 16 * low.shape[1]), FILL)
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
        begins(begins(corner(before, before, 0, 0), 1), 2).contiguous(),
        ends(begins(corner(before, behind, 0, 2), 1), 2).contiguous(),
        begins(ends(corner(behind, before, 2, 0), 1), 2).contiguous(),
        ends(ends(corner(behind, behind, 2, 2), 1), 2).contiguous(),
    ]


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
