"""Layers that put the entries of a dimension into another order."""

import operator
import reprlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import engine
from ...engine import Operation
from ...module import Composite
from ...protocol import Like
from .._checks import check_dim, check_features, check_positive_int, check_tensor, given_dim, refuse
from .base import Rearrangement
from .split import Partition

__all__ = ["Deinterleave", "Interleave", "Permute", "Reverse", "Shuffle", "Swap"]

Device = torch.device | str | None


class _AlongDim(Rearrangement):
    """Another order of the entries of a dimension. Abstract: a subclass adds the two directions."""

    at_least: ClassVar[int] = 0  # how many entries

    def __init__(self, dim: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.dim = given_dim(self, dim)

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_tensor(self, argument, x)
        check_dim(self, argument, x, self.dim)
        if x.shape[self.dim] < self.at_least:
            entries = f"have at least {self.at_least} entries in dim {self.dim}"
            refuse(self, argument, entries, f"shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class _Reindexing(_AlongDim):
    """``y[i] = x[permutation[i]]`` along `dim`. Abstract: a subclass fills the buffer.

    The inverse sorts the buffer rather than keep a second one, which a loaded state would leave behind.
    """

    permutation: Tensor

    def __init__(self, size: int, dim: int | None, persistent: bool, device: Device, options: dict[str, Any]) -> None:
        super().__init__(dim, **options)
        self.register_buffer("permutation", torch.empty(size, dtype=torch.long, device=device), persistent)

    def check_argument(self, argument: str, x: Tensor) -> None:
        super().check_argument(argument, x)
        check_features(self, argument, x, self.dim, len(self.permutation))

    def given(self, like: Like) -> Tensor:
        return self.permutation

    def move(self, x: Tensor, order: Tensor) -> Tensor:
        # Autograd saves the order before it copies anything, so a replay, which stops there, copies nothing.
        return x.index_select(self.dim, order)

    def undo(self, y: Tensor, order: Tensor) -> Tensor:
        return y.index_select(self.dim, order.argsort())


class Permute(_Reindexing):
    """Put the entries of a dimension into a given order, ``y[i] = x[permutation[i]]``.

    The order is a part of the architecture, not of the state: it moves with the module but is not in `state_dict`.

    Shapes: ``(..., n, ...) -> (..., n, ...)``, where ``n = len(permutation)``.

    Args:
        permutation: each of 0, ..., n - 1 once, as a sequence or a tensor.
        dim: the dimension, which may be negative; 1 by default, but to be given for one tensor of three dims.
        device: where the indices are.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for indices that are no permutation, or an input without ``dim`` or of another size in it.
        TypeError: for a permutation that is not made of ints.

    Example:
        >>> layer = iz.Permute([2, 0, 1])
        >>> layer(torch.tensor([[10, 20, 30]]))
        tensor([[30, 10, 20]])
        >>> layer.inverse(torch.tensor([[30, 10, 20]]))
        tensor([[10, 20, 30]])
    """

    def __init__(
        self, permutation: Sequence[int] | Tensor, dim: int | None = None, *, device: Device = None, **options: Any
    ) -> None:
        order = self._order_of(permutation)
        super().__init__(len(order), dim, False, device, options)
        self.order = order
        self.reset_parameters()

    def _order_of(self, permutation: Any) -> tuple[int, ...]:
        try:
            given = permutation.tolist() if isinstance(permutation, Tensor) else [*permutation]
            order = tuple(map(operator.index, given))
        except TypeError:
            refuse(self, "permutation", "be a sequence of ints", reprlib.repr(permutation), TypeError)
        if sorted(order) != [*range(len(order))]:
            refuse(self, "permutation", f"hold each of 0, ..., {len(order) - 1} once", reprlib.repr(given))
        return order

    def reset_parameters(self) -> None:
        """Write the order into the buffer again, after `to_empty` say."""
        self.permutation.copy_(torch.tensor(self.order, dtype=torch.long, device="cpu"))

    def extra_repr(self) -> str:
        return f"{reprlib.repr([*self.order])}, dim={self.dim}"


class Shuffle(_Reindexing):
    """Put the entries of a dimension into a random order, ``y[i] = x[permutation[i]]``.

    The order is drawn when the layer is made, and saved in `state_dict`.

    Shapes: ``(..., features, ...) -> (..., features, ...)``.

    Args:
        features: the size of the dimension.
        dim: the dimension, which may be negative; 1 by default, but to be given for one tensor of three dims.
        generator: what to draw the order from; the CPU's global generator if None.
        device: where the indices are.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for ``features`` below 1, or an input without ``dim`` or of another size in it.
        TypeError: for ``features`` that are no int.

    Example:
        >>> layer = iz.Shuffle(4, generator=torch.Generator().manual_seed(0))
        >>> x = torch.arange(4).unsqueeze(0)
        >>> torch.equal(layer(x)[0], layer.permutation), torch.equal(layer.inverse(layer(x)), x)
        (True, True)
    """

    def __init__(
        self,
        features: int,
        dim: int | None = None,
        *,
        generator: torch.Generator | None = None,
        device: Device = None,
        **options: Any,
    ) -> None:
        check_positive_int(self, "features", features)
        super().__init__(features, dim, True, device, options)
        self.features = features
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw another order."""
        device = "cpu" if generator is None else generator.device
        self.permutation.copy_(torch.randperm(self.features, generator=generator, device=device))

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}"


class Reverse(_AlongDim):
    """Reverse the order of the entries of a dimension, ``y[i] = x[n - 1 - i]``: its own inverse.

    Shapes: ``(..., n, ...) -> (..., n, ...)``.

    Args:
        dim: the dimension, which may be negative; 1 by default, but to be given for one tensor of three dims.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim``.

    Example:
        >>> iz.Reverse()(torch.tensor([[1, 2, 3]]))
        tensor([[3, 2, 1]])
    """

    def move(self, x: Tensor) -> Tensor:
        return torch.flip(x, (self.dim,))

    undo = move  # type: ignore[assignment]  # words take any arguments


class Swap(_AlongDim, Composite):
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
        return x.roll(x.shape[self.dim] // 2, self.dim)

    def _back(self, y: Tensor) -> Tensor:
        return y.roll(-(y.shape[self.dim] // 2), self.dim)


class _Interleaving(_AlongDim):
    """Halves side by side, or interleaved. Abstract: a subclass says which of the two is the function."""

    at_least = 2

    # No index: it would be saved for backward, whose scatter is slower than the copies that undo a split and a stack.

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

    move, undo = _Interleaving._interleave, _Interleaving._deinterleave  # type: ignore[assignment]


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

    move, undo = _Interleaving._deinterleave, _Interleaving._interleave  # type: ignore[assignment]
