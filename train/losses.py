"""What is minimised: the click losses on masks, and the dense losses that teach the encoder without clicks.

Pure functions of tensors plus the small training-only head; no sampling of data, no optimiser. Everything is
computed in float32, whatever the autocast around it.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inter2former.config import ModelConfig
from inter2former.nn.model import Features, TrainOutput
from train.teacher import COMPONENTS, STEP

UNKNOWN = 255


def normalized_focal(logits: Tensor, target: Tensor, *, gamma: float = 2.0, alpha: float = 0.5) -> Tensor:
    """Normalised focal loss (Sofiiuk et al., 2019), mean over images.

    logits [B, ...], target [B, ...] in {0, 1}. A cross entropy weighted by the current error, whose gradient neither
    fades as the mask gets better nor lets the background drown small objects.
    """
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    wrong = (torch.sigmoid(logits) - target).abs().detach() ** gamma
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (alpha * (wrong * entropy).sum(1) / (wrong.sum(1) + 1e-6)).mean()


def lovasz_hinge(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz hinge (Berman et al., 2018, binary case), mean over images: the convex surrogate of 1 - IoU.

    logits [B, ...], target [B, ...] in {0, 1}. Margins are sorted, the largest error first; each one counts by how much
    the IoU loses when its pixel joins those before it.
    """
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    error, order = (1 - logits * (2 * target - 1)).sort(dim=1, descending=True)
    truth = target.gather(1, order)
    objects = truth.sum(1, keepdim=True)
    lost = 1 - (objects - truth.cumsum(1)) / (objects + (1 - truth).cumsum(1)).clamp_min(1)
    share = torch.diff(lost, dim=1, prepend=torch.zeros_like(objects))
    return (error.relu() * share).sum(1).mean()


def low_target(target: Tensor, n: int) -> Tensor:
    """A token counts as object when any of its pixels does: [B, T, T] -> [B, n, n]."""
    return F.adaptive_max_pool2d(target.float()[:, None], n)[:, 0]


