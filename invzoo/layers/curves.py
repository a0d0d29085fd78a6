"""Maps of each value that are no affine ones: with two slopes, of sinh, of a sine; and those that Newton inverts."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ._checks import check_positive, refuse
from .elementwise import log_cosh
from .maps import Map
from .matrix import bounded, widen
from .roots import newton, with_gradients

__all__ = ["Curve", "ImplicitCurve", "SinhArcsinhCurve", "SnakeCurve", "TwoSlopes"]


class Curve(Map):
    """A map whose maths is done in float32 at least, on parameters stacked in front: (n, ...). Abstract."""

    @abstractmethod
    def value(self, x: Tensor, p: Tensor) -> Tensor:
        """Map ``x``."""

    @abstractmethod
    def root(self, y: Tensor, p: Tensor) -> Tensor:
        """Undo :meth:`value`."""

    def root_at(self, y: Tensor, p: Tensor, x: Tensor) -> Tensor:
        """As :meth:`root`, where its values are known to be ``x``; override it to spare a search for them."""
        return self.root(y, p)

    @abstractmethod
    def log_derivative(self, x: Tensor, p: Tensor) -> Tensor:
        """Compute the logarithm of the derivative of :meth:`value`."""

    def value_and_log_derivative(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both; override it where they share work."""
        return self.value(x, p), self.log_derivative(x, p)

    def root_and_log_derivative(self, y: Tensor, p: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute x, which may be ``known``, and the logarithm of the derivative there; override it as before."""
        x = self.root(y, p) if known is None else self.root_at(y, p, known)
        return x, self.log_derivative(x, p)

    def forward(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        return self.value(widen(x), self._stack(h, dim)).to(x.dtype)

    def inverse(self, y: Tensor, h: Tensor, dim: int) -> Tensor:
        return self.root(widen(y), self._stack(h, dim)).to(y.dtype)

    def inverse_at(self, y: Tensor, h: Tensor, dim: int, x: Tensor) -> Tensor:
        return self.root_at(widen(y), self._stack(h, dim), widen(x)).to(y.dtype)

    def log_slope(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        return self.log_derivative(widen(x), self._stack(h, dim)).expand_as(x)

    def forward_and_log_slope(self, x: Tensor, h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        y, log_slope = self.value_and_log_derivative(widen(x), self._stack(h, dim))
        return y.to(x.dtype), log_slope.expand_as(x)

    def inverse_and_log_slope(
        self, y: Tensor, h: Tensor, dim: int, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        known = None if known is None else widen(known)
        x, log_slope = self.root_and_log_derivative(widen(y), self._stack(h, dim), known)
        return x.to(y.dtype), log_slope.expand_as(y)

    def _stack(self, h: Tensor, dim: int) -> Tensor:
        dim %= h.ndim
        return widen(h).unflatten(dim, (self.parameters, h.shape[dim] // self.parameters)).movedim(dim, 0)


class ImplicitCurve(Curve):
    """A map that Newton's method inverts. Abstract."""

    @abstractmethod
    def bracket(self, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return bounds on the root, and a guess of it."""

    def root(self, y: Tensor, p: Tensor) -> Tensor:
        fixed = p.detach()
        start = self.bracket(y.detach(), fixed)
        return self.root_at(y, p, newton(partial(self.value, p=fixed), partial(self._slope, p=fixed), y, *start))

    def root_at(self, y: Tensor, p: Tensor, x: Tensor) -> Tensor:
        return with_gradients(partial(self.value, p=p), partial(self._slope, p=p.detach()), y, x)

    def _slope(self, x: Tensor, p: Tensor) -> Tensor:
        return self.log_derivative(x, p).exp()


@dataclass(frozen=True)
class TwoSlopes(Curve):
    """``x -> x exp(s)``, with s = ``p[0]`` where x > 0 and ``p[1]`` elsewhere, both bounded by ``max_log_slope``."""

    negative_slope: float = 0.25
    max_log_slope: float = 2.0

    parameters = 2

    def check(self, owner: object) -> None:
        check_positive(owner, "negative_slope", self.negative_slope)
        check_positive(owner, "max_log_slope", self.max_log_slope)
        if abs(math.log(self.negative_slope)) >= self.max_log_slope:
            refuse(
                owner, "negative_slope", f"have abs(log) below max_log_slope={self.max_log_slope}", self.negative_slope
            )

    def reset(self, weight: Tensor) -> None:
        weight[0] = 0
        weight[1] = self.max_log_slope * math.atanh(math.log(self.negative_slope) / self.max_log_slope)

    def value(self, x: Tensor, p: Tensor) -> Tensor:
        return self.value_and_log_derivative(x, p)[0]

    def root(self, y: Tensor, p: Tensor) -> Tensor:
        return y * (-self.log_derivative(y, p)).exp()

    def log_derivative(self, x: Tensor, p: Tensor) -> Tensor:
        """The log-slope, which the sign of y tells as well as that of x."""
        positive, negative = bounded(p, self.max_log_slope)
        return torch.where(x > 0, positive, negative)

    def value_and_log_derivative(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = self.log_derivative(x, p)
        return x * log_slope.exp(), log_slope


@dataclass(frozen=True)
class SinhArcsinhCurve(Curve):
    """``x -> sinh(exp(t) asinh(x) + s)`` with skew s = ``p[0]`` and log-tail t = ``p[1]``, both bounded."""

    max_skew: float = 1.0
    max_log_tail: float = 0.5

    parameters = 2

    def check(self, owner: object) -> None:
        check_positive(owner, "max_skew", self.max_skew)
        check_positive(owner, "max_log_tail", self.max_log_tail)

    def value(self, x: Tensor, p: Tensor) -> Tensor:
        skew, log_tail = self._parts(p)
        return torch.sinh(log_tail.exp() * x.asinh() + skew)

    def root(self, y: Tensor, p: Tensor) -> Tensor:
        return self.root_and_log_derivative(y, p)[0]

    def log_derivative(self, x: Tensor, p: Tensor) -> Tensor:
        skew, log_tail = self._parts(p)
        u = x.asinh()
        return _sinh_log_slope(u, log_tail.exp() * u + skew, skew, log_tail)

    def root_and_log_derivative(self, y: Tensor, p: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        skew, log_tail = self._parts(p)
        v = y.asinh()
        u = (v - skew) * (-log_tail).exp()
        return torch.sinh(u), _sinh_log_slope(u, v, skew, log_tail)

    def _parts(self, p: Tensor) -> tuple[Tensor, Tensor]:
        return bounded(p[0], self.max_skew), bounded(p[1], self.max_log_tail)


def _sinh_log_slope(u: Tensor, v: Tensor, skew: Tensor, log_tail: Tensor) -> Tensor:
    """Compute log dy/dx for ``x = sinh(u)``, ``y = sinh(v)`` and ``v = exp(log_tail) u + skew``."""
    at_infinity = torch.where(log_tail == 0, u.sign() * skew, log_tail.detach() * math.inf)
    return torch.where(u.isinf(), at_infinity, log_tail + log_cosh(v) - log_cosh(u))


@dataclass(frozen=True)
class SnakeCurve(ImplicitCurve):
    """``x -> x + sin(a x)^2 / (2 a)`` with log a = ``p[0]``, bounded by ``max_log_frequency``."""

    max_log_frequency: float = 2.0

    parameters = 1

    def check(self, owner: object) -> None:
        check_positive(owner, "max_log_frequency", self.max_log_frequency)

    def value(self, x: Tensor, p: Tensor) -> Tensor:
        a = self._frequency(p)
        return x + torch.sin(_phase(a * x)).square() / (2 * a)

    def log_derivative(self, x: Tensor, p: Tensor) -> Tensor:
        return torch.log1p(torch.sin(2 * _phase(self._frequency(p) * x)) / 2)

    def bracket(self, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        amplitude = 1 / (2 * self._frequency(p))
        return y - amplitude, y, y - amplitude / 2

    def _frequency(self, p: Tensor) -> Tensor:
        return bounded(p[0], self.max_log_frequency).exp()


def _phase(angle: Tensor) -> Tensor:
    """``angle``, but where it is too large for a float a large one: far out, rounding leaves nothing of the phase."""
    largest = torch.finfo(angle.dtype).max / 2
    return angle.clamp(-largest, largest)
