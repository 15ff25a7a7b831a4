"""Inter2Former: image encoder + edge features, once an image; prompt, attention, experts and upsampling, each click.

`encode` and `decode` are for use, `forward` and its two halves for training. Both compute the same function; the
first leaves out what does not matter (tokens outside boxes), the second is dense, batched and differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from inter2former import random_walk
from inter2former.config import ModelConfig
from inter2former.nn.affinity import Affinity
from inter2former.nn.attention import HybridAttention, edge_tokens, edge_tokens_batch
from inter2former.nn.canny import CannyMaps, CannyNet, canny
from inter2former.nn.encoder import Encoder
from inter2former.nn.experts import HybridExperts
from inter2former.nn.outline import Outline
from inter2former.nn.prompt_embedding import PixelBox, PromptEmbedding, prompt_box, prompt_box_mask, scatter
from inter2former.nn.upsampling import TokenBox, Upsampling


class Features(NamedTuple):
    """What is computed once an image: tokens [B, d, n, n]; edges coarse to fine, [B, c, T/8, T/8] to [B, c, T, T].

    links   of random_walk.py, float32 [4, cells]; empty where nobody walks, or colours alone are asked
    """

    tokens: Tensor
    edges: list[Tensor]
    links: Tensor = torch.empty(0)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.edges, self.links))


ImageEncoding = Features


class Decoded(NamedTuple):
    """logits float32 [T, T] (-100 outside the box), box in tokens, low-resolution logits [n, n]."""

    logits: Tensor
    box: TokenBox
    low: Tensor


class TrainOutput(NamedTuple):
    """logits [B, T, T], low [B, n, n], commitment loss of the codes (scalar)."""

    logits: Tensor
    low: Tensor
    commitment: Tensor


class DecoderBlock(nn.Module):
    """x += attention(norm x); x += experts(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim)
        self.attention = HybridAttention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim)
        self.experts = HybridExperts(config)

    def decode(self, x: Tensor, size_hw: tuple[int, int], edge: Tensor) -> Tensor:
        """x [N, d], edge bool [N] -> [N, d]."""
        x = x + self.attention.decode(self.norm1(x), size_hw, edge)
        out: Tensor = x + self.experts(self.norm2(x), edge)
        return out

    def forward(self, x: Tensor, size_hw: tuple[int, int], edge: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, d], edge bool [B, N] -> ([B, N, d], commitment)."""
        attended, commitment = self.attention(self.norm1(x), size_hw, edge)
        x = x + attended
        experts = self.experts(self.norm2(x).flatten(0, 1), edge.flatten()).view_as(x)
        return x + experts, commitment


class Inter2Former(nn.Module):
    """The whole network. float32 weights; `encode` and `decode` need no_grad from the caller only for speed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.canny_net = CannyNet(config)
        self.skips = nn.ModuleList(  # conv stem: its maps join the edge features of strides 2, 4, 8
            nn.Conv2d(stem, edge, 1)
            for stem, edge in zip(config.stem_channels, config.edge_channels[1:], strict=bool(config.stem_channels))
        )
        self.prompt = PromptEmbedding(config)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_blocks))
        self.upsampling = Upsampling(config)
        self.affinity = Affinity(config) if config.affinity_width else None
        self.outline = Outline(config.outline_widths) if config.outline_widths else None
        self.find_edge_tokens = edge_tokens  # a runtime may put its faster twin here

    # -- once an image -----------------------------------------------------------------------------------------
    def encode(self, image: Tensor) -> ImageEncoding:
        """image float32 [3, T, T], normalised by the config's convention; T a multiple of 16."""
        with torch.inference_mode():
            features = self.encode_batch(image.unsqueeze(0))
            edges = [e.float().contiguous() for e in features.edges]
            return Features(features.tokens.float().contiguous(), edges, self.links(features, image.unsqueeze(0))[0])

    def links(self, features: Features, image: Tensor) -> Tensor:
        """Of images [B, 3, T, T] with their features: what the random walk is to know of them, float32 [B, 4, cells],
        as if they filled the frame; [B, 0] for a model that has not learnt it."""
        if self.affinity is None:
            return torch.empty(len(image), 0)
        logarithms = self.affinity(features.tokens.float(), features.edges[0].float(), image)
        return random_walk.from_logarithms(logarithms).flatten(2)

    def encode_batch(self, image: Tensor) -> Features:
        """image [B, 3, T, T] -> Features; differentiable."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            maps = canny(image.float())
        return self.encode_with_canny(image, maps)

    def encode_with_canny(self, image: Tensor, maps: CannyMaps) -> Features:
        """The same with the Canny maps given, for tests that inject recorded ones."""
        tokens, stem = self.encoder(image)
        return Features(tokens, self._edges(image, maps, stem))

    def _edges(self, image: Tensor, maps: CannyMaps, stem: list[Tensor]) -> list[Tensor]:
        edges: list[Tensor] = self.canny_net(maps, image)
        for index, skip in enumerate(self.skips):  # stem: fine to coarse at strides 2, 4, 8; edges: coarse to fine
            edges[2 - index] = edges[2 - index] + skip(stem[index])
        return edges

    # -- each click --------------------------------------------------------------------------------------------
    def decode(self, encoding: ImageEncoding, reference: npt.NDArray[np.uint8] | Tensor) -> Decoded:
        """One decoder pass on the reference mask, uint8 [T, T]."""
        labels = reference.numpy() if isinstance(reference, Tensor) else reference
        with torch.inference_mode():
            box = prompt_box(labels)
            edge = torch.from_numpy(self.find_edge_tokens(labels, box, self.config.edge_rule)).flatten()
            return self.decode_tokens(encoding, self.prompted(encoding, labels, box), edge)

    def prompted(self, encoding: ImageEncoding, labels: npt.NDArray[np.uint8], box: PixelBox) -> Tensor:
        """Image tokens plus prompt embedding, [N, d]."""
        left, top, right, bottom = box
        crop = self.prompt.crop(torch.from_numpy(np.ascontiguousarray(labels[top:bottom, left:right])).unsqueeze(0))
        h, w = encoding.tokens.shape[-2:]
        x = encoding.tokens + scatter(crop, self.prompt.background(), box, (h, w))
        return x[0].flatten(1).t()

    def decode_tokens(self, encoding: ImageEncoding, x: Tensor, edge: Tensor) -> Decoded:
        """Blocks and upsampling on prompted tokens [N, d]."""
        h, w = encoding.tokens.shape[-2:]
        for block in self.blocks:
            x = block.decode(x, (h, w), edge)  # type: ignore[operator]
        return Decoded(*self.upsampling.decode(x.t().unflatten(1, (h, w)).unsqueeze(0), encoding.edges))

    def draw(self, seen: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What the outline network adds to the logits of a crop: float32 [CHANNELS, h, w] -> [h, w]; see refinement.py.

        For a model that has one.
        """
        assert self.outline is not None
        with torch.inference_mode():
            change: npt.NDArray[np.float32] = self.outline(torch.from_numpy(seen)[None])[0].numpy()
        return change

    # -- training ----------------------------------------------------------------------------------------------
    def decode_batch(self, features: Features, reference: Tensor) -> TrainOutput:
        """reference uint8 [B, T, T] -> TrainOutput; dense, differentiable, on the features' device."""
        h, w = features.tokens.shape[-2:]
        inside = prompt_box_mask(reference)
        edge = edge_tokens_batch(reference, inside, self.config.edge_rule).flatten(1)
        x = (features.tokens + self.prompt(reference, inside)).flatten(2).transpose(1, 2)  # [B, N, d]
        commitments = []
        for block in self.blocks:
            x, commitment = block(x, (h, w), edge)
            commitments.append(commitment)
        logits, low = self.upsampling(x.transpose(1, 2).unflatten(2, (h, w)), features.edges)
        return TrainOutput(logits, low, torch.stack(commitments).mean())

    def forward(self, image: Tensor, reference: Tensor) -> TrainOutput:
        """Both halves: image [B, 3, T, T], reference uint8 [B, T, T]."""
        return self.decode_batch(self.encode_batch(image), reference)

    def balance_experts(self) -> None:
        """Update the selection biases from what was routed since the last call; after each optimiser step."""
        for block in self.blocks:
            block.experts.balance()  # type: ignore[operator, union-attr]
