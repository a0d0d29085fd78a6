"""Squashing and stretching: sigmoid, tanh, softplus and exp, and their inverses.

All saturate, so mode ``invert`` keeps their inputs. A log-slope is written without differences of what is nearly equal,
and on the side that is given, x or y: the other may have no digits left.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ..log_dets import sum_per_sample
from ._checks import refuse
from .elementwise import Elementwise, check_real, check_values, log_cosh, softplus
from .matrix import widen

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


class _Squash(ABC):
    """A map of the real line onto an interval, ``x -> y``, and the way back. Abstract."""

    ends: tuple[float, float]

    @abstractmethod
    def squash(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def stretch(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def squash_log_slope(self, x: Tensor) -> Tensor:
        """Compute log dy/dx at x."""

    @abstractmethod
    def stretch_log_slope(self, y: Tensor) -> Tensor:
        """Compute log dx/dy at y."""


@dataclass(frozen=True)
class _Logistic(_Squash):
    """``x -> (sigmoid(x) - eps) / (1 - 2 eps)``, whose ends are below 0 and above 1."""

    eps: float = 0.0

    @property
    def ends(self) -> tuple[float, float]:  # type: ignore[override]
        margin = self.eps / (1 - 2 * self.eps)
        return 0 - margin, 1 + margin

    def squash(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        return y if self.eps == 0 else ((y - self.eps) / (1 - 2 * self.eps)).clamp(*self.ends)

    def stretch(self, y: Tensor) -> Tensor:
        if self.eps == 0:
            # torch.logit computes log(y / (1 - y)), which loses all digits near 1/2 in half precision.
            return y.log() - torch.log1p(-y)
        p, q = self._shares(y)
        return (p.log() - q.log()).to(y.dtype)

    def squash_log_slope(self, x: Tensor) -> Tensor:
        return -softplus(x) - softplus(-x) - math.log1p(-2 * self.eps)

    def stretch_log_slope(self, y: Tensor) -> Tensor:
        if self.eps == 0:
            return -y.log() - torch.log1p(-y)
        p, q = self._shares(y)
        return math.log1p(-2 * self.eps) - p.log() - q.log()

    def _shares(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return sigmoid(x) and sigmoid(-x); NaN outside the ends, which rounding may step over."""
        low, high = self.ends
        inside, y = (y >= low) & (y <= high), widen(y)
        p, q = (self.eps + (1 - 2 * self.eps) * share for share in (y, 1 - y))  # near 1, the digits are those of 1 - y
        return p.clamp(min=0).where(inside, torch.nan), q.clamp(min=0)


@dataclass(frozen=True)
class _Tanh(_Squash):
    ends = (-1.0, 1.0)

    def squash(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def stretch(self, y: Tensor) -> Tensor:
        # The gradient of torch.atanh has 1 - y ** 2, which has no digits left near 1; the terms here have opposite
        # signs.
        return (torch.log1p(y) - torch.log1p(-y)) / 2

    def squash_log_slope(self, x: Tensor) -> Tensor:
        return -2 * log_cosh(x)

    def stretch_log_slope(self, y: Tensor) -> Tensor:
        return -torch.log1p(y) - torch.log1p(-y)


@dataclass(frozen=True)
class _Softplus(_Squash):
    ends = (0.0, math.inf)

    def squash(self, x: Tensor) -> Tensor:
        return softplus(x)

    def stretch(self, y: Tensor) -> Tensor:
        return y + torch.log(-torch.expm1(-y))

    def squash_log_slope(self, x: Tensor) -> Tensor:
        return -softplus(-x)

    def stretch_log_slope(self, y: Tensor) -> Tensor:
        return -torch.log(-torch.expm1(-y))


@dataclass(frozen=True)
class _Exp(_Squash):
    ends = (0.0, math.inf)

    def squash(self, x: Tensor) -> Tensor:
        return x.exp()

    def stretch(self, y: Tensor) -> Tensor:
        return y.log()

    def squash_log_slope(self, x: Tensor) -> Tensor:
        return x

    def stretch_log_slope(self, y: Tensor) -> Tensor:
        return -y.log()


class _Squashing(Elementwise):
    """A layer that squashes. Abstract."""

    saturating = True
    curve: _Squash

    def function(self, x: Tensor) -> Tensor:
        check_real(self, "x", x)
        return self.curve.squash(x)

    def inverse(self, y: Tensor) -> Tensor:
        check_values(self, "y", y, *self.curve.ends)
        return self.curve.stretch(y)

    def log_slope(self, x: Tensor) -> Tensor:
        return self.curve.squash_log_slope(x)

    def inverse_with_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y), sum_per_sample(self, self.curve.stretch_log_slope(widen(y)))


class _Stretching(Elementwise):
    """A layer that stretches, the inverse of one that squashes. Abstract."""

    saturating = True
    curve: _Squash

    def function(self, x: Tensor) -> Tensor:
        check_values(self, "x", x, *self.curve.ends)
        return self.curve.stretch(x)

    def inverse(self, y: Tensor) -> Tensor:
        check_real(self, "y", y)
        return self.curve.squash(y)

    def log_slope(self, x: Tensor) -> Tensor:
        return self.curve.stretch_log_slope(x)

    def inverse_with_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y), sum_per_sample(self, self.curve.squash_log_slope(widen(y)))


