"""What native tests share: which paths run here, twins with random weights, tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from inter2former import _native
from inter2former.config import ModelConfig
from inter2former.nn.experts import HybridExperts

PATHS = [name for name, _, reason in _native.instruction_sets() if not reason]


def make(width: int, hidden: int, n_experts: int, seed: int = 0) -> HybridExperts:
    """A twin with every parameter random, none at its initial zero or one."""
    config = ModelConfig(
        embed_dim=width, expert_hidden=hidden, n_experts=n_experts, up_channels=(width, 4, 4, 4), attention_dim=4
    )
    generator = torch.Generator().manual_seed(seed)
    module = HybridExperts(config).eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            spread = 0.1 if name == "expert_bias" else 0.5 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    return module


def weights(module: HybridExperts) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def tokens(count: int, width: int, seed: int = 0, edge_share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator), torch.rand(count, generator=generator) < edge_share
