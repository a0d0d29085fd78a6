"""Layers that put the same numbers into another shape, and one that adds zeros."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from einops import EinopsError, rearrange
from einops.parsing import ParsedExpression
from torch import Tensor

from ...module import InvertibleModule
from ...protocol import Like
from .._checks import check_dim, check_positive_int, check_tensor, given_dims, refuse
from .base import Rearrangement

__all__ = ["Flatten", "Pad", "Rearrange", "Reshape"]

Sizes = Sequence[int]


class _Reshaping(Rearrangement):
    """Another shape for each sample. Abstract."""

    def __init__(self, input_shape: Sizes, output_shape: Sizes, **options: Any) -> None:
        super().__init__(**options)
        for argument, shape in (("input_shape", input_shape), ("output_shape", output_shape)):
            if not isinstance(shape, Sequence) or not all(isinstance(n, int) for n in shape):
                refuse(self, argument, "be a sequence of ints", repr(shape), TypeError)
        if any(n < 1 for n in input_shape):
            refuse(self, "input_shape", "have sizes of at least 1", tuple(input_shape))
        self.input_shape, size = tuple(input_shape), math.prod(input_shape)
        known = math.prod(n for n in output_shape if n != -1)
        self.output_shape = tuple(size // known if n == -1 and known > 0 else n for n in output_shape)
        if math.prod(self.output_shape) != size or any(n < 1 for n in self.output_shape):
            refuse(self, "output_shape", f"have the {size} entries of {self.input_shape}", tuple(output_shape))

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_tensor(self, argument, x)
        shape = self.input_shape if argument == "x" else self.output_shape
        if x.ndim == 0 or x.shape[1:] != shape:
            refuse(self, argument, f"have shape (batch{''.join(f', {n}' for n in shape)})", f"shape {tuple(x.shape)}")

    def move(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.output_shape)

    def undo(self, y: Tensor) -> Tensor:
        return y.reshape(len(y), *self.input_shape)


class Reshape(_Reshaping):
    """Give each sample another shape, its entries in the same order.

    Shapes: ``(B, *input_shape) -> (B, *output_shape)``.

    Args:
        input_shape: of a sample, without the batch.
        output_shape: likewise, of as many entries; one size may be -1, which stands for what is left.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for shapes of different size, or an input of another shape.
        TypeError: for shapes that are not made of ints.

    Example:
        >>> layer = iz.Reshape((2, 3), (3, -1))
        >>> layer(torch.arange(6).reshape(1, 2, 3))
        tensor([[[0, 1],
                 [2, 3],
                 [4, 5]]])
    """

    def extra_repr(self) -> str:
        return f"{self.input_shape}, {self.output_shape}"


class Flatten(_Reshaping):
    """Make each sample a vector.

    Shapes: ``(B, *shape) -> (B, n)`` with n the product of ``shape``.

    Args:
        shape: of a sample, without the batch: the inverse has to know it.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input of another shape.
        TypeError: for a shape that is not made of ints.

    Example:
        >>> layer = iz.Flatten((3, 2, 2))
        >>> y = layer(torch.zeros(5, 3, 2, 2))
        >>> y.shape, layer.inverse(y).shape
        (torch.Size([5, 12]), torch.Size([5, 3, 2, 2]))
    """

    def __init__(self, shape: Sizes, **options: Any) -> None:
        super().__init__(shape, (-1,), **options)

    def extra_repr(self) -> str:
        return f"{self.input_shape}"


class Rearrange(Rearrangement):
    """Rearrange the entries as an einops pattern says; the inverse is the pattern with its sides swapped.

    Both directions must be able to tell all sizes: of the axes in parentheses, on either side, all but one need a size
    of their own. A pattern whose first axes differ moves the batch, so that it has no log-determinant per sample.

    Shapes: as the pattern says.

    Args:
        pattern: an einops pattern with the same axes on both sides.
        sizes: of the axes that the shape of the input or of the output does not tell.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for a pattern that cannot be undone, or an input that does not fit it.
        TypeError: for an input that is no tensor.

    Example:
        >>> layer = iz.Rearrange("b (n p) c -> b n (p c)", {"p": 2, "c": 3})
        >>> y = layer(torch.zeros(5, 8, 3))
        >>> y.shape, layer.inverse(y).shape
        (torch.Size([5, 4, 6]), torch.Size([5, 8, 3]))
    """

    def __init__(self, pattern: str, sizes: Mapping[str, int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.pattern, self.sizes = pattern, dict(sizes or {})
        for name, size in self.sizes.items():
            check_positive_int(self, f"size of {name!r}", size)
        self.sides = self._sides()
        first, other = (ParsedExpression(side).composition[:1] for side in self.sides)
        self.volume_preserving = first == other  # type: ignore[misc]

    def _sides(self) -> tuple[str, str]:
        """Return the sides of the pattern, which must tell all sizes in either direction."""
        try:
            source, target = self.pattern.split("->")
            sides = ParsedExpression(source), ParsedExpression(target)
        except (EinopsError, ValueError) as error:
            refuse(self, "pattern", "be an einops pattern 'axes -> axes'", f"{self.pattern!r}: {error}")
        if sides[0].identifiers != sides[1].identifiers:
            refuse(self, "pattern", "have the same axes on both sides", repr(self.pattern))
        if unknown := self.sizes.keys() - sides[0].identifiers:
            refuse(self, "sizes", "name axes of the pattern", ", ".join(map(repr, sorted(unknown))))
        if any(side.has_ellipsis_parenthesized for side in sides):
            refuse(self, "pattern", "have no '...' inside parentheses, for an inverse", repr(self.pattern))
        for axes in (axes for side in sides for axes in side.composition if isinstance(axes, list)):
            if len(missing := [axis for axis in axes if axis not in self.sizes]) > 1:
                expected = f"give all but one of ({' '.join(axes)}), for function and inverse"
                refuse(self, "sizes", expected, f"none of {', '.join(missing)}")
        return source.strip(), target.strip()

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_tensor(self, argument, x)

    def move(self, x: Tensor) -> Tensor:
        return self._rearrange("x", x, *self.sides)

    def undo(self, y: Tensor) -> Tensor:
        return self._rearrange("y", y, *self.sides[::-1])

    def _rearrange(self, argument: str, x: Tensor, source: str, target: str) -> Tensor:
        try:
            return rearrange(x, f"{source} -> {target}", **self.sizes)
        except EinopsError:
            sizes = f" with {self.sizes}" if self.sizes else ""
            refuse(self, argument, f"have dims {source!r}{sizes}", f"shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return ", ".join([repr(self.pattern), *([repr(self.sizes)] if self.sizes else [])])


class Pad(InvertibleModule):
    """Put zeros around the entries of a dimension, ``x -> (0, x, 0)``; the inverse crops them off.

    The layer is injective: there are outputs that no input has, and no log-determinant. Of those the inverse crops off
    what is not zero.

    Shapes: ``(..., n, ...) -> (..., before + n + after, ...)``.

    Args:
        padding: how many zeros ``(before, after)``; a number alone is ``after``, as for more channels.
        dim: the dimension, which may be negative, or several that are padded alike; 1 by default, but to be given for
            one tensor of three dims.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim``, or one of the inverse with fewer entries than zeros.
        TypeError: for an input that is no tensor.

    Reference:
        "i-RevNet: Deep Invertible Networks", Jacobsen, Smeulders and Oyallon, 2018.

    Example:
        >>> iz.Pad(2)(torch.ones(1, 3))
        tensor([[1., 1., 1., 0., 0.]])
        >>> iz.Pad((1, 1), dim=(-2, -1))(torch.ones(5, 3, 8, 8)).shape
        torch.Size([5, 3, 10, 10])
    """

    exact = True

    def __init__(self, padding: int | tuple[int, int], dim: int | Sequence[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.padding = (0, padding) if isinstance(padding, int) else tuple(padding)
        if len(self.padding) != 2 or not all(isinstance(n, int) and n >= 0 for n in self.padding):
            refuse(self, "padding", "be (before, after), both at least 0", padding)
        self.dim = given_dims(self, dim)

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_tensor(self, argument, x)
        for dim in self.dim:
            check_dim(self, argument, x, dim, sum(self.padding) if argument == "y" else 0)

    def given(self, like: Like) -> set[int]:
        return {dim % like.ndim for dim in self.dim}

    def move(self, x: Tensor, dims: set[int]) -> Tensor:
        pairs = [self.padding if dim in dims else (0, 0) for dim in reversed(range(x.ndim))]
        return F.pad(x, [n for pair in pairs for n in pair])

    def undo(self, y: Tensor, dims: set[int]) -> Tensor:
        for dim in dims:
            y = y.narrow(dim, self.padding[0], y.shape[dim] - sum(self.padding))
        return y

    def extra_repr(self) -> str:
        return f"{self.padding}, dim={self.dim[0] if len(self.dim) == 1 else self.dim}"
