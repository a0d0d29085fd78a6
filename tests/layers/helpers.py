"""What tests of layers have in common."""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from invzoo.dtypes import widen
from invzoo.layers.maps import Map
from invzoo.protocol import moved, undone
from invzoo.testing.memory import track_memory

__all__ = ["back", "close", "inputs", "jacobian", "kept_by", "perturbed", "refused", "there"]

Module = TypeVar("Module", bound=nn.Module)


def perturbed(module: Module, size: float) -> Module:
    """Move every parameter away from its start, as training does."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))
    return module


def there(map_: Map, x: Tensor, h: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Move values by a map with these parameters; return them, and the log-slopes."""
    h = map_.parts(h, x, dim)
    y, *s = moved(map_, x, *h)
    return y, map_.log_slope(widen(x) if map_.widens else x, *h, *s).expand_as(x)


def back(map_: Map, y: Tensor, h: Tensor, dim: int = 1) -> Tensor:
    """Undo it."""
    return undone(map_, y, *map_.parts(h, y, dim))[0]


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Differentiate a map at one sample, without the batch: (n, n)."""
    matrix = torch.autograd.functional.jacobian(lambda sample: function(sample[None])[0], x)
    return matrix.reshape(x.numel(), x.numel())


def kept_by(layers: Iterable[iz.InvertibleModule], mode: str, *shape: int) -> int:
    """Return how many bytes a chain of layers keeps between forward and backward."""
    chain = iz.InvertibleSequential(*layers, mode=mode, check="never")
    x = torch.randn(shape, requires_grad=True)
    with track_memory(include=[chain, x]) as memory:
        before = memory.current
        y = chain(x)
        kept = memory.current - before
    y.sum().backward()
    return kept


def close(x: Tensor, y: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def refused(message: str, kind: type[Exception] = ValueError) -> Any:
    """Expect an error with this very message."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")