def click_loss(output: TrainOutput, target: Tensor, *, overlap_weight: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one decoder pass and its parts (detached). target [B, T, T] in {0, 1}.

    The focal loss alone leaves logits near zero, where a mask hangs on rounding; the hinge asks for a margin and for
    what is measured, the IoU.
    """
    parts = {
        "nfl": normalized_focal(output.logits, target),
        "low": normalized_focal(output.low, low_target(target, output.low.shape[-1])),
        "overlap": lovasz_hinge(output.logits, target),
        "commitment": output.commitment.float(),
    }
    loss = parts["nfl"] + 0.5 * parts["low"] + overlap_weight * parts["overlap"] + 0.1 * parts["commitment"]
    return loss, {name: part.detach() for name, part in parts.items()}


@torch.no_grad()
def mask_iou(logits: Tensor, target: Tensor) -> Tensor:
    """[B] intersection over union of logits > 0."""
    p, t = logits.flatten(1) > 0, target.flatten(1) > 0
    return (p & t).sum(1) / (p | t).sum(1).clamp_min(1)


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Weights of the dense losses; each with its reason."""

    boundary: float = 1.0  # outlines of all label maps: most of the IoU at five clicks is outline
    salient: float = 0.5  # known for some sources only
    affinity: float = 0.5  # same region or not: what a click has to spread along
    teacher: float = 2.0  # the only features here that descend from large-scale training
    edge: float = 1.0  # the teacher's edges, known everywhere
    points: int = 256  # a crop, for affinity: 65 k pairs
    temperature: float = 0.1  # of the cosine similarities


class DenseHead(nn.Module):
    """Training-only: a small pyramid from the tokens to stride 4 that predicts class-agnostic maps."""

    def __init__(self, config: ModelConfig, *, width: int = 64, embedding: int = 32) -> None:
        super().__init__()
        eighth, quarter = config.edge_channels[3], config.edge_channels[2]
        self.tokens = nn.Conv2d(config.embed_dim, width, 1)
        self.side8, self.side4 = nn.Conv2d(eighth, width, 1), nn.Conv2d(quarter, width, 1)
        self.mix8, self.mix4 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.coarse = nn.Sequential(nn.Conv2d(config.embed_dim, 128, 1), nn.SiLU(), nn.Conv2d(128, COMPONENTS, 1))
        self.fine = nn.Conv2d(width, COMPONENTS, 1)
        self.maps = nn.Conv2d(width, 3, 1)  # boundary, salient, teacher's edge
        self.embedding = nn.Conv2d(width, embedding, 1)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """maps [B, 3, T/4, T/4], embedding [B, e, T/4, T/4], fine [B, C, T/8, T/8], coarse [B, C, T/16, T/16]."""
        tokens, edges = features.tokens, features.edges
        x = F.interpolate(self.tokens(tokens), scale_factor=2, mode="bilinear", align_corners=False)
        x = F.silu(self.mix8(F.silu(x + self.side8(edges[0]))))
        fine = self.fine(x)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.silu(self.mix4(F.silu(x + self.side4(edges[1]))))
        return {"maps": self.maps(x), "embedding": self.embedding(x), "fine": fine, "coarse": self.coarse(tokens)}


def dense_loss(
    predicted: dict[str, Tensor], batch: dict[str, Tensor], config: DenseConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the dense losses that the batch has targets for, and its parts (detached)."""
    maps = predicted["maps"].float()
    parts = {
        "boundary": _known_entropy(maps[:, 0], batch["boundary"], positive_weight=3.0),
        "salient": _known_entropy(maps[:, 1], batch["salient"]),
        "affinity": affinity(predicted["embedding"].float(), batch["regions"], config.points, config.temperature),
    }
    loss = config.boundary * parts["boundary"] + config.salient * parts["salient"] + config.affinity * parts["affinity"]
    if "known" in batch:
        known = batch["known"].float()  # [B, n, n]
        errors = []
        for name, repeat in (("fine", 2), ("coarse", 1)):
            where = known.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
            taught = batch[name].float() * STEP  # [B, h, w, C]
            error = F.smooth_l1_loss(predicted[name].float().permute(0, 2, 3, 1), taught, reduction="none").mean(-1)
            errors.append((error * where).sum() / where.sum().clamp_min(1))
        parts["teacher"] = torch.stack(errors).sum()
        where = known.repeat_interleave(4, 1).repeat_interleave(4, 2)
        edge = F.binary_cross_entropy_with_logits(maps[:, 2], batch["edge"].float() / 255, reduction="none")
        parts["edge"] = (edge * where).sum() / where.sum().clamp_min(1)
        loss = loss + config.teacher * parts["teacher"] + config.edge * parts["edge"]
    return loss, {name: part.detach() for name, part in parts.items()}


def _known_entropy(logits: Tensor, target: Tensor, *, positive_weight: float = 1.0) -> Tensor:
    """Cross entropy over pixels whose target is not UNKNOWN; 0 when there is none."""
    known = (target != UNKNOWN).float()
    truth = (target == 1).float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    weight = known * (1 + (positive_weight - 1) * truth)
    return (entropy * weight).sum() / weight.sum().clamp_min(1)


def affinity(embedding: Tensor, regions: Tensor, n_points: int, temperature: float) -> Tensor:
    """Supervised contrast between random points of one crop: same region near, other regions far (cosine).

    embedding [B, e, h, w], regions int [B, h, w] with -1 for unknown. Points of unknown region take no part.
    """
    B, _, h, w = embedding.shape
    place = torch.randint(h * w, (B, n_points), device=embedding.device)
    vectors = F.normalize(embedding.flatten(2).transpose(1, 2), dim=-1)
    vectors = vectors.gather(1, place[..., None].expand(-1, -1, vectors.shape[-1]))  # [B, P, e]
    label = regions.flatten(1).gather(1, place)  # [B, P]
    known = label >= 0
    pair = known[:, :, None] & known[:, None, :] & ~torch.eye(n_points, dtype=torch.bool, device=label.device)
    same = pair & (label[:, :, None] == label[:, None, :])
    similarity = (vectors @ vectors.transpose(1, 2) / temperature).masked_fill(~pair, -1e4)
    log_share = similarity - similarity.logsumexp(2, keepdim=True)
    n_same = same.sum(2)
    useful = (n_same > 0) & ((pair & ~same).sum(2) > 0)
    loss = -(log_share * same).sum(2) / n_same.clamp_min(1)
    return (loss * useful).sum() / useful.sum().clamp_min(1)
