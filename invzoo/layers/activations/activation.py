"""Activations: a function of each value alone."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from ...dtypes import widen
from .._checks import check_positive
from ..elementwise import Elementwise
from ..rearrangements.base import Rearrangement

__all__ = [
    "Identity",
    "InvertibleELU",
    "InvertibleLeakyReLU",
    "SneakyReLU",
]

_FAR = 2.0**60


class Identity(Rearrangement):
    """Return the inputs themselves, ``x -> x``.

    Shapes: any, of any number of inputs: one is returned as it is, several as a tuple.

    Example:
        >>> x = torch.ones(3)
        >>> iz.Identity()(x) is x
        True
    """

    def function(self, *inputs: Any) -> Any:
        return inputs[0] if len(inputs) == 1 else inputs

    inverse = function


class InvertibleLeakyReLU(Elementwise):
    """Scale negative values: ``x -> x`` where ``x > 0`` and ``negative_slope * x`` elsewhere.

    The output has the input's sign, so the inverse divides the negative ones by the slope. The derivative at 0 is the
    slope, as in `torch.nn.LeakyReLU`, and that of the inverse is its reciprocal. In mode ``invert``, an exact zero that
    later layers rebuild may come back as a rounding error of either sign, with the derivative of that side; behind a
    ReLU, whose zeros are many, use mode ``recompute``.

    Shapes: ``(...) -> (...)``.

    Args:
        negative_slope: the slope of the negative side, positive and finite.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for a slope that is not positive and finite.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleLeakyReLU(0.5)
        >>> layer(torch.tensor([-4., 0., 3.]))
        tensor([-2.,  0.,  3.])
        >>> layer.inverse(torch.tensor([-2., 0., 3.]))
        tensor([-4.,  0.,  3.])
    """

    negative_slope: float

    def __init__(self, negative_slope: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        check_positive(self, "negative_slope", negative_slope)
        self.negative_slope = negative_slope

    def move(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def undo(self, y: Tensor) -> Tensor:
        return F.leaky_relu(y, 1 / self.negative_slope)

    def move_(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope, inplace=True)

    def undo_(self, y: Tensor) -> Tensor:
        return F.leaky_relu(y, 1 / self.negative_slope, inplace=True)

    def log_slope(self, x: Tensor) -> Tensor:
        return torch.zeros_like(widen(x)).masked_fill(x <= 0, math.log(self.negative_slope))

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class SneakyReLU(Elementwise):
    """A smooth LeakyReLU: ``x -> (x + a (sqrt(1 + x^2) - 1)) / (1 + a)`` with ``a = (1 - slope) / (1 + slope)``.

    The slope grows from ``negative_slope`` to 1, and 0 stays 0. The inverse is that root of a quadratic equation which
    is written without differences of what is nearly equal.

    Shapes: ``(...) -> (...)``.

    Args:
        negative_slope: the slope far on the negative side, between 0 and 1.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for a slope that is not between 0 and 1.
        TypeError: for values that are not real floating point.

    Reference:
        "Invertible Convolutional Networks", Finzi, Izmailov, Maddox, Kirichenko and Wilson, 2019.

    Example:
        >>> layer, x = iz.SneakyReLU(0.5), torch.tensor([-4., 0., 3.])
        >>> torch.allclose(layer.inverse(layer(x)), x)
        True
    """

    widens = True

    negative_slope: float

    def __init__(self, negative_slope: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        check_positive(self, "negative_slope", negative_slope, below=1)
        self.negative_slope = negative_slope
        self._a = (1 - negative_slope) / (1 + negative_slope)

    def move(self, x: Tensor) -> Tensor:
        a, near = self._a, _near(x)
        return x * ((1 + a * (near / (1 + _hypot(near, 1)))) / (1 + a))

    def undo(self, y: Tensor) -> Tensor:
        a, z = self._a, (1 + self._a) * y + self._a
        near = _near(z)
        root = a * _hypot(near, math.sqrt(1 - a * a))
        # The same root twice. Where z > 0, its numerator in the second form would cancel; elsewhere nothing does.
        positive = y * ((1 + a) * (near + a) / (near.abs() + root))
        return torch.where(z > 0, positive, (near - root) / (1 - a * a) + (z - near) / (1 - a))

    def log_slope(self, x: Tensor) -> Tensor:
        x = _near(x)
        return torch.log1p(self._a * (x / _hypot(x, 1))) - math.log1p(self._a)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


def _near(x: Tensor) -> Tensor:
    """``x`` where sqrt(1 + x^2) differs from abs(x) in float64, and the nearest such value elsewhere."""
    return x.clamp(-_FAR, _FAR)


def _hypot(x: Tensor, side: float) -> Tensor:
    return torch.hypot(x, torch.full_like(x, side))


class InvertibleELU(Elementwise):
    """Squash negative values: ``x -> x`` where ``x > 0`` and ``alpha (exp(x) - 1)`` elsewhere, which is above -alpha.

    It saturates: in float32 no ``x`` below -17 comes back. So mode ``invert`` keeps the input and never inverts. The
    output -alpha, which rounding makes of such inputs, is in the codomain; its inverse is -inf.

    Shapes: ``(...) -> (...)``.

    Args:
        alpha: minus the limit on the negative side, positive and finite; the slope has a jump at 0 unless it is 1.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an alpha that is not positive and finite, and for the inverse of values below -alpha. NaN
            passes. Where values cannot be read (in compiled code and `torch.func` transforms), they give NaN.
        TypeError: for values that are not real floating point.

    Reference:
        "Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)", Clevert, Unterthiner and
        Hochreiter, 2016.

    Example:
        >>> layer, x = iz.InvertibleELU(), torch.tensor([-4., 0., 3.])
        >>> torch.allclose(layer.inverse(layer(x)), x)
        True
    """

    saturating = True

    alpha: float

    def __init__(self, alpha: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        check_positive(self, "alpha", alpha)
        self.alpha = alpha
        self.codomain = constraints.greater_than_eq(-alpha)  # type: ignore[misc]

    def move(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)

    def undo(self, y: Tensor) -> Tensor:
        negative = torch.where(y > 0, 0, y)
        return torch.where(y > 0, y, torch.log1p(negative / self.alpha))

    def log_slope(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, 0, widen(x) + math.log(self.alpha))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
