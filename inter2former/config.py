"""The one place that knows sizes: a frozen description of a model, with the three models we name.

A config is stored as JSON in every checkpoint; it decides shapes, the input convention and the edge rule,
and nothing about how or where the model runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

from inter2former.errors import ConfigError
from inter2former.level import hidden_units as level_units
from inter2former.score import hidden_units

InputConvention = Literal["fit", "released"]
EdgeRule = Literal["exact", "released"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and conventions of one Inter2Former. Compares by value; raises ConfigError on impossible values."""

    name: str = "custom"

    # Encoder (paper 3.1): windows of `window` x `window` tokens, odd blocks shifted by half a window.
    stem: Literal["patch", "conv"] = "patch"  # conv: a strided stack whose maps also reach the upsampling head
    stem_channels: tuple[int, ...] = ()  # conv stem only: widths at strides 2, 4, 8
    encoder_dim: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    mlp_ratio: int = 4
    window: int = 16
    anchor_size: int = 256  # pixels; the whole image at this size gives every window a global view
    fusion_blocks: tuple[int, ...] = (2, 5, 8, 11)  # after these the two scales are fused

    # Decoder (paper 3.2 - 3.5).
    embed_dim: int = 256
    decoder_blocks: int = 2
    attention_dim: int = 32  # one head
    position_span: int = 0  # full attention: positions of the longer side; 0 counts tokens, as released
    code_bits: int = 8  # BSQ codes have 2**code_bits entries
    n_experts: int = 8
    expert_hidden: int = 64
    prompt_channels: tuple[int, ...] = (32, 64, 128)  # first three widths of the prompt stack; the fourth is embed_dim
    up_channels: tuple[int, ...] = (256, 64, 16, 4)  # input widths of the four upsampling stages
    up_norm: Literal["group", "pixel"] = "group"  # pixel: does not depend on the size of the crop
    edge_blocks: tuple[int, ...] = (4, 4, 4, 4)  # residual blocks of CannyNet's stages, fine to coarse

    # Conventions.
    input_convention: InputConvention = "fit"
    edge_rule: EdgeRule = "exact"
    click_radius: int = 5  # model pixels, as in RITM and the release
    initial_reference: int = 2  # state of every pixel before the first prompt: unknown
    low_threshold: float = -2.0  # low-resolution logits above it are upsampled
    # Parts of a mask that are smaller than this share of the largest one and hold no positive click are left out, far
    # smaller holes without a negative click are filled; 0 keeps all, as released.
    island_share: float = 0.0
    # From this click on a pass changes only the parts of the mask that its click meets; a box and a given mask count as
    # random_walk.WORTH clicks. 0: it changes what it likes, as released.
    local_from: int = 0
    # Of the random walk that follows every pass (random_walk.py): how much it trusts the network at the first click;
    # 0 leaves it out, as released.
    walk_trust: float = 0.0
    # Channels of what learns how freely one walks (nn/affinity.py); 0: colours say so.
    affinity_width: int = 0
    # Masks are found at this T at most, and spread over a larger one that is asked for. 0: at every T.
    coarse_size: int = 0
    # Channels of the network that draws outlines again, in the picture at T (nn/outline.py), at strides 2, 4, 8 and 16.
    # Empty: they stay as they were found.
    outline_widths: tuple[int, ...] = ()
    auto_sizes: tuple[int, ...] = (512, 768, 1024, 1536, 2048)  # what T="auto" may choose
    level_weights: tuple[float, ...] = ()  # of where logits are cut, see level.py; without: at 0
    score_weights: tuple[float, ...] = ()  # of the predicted IoU, see score.py; without: what the probabilities promise

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON has lists only
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if isinstance(self.edge_blocks, int):  # files of the first versions: the same number in every stage
            object.__setattr__(self, "edge_blocks", (self.edge_blocks,) * 4)
        rules = [
            (self.stem in ("patch", "conv"), "stem must be 'patch' or 'conv'"),
            (self.input_convention in ("fit", "released"), "input_convention must be 'fit' or 'released'"),
            (self.edge_rule in ("exact", "released"), "edge_rule must be 'exact' or 'released'"),
            (self.up_norm in ("group", "pixel"), "up_norm must be 'group' or 'pixel'"),
            (
                (self.stem == "conv") == (len(self.stem_channels) == 3),
                "stem_channels: three widths, for stem 'conv' only",
            ),
            (self.encoder_dim % self.encoder_heads == 0, "encoder_heads must divide encoder_dim"),
            (
                self.encoder_heads > 0 and (self.encoder_dim // self.encoder_heads) % 4 == 0,
                "encoder head width must be a multiple of 4 (two axes of RoPE pairs)",
            ),
            (self.attention_dim % 4 == 0, "attention_dim must be a multiple of 4 (two axes of RoPE pairs)"),
            (self.position_span >= 0, "position_span must not be negative"),
            (0 <= self.island_share <= 1, "island_share must be in 0..1"),
            (self.local_from >= 0, "local_from must not be negative"),
            (0 <= self.walk_trust <= 1, "walk_trust must be in 0..1"),
            (
                self.affinity_width == 0
                or (self.affinity_width % 2 == 0 and 0 < self.affinity_width <= 1024 and self.walk_trust > 0),
                "affinity_width must be an even number up to 1024, and 0 without walk_trust",
            ),
            (
                self.coarse_size >= 0
                and self.coarse_size % 256 == 0
                and (self.coarse_size == 0 or self.input_convention == "fit"),
                "coarse_size must be a multiple of 256, and only 'fit' shows the same picture at every size",
            ),
            (
                not self.outline_widths
                or (
                    len(self.outline_widths) == 4
                    and min(self.outline_widths) > 0
                    and max(self.outline_widths) <= 1024
                    and self.input_convention == "fit"
                ),
                "outline_widths must be none or four widths up to 1024, and need input_convention 'fit'",
            ),
            (self.window % 2 == 0 and self.window > 0, "window must be even"),
            (self.anchor_size > 0 and self.anchor_size % 16 == 0, "anchor_size must be a multiple of 16 pixels"),
            (
                len(self.fusion_blocks) > 0 and all(0 <= b < self.encoder_depth for b in self.fusion_blocks),
                "fusion_blocks must name blocks of the encoder",
            ),
            (len(self.prompt_channels) == 3, "prompt_channels: three widths"),
            (len(self.up_channels) == 4, "up_channels: four widths"),
            (len(self.edge_blocks) == 4 and min(self.edge_blocks) >= 0, "edge_blocks: four numbers from 0 on"),
            (self.up_channels[:1] == (self.embed_dim,), "up_channels[0] must equal embed_dim"),
            (1 <= self.code_bits <= 12, "code_bits must be in 1..12"),
            (1 <= self.n_experts <= 64, "n_experts must be in 1..64"),
            (0 <= self.initial_reference <= 4, "initial_reference must be in 0..4"),
            (
                len(self.auto_sizes) > 0 and all(s > 0 and s % 256 == 0 for s in self.auto_sizes),
                "auto_sizes must be multiples of 256",
            ),
            (
                not self.score_weights or hidden_units(len(self.score_weights)) > 0,
                "score_weights do not fit this version's evidence; run `python -m train calibrate` again",
            ),
            (
                not self.level_weights or (self.walk_trust > 0 and level_units(len(self.level_weights)) > 0),
                "level_weights do not fit this version's features, or come without walk_trust; "
                "run `python -m train calibrate` again",
            ),
            (
                all(math.isfinite(w) for w in (*self.score_weights, *self.level_weights)),
                "score_weights and level_weights must be finite",
            ),
        ]
        broken = [text for holds, text in rules if not holds]
        if broken:
            raise ConfigError(f"ModelConfig {self.name!r}: " + "; ".join(broken) + ".")

    @property
    def patch(self) -> int:
        """Pixels a token side. Fixed by the four stride-2 prompt convolutions and four x2 upsampling stages."""
        return 16

    @property
    def edge_channels(self) -> tuple[int, ...]:
        """CannyNet widths from fine (full resolution) to coarse (1/8)."""
        return self.up_channels[::-1]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Inverse of to_json; unknown and missing fields are named in a ConfigError."""
        try:
            fields: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ConfigError("The model configuration is not JSON.") from error
        if not isinstance(fields, dict):
            raise ConfigError("The model configuration is not a JSON object.")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(
                f"Unknown ModelConfig fields: {', '.join(unknown)}.", "Was it written by a newer version?"
            )
        return cls(**fields)


def base() -> ModelConfig:
    """The released ViT-B model: 94 M parameters, BGR input padded to multiples of 256."""
    return ModelConfig(name="base", input_convention="released")


def small() -> ModelConfig:
    """The starter that ships with the package: a convolutional stem and six narrow blocks, made for two CPU cores."""
    return ModelConfig(
        name="small",
        stem="conv",
        stem_channels=(24, 48, 96),
        encoder_dim=192,
        encoder_depth=6,
        encoder_heads=6,
        mlp_ratio=3,
        window=8,  # a 256-pixel training crop then holds four windows, so shifted windows are learnt too
        anchor_size=128,
        fusion_blocks=(2, 5),
        embed_dim=128,
        up_channels=(128, 32, 16, 8),
        prompt_channels=(16, 32, 64),
        attention_dim=64,
        position_span=16,  # positions as in a 256-pixel view at every size (miou@3 at T = 512: 34.6 -> 39.8)
        up_norm="pixel",
        # On the same weights, 112 objects: from background 27.1 / 51.8 / 64.8 % mIoU at 1, 3 and 5 clicks, from unknown
        # 27.5 / 50.1 / 63.1; with every token of the box attending in full 31.5 / 56.2 / 63.9.
        initial_reference=1,
        edge_rule="released",
        edge_blocks=(0, 1, 1, 0),  # at full resolution and beside the stem's stride 8 one costs a fifth of an encode
        local_from=4,  # mIoU@5 73.1 -> 73.6, mIoU@10 79.6 -> 80.2 (146 objects); from 2, 3 or 6 on about as good
        island_share=0.1,  # crumbs beside the object: mIoU@1 29.7 -> 31.2, mIoU@2 41.9 -> 44.2 (56 objects)
        walk_trust=0.005,  # mIoU@1 30.8 -> 37.6, mIoU@10 76.8 -> 77.6 (146 objects); 0.002 to 0.02 do as well
        coarse_size=512,  # the largest training crops; at T = 1024 alone mIoU@5 is 62.2 where it is 71.1 at 512
        auto_sizes=(256, 768, 1024),
    )


def tiny() -> ModelConfig:
    """For tests: every box of the model, milliseconds a click."""
    return ModelConfig(
        name="tiny",
        stem="conv",
        stem_channels=(4, 8, 8),
        encoder_dim=16,
        encoder_depth=2,
        encoder_heads=2,
        mlp_ratio=2,
        window=4,
        anchor_size=64,
        fusion_blocks=(0, 1),
        embed_dim=16,
        attention_dim=8,
        code_bits=4,
        n_experts=4,
        expert_hidden=8,
        prompt_channels=(4, 8, 8),
        up_channels=(16, 8, 4, 4),
        up_norm="pixel",
        edge_blocks=(1, 1, 1, 1),
        auto_sizes=(256, 512),
    )


PRESETS = {"base": base, "small": small, "tiny": tiny}
