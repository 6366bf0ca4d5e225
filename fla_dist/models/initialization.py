"""All initialization, as Samba gives it.

Embedding and matrices N(0, initializer_range); projections back to the residual stream divided by
√(2 · layers); biases 0; gains 1; what a mixer holds besides is its own `initialize`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fla_dist.models.block import Block
from fla_dist.models.layers import RMSNorm

if TYPE_CHECKING:
    from fla_dist.models.language_model import LanguageModel


@torch.no_grad()
def initialize(model: LanguageModel, seed: int) -> None:
    """Sets every parameter; torch's generators are left as they were."""
    std = model.config.initializer_range
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, Block):
                module.mixer.initialize()
        for block in model.blocks:
            assert isinstance(block, Block)
            for projection in (block.mixer.output, block.mlp.output):
                projection.weight.div_((2 * len(model.blocks)) ** 0.5)
