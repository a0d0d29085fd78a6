"""Layers that put the entries of a dimension into another order."""

import operator
import reprlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...protocol import Like
from .._checks import check_dim, check_features, check_positive_int, check_tensor, given_dim, refuse
from .base import Rearrangement

__all__ = ["AlongDim", "Permute", "Reverse", "Shuffle"]

Device = torch.device | str | None


class AlongDim(Rearrangement):
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


class _Reindexing(AlongDim):
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


class Reverse(AlongDim):
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