def _logistic(owner: object, eps: float) -> _Logistic:
    if not isinstance(eps, int | float) or isinstance(eps, bool):
        refuse(owner, "eps", "be a number", repr(eps), TypeError)
    if not 0 <= eps < 0.5:
        refuse(owner, "eps", "be in [0, 0.5)", eps)
    return _Logistic(eps)


class InvertibleSigmoid(_Squashing):
    """Squash to the unit interval: ``x -> s = 1 / (1 + exp(-x))``, ``y -> log(y) - log(1 - y)``.

    It saturates: in float32 no ``x`` above 17 comes back. So mode ``invert`` keeps the input and never inverts. The
    outputs 0 and 1, which rounding makes of large inputs, are in the codomain; their inverses are -inf and inf.

    With ``eps`` it is the inverse of ``InvertibleLogit(eps)``, ``x -> (s - eps) / (1 - 2 eps)``, so that the inverses
    of 0 and 1 are finite. Its codomain is that layer's domain, a little more than [0, 1].

    Shapes: ``(...) -> (...)``.

    Args:
        eps: what the interval is longer by, on either side, as a share of the longer one; below 1/2.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for another eps, and for the inverse of values outside the codomain. NaN passes. Reading the values
            synchronises with a GPU; it is left out where they cannot be read: in compiled code and `torch.func`
            transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleSigmoid()
        >>> layer(torch.tensor([0.]))
        tensor([0.5000])
        >>> layer.inverse(torch.tensor([0., 0.5, 1.]))
        tensor([-inf, 0., inf])
    """

    codomain = constraints.unit_interval
    curve: _Logistic

    def __init__(self, eps: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.curve = _logistic(self, eps)
        if eps:
            self.codomain = constraints.interval(*self.curve.ends)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"eps={self.curve.eps}" if self.curve.eps else ""


class InvertibleLogit(_Stretching):
    """Stretch the unit interval to the real line: ``x -> log(x) - log(1 - x)``, ``y -> s = 1 / (1 + exp(-y))``.

    The inverse saturates, so mode ``invert`` keeps the input. 0 and 1 are in the domain and go to -inf and inf.

    With ``eps``, data in [0, 1] stay finite and come back: ``x -> log(p) - log(1 - p)`` with ``p = eps + (1 - 2 eps)
    x``, and ``y -> (s - eps) / (1 - 2 eps)``; the log-slope is ``log(1 - 2 eps) - log(p) - log(1 - p)``. [0, 1] goes to
    what lies between -log(1 / eps - 1) and log(1 / eps - 1). The domain is a little more, where p is in [0, 1]: from
    -eps / (1 - 2 eps) to 1 + eps / (1 - 2 eps), so that any real y has an inverse; that of a sample may lie a little
    outside [0, 1]. Nothing is clamped, as it is by the eps of `torch.logit`.

    Shapes: ``(...) -> (...)``.

    Args:
        eps: what p keeps from 0 and 1 for x in [0, 1]; below 1/2. For images, 0.05 and 1e-6 are usual.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for another eps, and for values outside the domain. NaN passes. Reading the values synchronises
            with a GPU; it is left out where they cannot be read: in compiled code and `torch.func` transforms, which
            give NaN.
        TypeError: for values that are not real floating point.

    Reference:
        "Density estimation using Real NVP", Dinh, Sohl-Dickstein and Bengio, 2016 (eps).

    Example:
        >>> layer = iz.InvertibleLogit()
        >>> layer(torch.tensor([0., 0.5, 1.]))
        tensor([-inf, 0., inf])
        >>> layer = iz.InvertibleLogit(eps=0.05)
        >>> layer(torch.tensor([0., 0.5, 1.]))
        tensor([-2.9444,  0.0000,  2.9444])
    """

    domain = constraints.unit_interval
    curve: _Logistic

    def __init__(self, eps: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.curve = _logistic(self, eps)
        if eps:
            self.domain = constraints.interval(*self.curve.ends)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"eps={self.curve.eps}" if self.curve.eps else ""


class InvertibleTanh(_Squashing):
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
    curve = _Tanh()


class InvertibleAtanh(_Stretching):
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
    curve = _Tanh()


class InvertibleSoftplus(_Squashing):
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

    codomain = constraints.nonnegative
    curve = _Softplus()


class InvertibleExp(_Squashing):
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

    codomain = constraints.nonnegative
    curve = _Exp()


class InvertibleLog(_Stretching):
    """Stretch the positive numbers to the real line: ``x -> log(x)``, ``y -> exp(y)``.

    The inverse saturates, so mode ``invert`` keeps the input. 0 is in the domain and goes to -inf. The log-slope is
    -log(x).

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for negative values. NaN passes. Where values cannot be read (in compiled code and `torch.func`
            transforms), they give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> iz.InvertibleLog()(torch.tensor([0., 1.]))
        tensor([-inf, 0.])
    """

    domain = constraints.nonnegative
    curve = _Exp()
