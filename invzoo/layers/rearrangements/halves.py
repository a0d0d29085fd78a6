"""Layers that exchange or interleave the halves of a dimension."""

from typing import Any

import torch
from torch import Tensor

from ... import engine
from ...engine import Operation
from ...module import Composite
from .._checks import refuse
from .permutation import AlongDim
from .split import Partition

__all__ = ["Deinterleave", "Interleave", "Swap"]

# No index: it would be saved for backward, whose scatter is slower than the copies that undo a split and a stack.


class _Interleaving(AlongDim):
    """Halves side by side, or interleaved. Abstract: a subclass says which of the two is the function."""

    at_least = 2

    def _interleave(self, x: Tensor) -> Tensor:
        """[a0 a1 a2 | b0 b1] -> [a0 b0 a1 b1 a2]."""
        dim, (half, odd) = self.dim % x.ndim, divmod(x.shape[self.dim], 2)
        a, *last, b = x.split([half, odd, half] if odd else half, dim)
        pairs = torch.stack((a, b), dim + 1).flatten(dim, dim + 1)
        return torch.cat((pairs, *last), dim) if odd else pairs

    def _deinterleave(self, x: Tensor) -> Tensor:
        """[a0 b0 a1 b1 a2] -> [a0 a1 a2 | b0 b1]."""
        dim, (half, odd) = self.dim % x.ndim, divmod(x.shape[self.dim], 2)
        pairs, *last = x.split([2 * half, odd], dim) if odd else (x,)
        a, b = pairs.unflatten(dim, (half, 2)).unbind(dim + 1)
        return torch.cat((a, *last, b), dim)


class Swap(AlongDim, Composite):
    """Exchange the halves of a dimension, ``(x1, x2) -> (x2, x1)``.

    The halves of one tensor are those of `torch.chunk`: the first one is larger if the size is odd. Two streams are
    returned the other way round, without a copy.

    Shapes: ``(..., n, ...) -> (..., n, ...)`` with ``n >= 2``, or two streams of any shapes.

    Args:
        dim: the dimension, which may be negative; 1 by default, but to be given for one tensor of three dims.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim`` or with fewer than 2 entries in it.
        TypeError: for more than two inputs, or one that is no tensor.

    Example:
        >>> iz.Swap()(torch.tensor([[1, 2, 3, 4, 5]]))
        tensor([[4, 5, 1, 2, 3]])
        >>> iz.Swap()(torch.zeros(1), torch.ones(2))
        (tensor([1., 1.]), tensor([0.]))
    """

    at_least = 2

    def __init__(self, dim: int | None = None, **options: Any) -> None:
        super().__init__(dim, **options)
        self.streams = Partition("half", self.dim)

    def takes_streams(self, first: int, second: int) -> bool:
        return first == second  # or the halves of the swapped tensor would be others than the swapped halves

    def through(self, values: tuple[Any, ...], side: dict[str, Any], log_dets: Any, *, inverted: bool = False) -> Any:
        if len(values) not in (1, 2) or not all(isinstance(t, Tensor) for t in values):
            got = ", ".join(type(t).__name__ for t in values)
            refuse(self, "y" if inverted else "x", "be one Tensor or two", got or "none", TypeError)
        if len(values) == 2:  # exchanged as they are, and one tensor in a call of its own
            return values[1], values[0]
        self.check_argument("y" if inverted else "x", values[0])
        there, back = (self._back, self._there) if inverted else (self._there, self._back)
        return engine.call(Operation(self._name(), there, back, None, (), self._policy), values, side)

    def _there(self, x: Tensor) -> Tensor:
        return self._exchange(x, (x.shape[self.dim] + 1) // 2)

    def _back(self, y: Tensor) -> Tensor:
        return self._exchange(y, y.shape[self.dim] // 2)

    def _exchange(self, x: Tensor, first: int) -> Tensor:
        a, b = x.split([first, x.shape[self.dim] - first], self.dim)
        return torch.cat((b, a), self.dim)


class Interleave(_Interleaving):
    """Interleave the halves of a dimension, ``[a0 a1 a2 | b0 b1] -> [a0 b0 a1 b1 a2]``: the perfect shuffle.

    Shapes: ``(..., n, ...) -> (..., n, ...)`` with ``n >= 2``; the first half is larger if ``n`` is odd.

    Args:
        dim: the dimension, which may be negative; 1 by default, but to be given for one tensor of three dims.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim`` or with fewer than 2 entries in it.

    Example:
        >>> iz.Interleave()(torch.tensor([[1, 2, 3, 10, 20]]))
        tensor([[ 1, 10,  2, 20,  3]])
    """

    move, undo = _Interleaving._interleave, _Interleaving._deinterleave  # type: ignore[assignment]  # words take any arguments


class Deinterleave(_Interleaving):
    """Undo :class:`Interleave`: even entries before odd ones, ``[a0 b0 a1 b1 a2] -> [a0 a1 a2 | b0 b1]``.

    Shapes: ``(..., n, ...) -> (..., n, ...)`` with ``n >= 2``.

    Args:
        dim: the dimension, which may be negative; 1 by default, but to be given for one tensor of three dims.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim`` or with fewer than 2 entries in it.

    Example:
        >>> iz.Deinterleave()(torch.tensor([[1, 10, 2, 20, 3]]))
        tensor([[ 1,  2,  3, 10, 20]])
    """

    move, undo = _Interleaving._deinterleave, _Interleaving._interleave  # type: ignore[assignment]  # words take any arguments
