"""Squashing and stretching: sigmoid, tanh, softplus and exp, and their inverses.

All saturate, so mode ``invert`` keeps their inputs. A log-slope is written without differences of what is nearly equal.
"""

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from .elementwise import Elementwise, check_real, check_values, log_cosh, softplus

__all__ = [
    "InvertibleAtanh",
    "InvertibleExp",
    "InvertibleLog",
    "InvertibleLogit",
    "InvertibleSigmoid",
    "InvertibleSoftplus",
    "InvertibleTanh",
]

_SYMMETRIC = constraints.interval(-1.0, 1.0)


def _logit(x: Tensor) -> Tensor:
    # torch.logit computes log(x / (1 - x)), which loses all digits near 1/2 in half precision.
    return x.log() - torch.log1p(-x)


def _atanh(x: Tensor) -> Tensor:
    # The gradient of torch.atanh has 1 - x ** 2, which has no digits left near 1; the terms here have opposite signs.
    return (torch.log1p(x) - torch.log1p(-x)) / 2


class InvertibleSigmoid(Elementwise):
    """Squash to the unit interval: ``x -> 1 / (1 + exp(-x))``, ``y -> log(y) - log(1 - y)``.

    It saturates: in float32 no ``x`` above 17 comes back. So mode ``invert`` keeps the input and never inverts. The
    outputs 0 and 1, which rounding makes of large inputs, are in the codomain; their inverses are -inf and inf.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for the inverse of values outside [0, 1]. NaN passes. Reading the values synchronises with a GPU;
            it is left out where they cannot be read: in compiled code and `torch.func` transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleSigmoid()
        >>> layer(torch.tensor([0.]))
        tensor([0.5000])
        >>> layer.inverse(torch.tensor([0., 0.5, 1.]))
        tensor([-inf, 0., inf])
    """

    codomain = constraints.unit_interval
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        check_real(self, "x", x)
        return torch.sigmoid(x)

    def inverse(self, y: Tensor) -> Tensor:
        check_values(self, "y", y, 0, 1)
        return _logit(y)

    def log_slope(self, x: Tensor) -> Tensor:
        return -softplus(x) - softplus(-x)


class InvertibleLogit(Elementwise):
    """Stretch the unit interval to the real line: ``x -> log(x) - log(1 - x)``, ``y -> 1 / (1 + exp(-y))``.

    The inverse saturates, so mode ``invert`` keeps the input. 0 and 1 are in the domain and go to -inf and inf.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for values outside [0, 1]. NaN passes. Reading the values synchronises with a GPU; it is left out
            where they cannot be read: in compiled code and `torch.func` transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleLogit()
        >>> layer(torch.tensor([0., 0.5, 1.]))
        tensor([-inf, 0., inf])
    """

    domain = constraints.unit_interval
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        check_values(self, "x", x, 0, 1)
        return _logit(x)

    def inverse(self, y: Tensor) -> Tensor:
        check_real(self, "y", y)
        return torch.sigmoid(y)

    def log_slope(self, x: Tensor) -> Tensor:
        return -x.log() - torch.log1p(-x)


class InvertibleTanh(Elementwise):
    """Squash to (-1, 1): ``x -> tanh(x)``, ``y -> (log(1 + y) - log(1 - y)) / 2``.

    It saturates: in float32 no ``|x|`` above 9.1 comes back. So mode ``invert`` keeps the input and never inverts. The
    outputs -1 and 1, which rounding makes of large inputs, are in the codomain; their inverses are -inf and inf.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for the inverse of values outside [-1, 1]. NaN passes. Reading the values synchronises with a GPU;
            it is left out where they cannot be read: in compiled code and `torch.func` transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleTanh()
        >>> layer.inverse(layer(torch.tensor([-1., 0., 2.])))
        tensor([-1.,  0.,  2.])
    """

    codomain = _SYMMETRIC
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        check_real(self, "x", x)
        return torch.tanh(x)

    def inverse(self, y: Tensor) -> Tensor:
        check_values(self, "y", y, -1, 1)
        return _atanh(y)

    def log_slope(self, x: Tensor) -> Tensor:
        return -2 * log_cosh(x)


class InvertibleAtanh(Elementwise):
    """Stretch (-1, 1) to the real line: ``x -> (log(1 + x) - log(1 - x)) / 2``, ``y -> tanh(y)``.

    The inverse saturates, so mode ``invert`` keeps the input. -1 and 1 are in the domain and go to -inf and inf.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for values outside [-1, 1]. NaN passes. Reading the values synchronises with a GPU; it is left out
            where they cannot be read: in compiled code and `torch.func` transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleAtanh()
        >>> layer(torch.tensor([-1., 0., 1.]))
        tensor([-inf, 0., inf])
    """

    domain = _SYMMETRIC
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        check_values(self, "x", x, -1, 1)
        return _atanh(x)

    def inverse(self, y: Tensor) -> Tensor:
        check_real(self, "y", y)
        return torch.tanh(y)

    def log_slope(self, x: Tensor) -> Tensor:
        return -torch.log1p(x) - torch.log1p(-x)


class InvertibleSoftplus(Elementwise):
    """Squash to the positive numbers: ``x -> log(1 + exp(x))``, ``y -> log(exp(y) - 1) = y + log(1 - exp(-y))``.

    Below -87 float32 makes it 0, whose inverse is -inf, and small outputs that later layers rebuild have few digits
    left: so mode ``invert`` keeps the input. The log-slope is log(sigmoid(x)).

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for the inverse of negative values. NaN passes. Where values cannot be read (in compiled code and
            `torch.func` transforms), they give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleSoftplus()
        >>> layer.inverse(layer(torch.tensor([-50., 0., 50.])))
        tensor([-50.,   0.,  50.])
    """

    codomain = constraints.positive
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        check_real(self, "x", x)
        return softplus(x)

    def inverse(self, y: Tensor) -> Tensor:
        check_values(self, "y", y, 0, math.inf)
        return y + torch.log(-torch.expm1(-y))

    def log_slope(self, x: Tensor) -> Tensor:
        return -softplus(-x)


class InvertibleExp(Elementwise):
    """Squash to the positive numbers: ``x -> exp(x)``, ``y -> log(y)``.

    Outside (-87, 88) float32 makes it 0 and inf. Mode ``invert`` keeps the input. The log-slope is x.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for the inverse of negative values. NaN passes. Where values cannot be read (in compiled code and
            `torch.func` transforms), they give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> iz.InvertibleExp().inverse(torch.tensor([0., 1.]))
        tensor([-inf, 0.])
    """

    codomain = constraints.positive
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        check_real(self, "x", x)
        return x.exp()

    def inverse(self, y: Tensor) -> Tensor:
        check_values(self, "y", y, 0, math.inf)
        return y.log()

    def log_slope(self, x: Tensor) -> Tensor:
        return x


class InvertibleLog(Elementwise):
    """Stretch the positive numbers to the real line: ``x -> log(x)``, ``y -> exp(y)``.

    The inverse saturates, so mode ``invert`` keeps the input. 0 goes to -inf. The log-slope is -log(x).

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for negative values. NaN passes. Where values cannot be read (in compiled code and `torch.func`
            transforms), they give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> iz.InvertibleLog()(torch.tensor([0., 1.]))
        tensor([-inf, 0.])
    """

    domain = constraints.positive
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        check_values(self, "x", x, 0, math.inf)
        return x.log()

    def inverse(self, y: Tensor) -> Tensor:
        check_real(self, "y", y)
        return y.exp()

    def log_slope(self, x: Tensor) -> Tensor:
        return -x.log()
