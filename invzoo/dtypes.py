"""Dtypes of the maths: float32 at least, without autocast, whatever comes in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_enabled", "bounded", "full_precision", "widen"]


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


def bounded(x: Tensor, bound: float) -> Tensor:
    """Bound x: ``bound * tanh(x / bound)``, the identity near 0."""
    return bound * torch.tanh(x / bound)
