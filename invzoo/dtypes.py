"""Dtypes of the maths: float32 at least, without autocast, whatever comes in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_enabled", "bounded", "computed", "full_precision", "widen"]


def widen(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_enabled(x: Any) -> bool:
    """Whether autocast rules over dtypes on the device of ``x``."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def full_precision(x: Any) -> AbstractContextManager[Any]:
    """A context without autocast on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def computed(function: Callable[[Tensor], Tensor], x: Tensor, parameter: Tensor) -> Tensor:
    """``function(x)``, in at least float32 and without autocast, in the promoted dtype of x and a layer's parameter."""
    dtype = torch.promote_types(x.dtype, parameter.dtype)
    with full_precision(x):
        return function(x.to(torch.promote_types(dtype, torch.float32))).to(dtype)


def bounded(x: Tensor, bound: float) -> Tensor:
    """Bound x: ``bound * tanh(x / bound)``, the identity near 0."""
    return bound * torch.tanh(x / bound)
