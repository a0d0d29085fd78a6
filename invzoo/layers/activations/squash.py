"""Squashing and stretching: sigmoid, tanh, softplus and exp, and their inverses.

All saturate, so mode ``invert`` keeps their inputs.
"""

from typing import Any

from torch import Tensor
from torch.distributions import constraints

from ...dtypes import widen
from ..elementwise import Elementwise
from .intervals import EXP, SOFTPLUS, TANH, Logistic, Way

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


class _Squash(Elementwise):
    """A map of the line onto an interval, or the way back: a subclass says which of the two is there. Abstract."""

    saturating = True
    there: Way
    back: Way

    def move(self, x: Tensor) -> Tensor:
        return self.there.map(x)

    def undo(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.back.map(y), y

    def log_slope(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute it at the side that was given: the other may have no digits left."""
        return self.there.log_slope(widen(x)) if y is None else -self.back.log_slope(widen(y))


class InvertibleSigmoid(_Squash):
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

    def __init__(self, eps: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.curve = Logistic.of(self, eps)
        self.there, self.back = self.curve.ways
        if eps:
            self.codomain = constraints.interval(*self.curve.ends)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"eps={self.curve.eps}" if self.curve.eps else ""


class InvertibleLogit(_Squash):
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

    def __init__(self, eps: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.curve = Logistic.of(self, eps)
        self.back, self.there = self.curve.ways
        if eps:
            self.domain = constraints.interval(*self.curve.ends)  # type: ignore[misc]

    extra_repr = InvertibleSigmoid.extra_repr


class InvertibleTanh(_Squash):
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
    there, back = TANH


class InvertibleAtanh(_Squash):
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
    back, there = TANH


class InvertibleSoftplus(_Squash):
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
    there, back = SOFTPLUS


class InvertibleExp(_Squash):
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
    there, back = EXP


class InvertibleLog(_Squash):
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
    back, there = EXP
