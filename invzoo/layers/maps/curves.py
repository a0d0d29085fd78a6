"""Maps of each value that are no affine ones: with two slopes, of sinh, of a sine; and those that Newton inverts."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...dtypes import bounded, widen
from ...protocol import Like
from .._checks import check_positive, check_positive_int, refuse
from ..elementwise import log_cosh
from .base import Map
from .roots import newton, with_gradients

__all__ = ["Curve", "ImplicitCurve", "SinhArcsinhCurve", "SnakeCurve", "TwoSlopes"]


@dataclass(frozen=True)
class Curve(Map):
    """A map whose maths is done in float32 at least, on parameters stacked in front: (n, ...). Abstract.

    Its options are its fields: positive, and whole where the default is.
    """

    widens = True

    def check(self, owner: object) -> None:
        for option in fields(self):
            check = check_positive_int if isinstance(option.default, int) else check_positive
            check(owner, option.name, getattr(self, option.name))

    def parts(self, h: Tensor, like: Like, dim: int) -> tuple[Any, ...]:
        dim %= h.ndim
        return self.split(widen(h).unflatten(dim, (self.parameters, h.shape[dim] // self.parameters)).movedim(dim, 0))

    @abstractmethod
    def split(self, p: Tensor) -> tuple[Any, ...]:
        """Return what the words get of the parameters."""


class ImplicitCurve(Curve):
    """A map that Newton's method inverts. Abstract."""

    @abstractmethod
    def bracket(self, y: Tensor, *h: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return bounds on the root, and a guess of it."""

    def undo(self, y: Tensor, *h: Tensor) -> Tensor:
        fixed = [t.detach() for t in h]
        start = self.bracket(y.detach(), *fixed)
        return self.undo_at(newton(lambda x: self.move(x, *fixed), self._slope(fixed), y, *start), y, *h)

    def undo_at(self, x: Tensor, y: Tensor, *h: Tensor) -> Tensor:
        return with_gradients(lambda x: self.move(x, *h), self._slope([t.detach() for t in h]), y, x)

    def _slope(self, h: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: self.log_slope(x, *h).exp()


@dataclass(frozen=True)
class TwoSlopes(Curve):
    """``x -> x exp(s)``, with s = ``p[0]`` where x > 0 and ``p[1]`` elsewhere, both bounded by ``max_log_slope``."""

    negative_slope: float = 0.25
    max_log_slope: float = 2.0

    parameters = 2

    def check(self, owner: object) -> None:
        super().check(owner)
        if abs(math.log(self.negative_slope)) >= self.max_log_slope:
            refuse(
                owner, "negative_slope", f"have abs(log) below max_log_slope={self.max_log_slope}", self.negative_slope
            )

    def reset(self, weight: Tensor) -> None:
        weight[0] = 0
        weight[1] = self.max_log_slope * math.atanh(math.log(self.negative_slope) / self.max_log_slope)

    def split(self, p: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = bounded(p, self.max_log_slope)
        return positive, negative

    def seen(self, x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The log-slope, which the sign of y tells as well as that of x."""
        return torch.where(x > 0, positive, negative)

    def move(self, x: Tensor, positive: Tensor, negative: Tensor, log_slope: Tensor) -> Tensor:
        return x * log_slope.exp()

    def undo(self, y: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = self.seen(y, positive, negative)
        return y * (-log_slope).exp(), log_slope

    def log_slope(self, x: Tensor, positive: Tensor, negative: Tensor, log_slope: Tensor) -> Tensor:
        return log_slope


@dataclass(frozen=True)
class SinhArcsinhCurve(Curve):
    """``x -> sinh(exp(t) asinh(x) + s)`` with skew s = ``p[0]`` and log-tail t = ``p[1]``, both bounded."""

    max_skew: float = 1.0
    max_log_tail: float = 0.5

    parameters = 2

    def split(self, p: Tensor) -> tuple[Tensor, Tensor]:
        return bounded(p[0], self.max_skew), bounded(p[1], self.max_log_tail)

    def seen(self, x: Tensor, skew: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor]:
        """Return u and v, of which x and y are sinh."""
        u = x.asinh()
        return u, log_tail.exp() * u + skew

    def move(self, x: Tensor, skew: Tensor, log_tail: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return torch.sinh(v)

    def undo(self, y: Tensor, skew: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = y.asinh()
        u = (v - skew) * (-log_tail).exp()
        return torch.sinh(u), u, v

    def log_slope(self, x: Tensor, skew: Tensor, log_tail: Tensor, u: Tensor, v: Tensor) -> Tensor:
        at_infinity = torch.where(log_tail == 0, u.sign() * skew, log_tail.detach() * math.inf)
        return torch.where(u.isinf(), at_infinity, log_tail + log_cosh(v) - log_cosh(u))


@dataclass(frozen=True)
class SnakeCurve(ImplicitCurve):
    """``x -> x + sin(a x)^2 / (2 a)`` with log a = ``p[0]``, bounded by ``max_log_frequency``."""

    max_log_frequency: float = 2.0

    parameters = 1

    def split(self, p: Tensor) -> tuple[Tensor]:
        return (bounded(p[0], self.max_log_frequency).exp(),)

    def move(self, x: Tensor, a: Tensor) -> Tensor:
        return x + torch.sin(_phase(a * x)).square() / (2 * a)

    def log_slope(self, x: Tensor, a: Tensor) -> Tensor:
        return torch.log1p(torch.sin(2 * _phase(a * x)) / 2)

    def bracket(self, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        amplitude = 1 / (2 * a)
        return y - amplitude, y, y - amplitude / 2


def _phase(angle: Tensor) -> Tensor:
    """``angle``, but where it is too large for a float a large one: far out, rounding leaves nothing of the phase."""
    largest = torch.finfo(angle.dtype).max / 2
    return angle.clamp(-largest, largest)
