"""All initialization, as Samba gives it.

Embedding and matrices N(0, initializer_range); projections back to the residual stream divided by
√(2 · layers); biases 0; gains 1; what a mixer holds besides is its own `initialize`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fla_dist.models.block import Block
from fla_dist.models.layers import RMSNorm

if TYPE_CHECKING:
    from fla_dist.models.language_model import LanguageModel


class Uninitialized(TorchFunctionMode):
    """Modules made within it keep their memory as it comes: `initialize` sets every parameter, and
    PyTorch's own first values take as long."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else options["tensor"]
        return function(*arguments, **options)


@torch.no_grad()
def initialize(model: LanguageModel, seed: int) -> None:
    """Sets every parameter; torch's generators are left as they were.

    Matrices are filled side by side, each from a generator of its own, so that threads change
    nothing.
    """
    std = model.config.initializer_range
    matrices = dict.fromkeys(
        module.weight for module in model.modules() if isinstance(module, (nn.Embedding, nn.Linear))
    )

    def fill(index: int, weight: nn.Parameter) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        nn.init.normal_(weight, std=std, generator=generator)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(matrices)), matrices))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
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
