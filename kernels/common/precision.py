"""Autocast stays out of states: it would turn the fp32 products of plain PyTorch into bf16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Runs `function` in the dtypes that it is given; its first argument tells the device."""

    @functools.wraps(function)
    def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        first = arguments[0]
        assert isinstance(first, Tensor)
        if not torch.amp.is_autocast_available(first.device.type):
            return function(*arguments, **options)
        with torch.autocast(first.device.type, enabled=False):
            return function(*arguments, **options)

    return wrapped
