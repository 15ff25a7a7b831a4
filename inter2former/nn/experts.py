"""Hybrid mixture of experts (HMoE, paper 3.4): one shared network for every token, one routed expert for edge tokens.

Letters: N tokens, d embedding width, H hidden width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.config import ModelConfig

BALANCE_STEP = 1e-3  # of the selection bias, a training step, as in the release


class HybridExperts(nn.Module):
    """SwiGLU with an inner norm: g(x) = w3 LN(silu(w1 x + b1) * (w2 x + b2)) + b3."""

    routing_counts: Tensor
    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, H, E = config.embed_dim, config.expert_hidden, config.n_experts
        self.shared_w1 = nn.Linear(d, H)
        self.shared_w2 = nn.Linear(d, H)
        self.shared_w3 = nn.Linear(H, d)
        self.shared_norm = nn.LayerNorm(H)
        self.shared_gate = nn.Linear(d, 1)
        self.expert_gate = nn.Linear(d, E)
        self.w1 = nn.Parameter(_uniform(E, H, d))
        self.b1 = nn.Parameter(torch.zeros(E, H))
        self.w2 = nn.Parameter(_uniform(E, H, d))
        self.b2 = nn.Parameter(torch.zeros(E, H))
        self.w3 = nn.Parameter(_uniform(E, d, H))
        self.b3 = nn.Parameter(torch.zeros(E, d))
        self.norm = nn.LayerNorm(H)  # one for all routed experts
        self.register_buffer("expert_bias", torch.zeros(E))  # moves the choice, never the weight
        self.register_buffer("routing_counts", torch.zeros(E), persistent=False)

    def shared(self, x: Tensor) -> Tensor:
        """The shared expert: [N, d] -> [N, d]."""
        out: Tensor = self.shared_w3(self.shared_norm(F.silu(self.shared_w1(x)) * self.shared_w2(x)))
        return out

    def expert(self, x: Tensor, e: int) -> Tensor:
        """Routed expert e on its tokens: [n, d] -> [n, d]."""
        hidden = F.silu(F.linear(x, self.w1[e], self.b1[e])) * F.linear(x, self.w2[e], self.b2[e])
        return F.linear(self.norm(hidden), self.w3[e], self.b3[e])

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen expert int64 [n] and the weight of the shared output [n] (the routed output weighs 1 - that)."""
        affinity = torch.sigmoid(self.expert_gate(x).float())
        chosen = (affinity + self.expert_bias).argmax(dim=-1)
        routed = affinity.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        share = torch.sigmoid(self.shared_gate(x).float()).squeeze(-1)
        return chosen, torch.sigmoid(share - routed)  # a softmax of two

    def forward(self, x: Tensor, edge: Tensor) -> Tensor:
        """x [N, d], edge bool [N] -> [N, d]."""
        out = self.shared(x)
        index = edge.nonzero().squeeze(-1)
        if len(index) == 0:
            return out
        tokens = x[index]
        chosen, share = self.route(tokens)
        routed = torch.zeros_like(tokens, dtype=out.dtype)
        for e in range(len(self.expert_bias)):
            members = (chosen == e).nonzero().squeeze(-1)
            if len(members):
                routed = routed.index_copy(0, members, self.expert(tokens[members], e).to(out.dtype))
            if self.training:
                self.routing_counts[e] += len(members)
        share = share.unsqueeze(-1).to(out.dtype)
        return out.index_copy(0, index, share * out[index] + (1 - share) * routed)

    @torch.no_grad()
    def balance(self) -> None:
        """Nudge the choice towards idle experts, by the counts since the last call; no auxiliary loss."""
        self.expert_bias -= BALANCE_STEP * torch.sign(self.routing_counts - self.routing_counts.mean())
        self.routing_counts.zero_()


def _uniform(*shape: int) -> Tensor:
    bound = shape[-1] ** -0.5  # as torch.nn.Linear
    return torch.empty(*shape).uniform_(-bound, bound)
