"""Dynamic hybrid attention (DHA, paper 3.3): full attention where the mask changes, BSQ attention elsewhere.

Which tokens are edge tokens, how each kind of query attends, and nothing else. Letters: B batch, N tokens,
a attention width (one head), L code bits.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.config import EdgeRule, ModelConfig
from inter2former.nn.layers import rope_tables, rotate
from inter2former.nn.prompt_embedding import PixelBox
from inter2former.reference_mask import UNKNOWN

EDGE_WINDOW = 7  # pixels; an edge pixel's window holds more than one state (paper Eq. 4)


def edge_tokens(
    reference: npt.NDArray[np.uint8], box: PixelBox, rule: EdgeRule = "exact", patch: int = 16
) -> npt.NDArray[np.bool_]:
    """Which tokens get full attention, bool [H/patch, W/patch].

    exact     the token lies in the box and one of its pixels has a 7 x 7 window (clipped to the box) that is not
              constant; or one of its pixels, anywhere, is unknown. Equals variance > 0 in exact arithmetic.
    released  what the published float32 variance amounts to on common CPUs: rounding leaves a positive residue
              for every constant window but that of state 0.
    """
    left, top, right, bottom = box
    crop = np.ascontiguousarray(reference[top:bottom, left:right])
    window = np.ones((EDGE_WINDOW, EDGE_WINDOW), np.uint8)
    high = cv2.dilate(crop, window)  # the default border never wins, so windows are clipped to the crop
    marked = reference == UNKNOWN
    if rule == "exact":
        marked[top:bottom, left:right] |= high != cv2.erode(crop, window)
    else:
        marked[top:bottom, left:right] |= high > 0
    height, width = reference.shape
    out: npt.NDArray[np.bool_] = marked.reshape(height // patch, patch, width // patch, patch).any(axis=(1, 3))
    return out


def edge_tokens_batch(reference: Tensor, inside: Tensor, rule: EdgeRule = "exact", patch: int = 16) -> Tensor:
    """The same for a batch on any device: reference uint8 [B, H, W], inside bool [B, h, w] -> bool [B, h, w]."""
    here = inside.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    high = _spread(reference.masked_fill(~here, 0), torch.maximum, 0)  # what lies outside never wins
    if rule == "exact":
        marked = high != _spread(reference.masked_fill(~here, 255), torch.minimum, 255)
    else:
        marked = high > 0
    marked = (marked & here) | (reference == UNKNOWN)
    return marked.unflatten(2, (-1, patch)).any(3).unflatten(1, (-1, patch)).any(2)


def _spread(labels: Tensor, extreme: Callable[[Tensor, Tensor], Tensor], outside: int) -> Tensor:
    """Largest or smallest value of every 7 x 7 window, uint8 [B, H, W]: windows of 2, 4, then 7 along each axis.

    PyTorch's max-pooling of one channel is scalar on CPUs and took a seventh of a training step.
    """
    for dim in (1, 2):
        n = labels.shape[dim]
        pad = (0, 0) * (2 - dim) + (EDGE_WINDOW // 2,) * 2
        one = F.pad(labels, pad, value=outside)
        two = extreme(one.narrow(dim, 0, n + 5), one.narrow(dim, 1, n + 5))
        four = extreme(two.narrow(dim, 0, n + 3), two.narrow(dim, 2, n + 3))
        labels = extreme(four.narrow(dim, 0, n), four.narrow(dim, 3, n))
    return labels


class HybridAttention(nn.Module):
    """One head for both kinds of attention; the projections are shared (paper Eq. 5-8)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a = config.attention_dim
        self.bits, self.span = config.code_bits, config.position_span
        self.qkv = nn.Linear(config.embed_dim, 3 * a)
        self.proj = nn.Linear(a, config.embed_dim)
        self.codebook = nn.Parameter(torch.randn(2 * config.code_bits, a))  # "1" vectors, then "0" vectors
        self.code_proj = nn.Linear(a, config.code_bits)
        self.scale = a**-0.5
        self._code_table: Tensor | None = None

    # -- use ---------------------------------------------------------------------------------------------------
    def decode(self, x: Tensor, size_hw: tuple[int, int], edge: Tensor) -> Tensor:
        """x [N, d] after the norm, edge bool [N] -> [N, d]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        rest = ~edge
        out = torch.empty_like(q)
        if edge.any():
            out[edge] = self.full(q[edge], k, v, size_hw, edge)
        if rest.any():
            out[rest] = self.bsq(q[rest], k, v)
        result: Tensor = self.proj(out)
        return result

    def full(self, q: Tensor, k: Tensor, v: Tensor, size_hw: tuple[int, int], queries: Tensor) -> Tensor:
        """Attention with rotary positions: q [E, a] at the True places of queries [N]; k, v [N, a]."""
        cos, sin = rope_tables(*size_hw, k.shape[-1], k.device, self.span)
        q = rotate(q, cos[queries], sin[queries])
        k = rotate(k, cos, sin)
        return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], scale=self.scale)[0, 0]

    def codes(self, k: Tensor) -> Tensor:
        """BSQ code of every key, int64 [N]; the first bit is the most significant."""
        bits = self.code_proj(k) >= 0
        weights = 2 ** torch.arange(self.bits - 1, -1, -1, device=k.device)
        return (bits * weights).sum(-1)

    def fix_code_table(self) -> None:
        """Keep the code table from now on: for weights that no longer change."""
        self._code_table = self.code_table()

    def code_table(self) -> Tensor:
        """The quantised key of every code, [2**L, a]."""
        if self._code_table is not None:
            return self._code_table
        numbers = torch.arange(2**self.bits, device=self.codebook.device)
        shifts = torch.arange(self.bits - 1, -1, -1, device=self.codebook.device)
        bits = ((numbers[:, None] >> shifts) & 1).to(self.codebook.dtype)
        return torch.cat([bits, 1 - bits], dim=1) @ self.codebook

    def bsq(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the 2**L code vectors, each weighted by how many keys share it: cost independent of N^2."""
        n_codes = 2**self.bits
        codes = self.codes(k)
        values = v.new_zeros(n_codes, v.shape[-1]).index_add_(0, codes, v)
        counts = torch.bincount(codes, minlength=n_codes).to(v.dtype)
        logits = (q * self.scale) @ self.code_table().t()  # [., 2**L]
        logits = logits.masked_fill(counts == 0, -torch.inf)
        weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
        return (weights @ values) / (weights @ counts)[:, None]

    # -- training ----------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, size_hw: tuple[int, int], edge: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, d], edge bool [B, N] -> ([B, N, d], commitment loss).

        Both kinds are computed densely; the gradient passes straight through the sign of the normalised projection.
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        u = F.normalize(self.code_proj(k).float(), dim=-1)
        sign = torch.where(u >= 0, 1.0, -1.0)
        bits = (u + (sign - u).detach() + 1) / 2
        keys = torch.cat([bits, 1 - bits], dim=-1).to(k.dtype) @ self.codebook.to(k.dtype)  # [B, N, a]
        commitment = 0.25 * F.mse_loss(u, sign / self.bits**0.5)
        cos, sin = rope_tables(*size_hw, k.shape[-1], k.device, self.span)
        full = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, scale=self.scale)
        bsq = F.scaled_dot_product_attention(q, keys, v, scale=self.scale)
        return self.proj(torch.where(edge.unsqueeze(-1), full, bsq)), commitment
