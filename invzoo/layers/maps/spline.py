r"""Monotone splines of rational quadratic pieces, as a map of each value.

"Neural Spline Flows", Durkan, Bekasov, Murray and Papamakarios, 2019, have the formulas; here they are written without
a difference of positive numbers. Of a bin with mean slope ``s = height / width`` and slopes ``d0`` and ``d1`` at its
ends, with ``xi`` and ``theta`` the place in the bin before and after, from 0 to 1, and ``eta = 1 - xi``:

.. math:: \theta = \xi (s \xi + d_0 \eta) / D, \quad D = s (\xi^2 + \eta^2) + (d_0 + d_1) \xi \eta

.. math:: dy / dx = s^2 (d_1 \xi^2 + 2 s \xi \eta + d_0 \eta^2) / D^2

The quadratic equation for ``xi`` has a sum of squares for its discriminant, ``u^2 + 4 s^2 theta (1 - theta)`` with
``u = d0 (1 - theta) - d1 theta``. With ``t = abs(u) + sqrt(discriminant)``, its root is ``2 s theta / (t + 2 s theta)``
where ``u > 0``, and ``t / (t + 2 s (1 - theta))`` elsewhere.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from ...dtypes import bounded, widen
from ...protocol import Like
from .._checks import check_choice, check_positive, check_positive_int, refuse
from ..elementwise import check_domain
from .base import Map

__all__ = ["RationalQuadratic"]

_SLOPES = {"linear": -1, "circular": 0, None: 1}  # how many more slopes than bins there are parameters of


class _Bin(NamedTuple):
    """The bin of each value: its corner and sizes, and the slopes at its ends."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    first: Tensor
    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        s, xi, eta, denominator = self._terms(x)
        return self.bottom + self.height * xi * (s * xi + self.first * eta) / denominator

    def inverse(self, y: Tensor) -> Tensor:
        s, theta = self.height / self.width, (y - self.bottom) / self.height
        u = self.first * (1 - theta) - self.last * theta
        t = u.abs() + (u.square() + 4 * s.square() * theta * (1 - theta)).sqrt()
        rest = 2 * s * torch.where(u > 0, theta, 1 - theta)
        return self.left + self.width * torch.where(u > 0, rest, t) / (t + rest)

    def log_slope(self, x: Tensor) -> Tensor:
        s, xi, eta, denominator = self._terms(x)
        mean = self.last * xi.square() + 2 * s * xi * eta + self.first * eta.square()
        return mean.log() + 2 * (s / denominator).log()

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, xi = self.height / self.width, (x - self.left) / self.width
        eta = 1 - xi
        return s, xi, eta, s * (xi.square() + eta.square()) + (self.first + self.last) * xi * eta


@dataclass(frozen=True)
class RationalQuadratic(Map):
    """A monotone spline of rational quadratic pieces from [-bound, bound] onto itself; the identity where ``h = 0``.

    Its parameters, times ``gain``, say how wide the bins are, then how high, and then what the slopes at the knots
    between them are (with circular tails, those at the ends too, which are one; without tails, at both ends).

    Args:
        bins: number of pieces.
        bound: half the length of the interval.
        tails: ``'linear'``: the identity outside the interval, with slopes 1 at its ends. ``'circular'``: the ends are
            one point, and what is ``2 bound`` further comes out ``2 bound`` further. None: no values outside.
        min_bin: the least width and height of a bin, as a share of the interval.
        min_slope: the least slope at a knot; the largest is its reciprocal.
        gain: factor of the parameters.
    """

    bins: int = 8
    bound: float = 3.0
    tails: str | None = "linear"
    min_bin: float = 1e-2
    min_slope: float = 1e-2
    gain: float = 0.1

    @property
    def parameters(self) -> int:
        return 3 * self.bins + _SLOPES[self.tails]

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.interval(-self.bound, self.bound) if self.tails is None else constraints.real

    def check(self, owner: object) -> None:
        check_positive_int(owner, "bins", self.bins)
        if self.bins < 2:
            refuse(owner, "bins", "be at least 2", self.bins)
        check_choice(owner, "tails", self.tails, _SLOPES)
        limits = {"bound": math.inf, "min_bin": 1 / self.bins, "min_slope": 1, "gain": math.inf}
        for name, limit in limits.items():
            check_positive(owner, name, getattr(self, name), below=limit)

    def check_value(self, owner: object, argument: str, x: Any) -> None:
        check_domain(owner, argument, x, self.domain)

    def parts(self, h: Tensor, like: Like, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return, in dim 0, the sizes of the bins in units of their sums, and what the slopes are made of."""
        dim %= like.ndim
        h = widen(h).unflatten(dim, (self.parameters, like.shape[dim])).movedim(dim, 0)
        widths, heights, slopes = h.split((self.bins, self.bins, self.parameters - 2 * self.bins))
        return self._sizes(widths), self._sizes(heights), slopes

    def seen(self, x: Tensor, *h: Any) -> tuple[Tensor, _Bin]:
        """Return x in the interval, and its bin."""
        inner = self._enter(x)
        return inner, self._find(inner, *h)

    def move(self, x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *seen: Any) -> Tensor:
        inner, bin_ = seen
        return self._leave(x, inner, bin_.forward(inner))

    def undo(self, y: Tensor, *h: Any) -> tuple[Tensor, Tensor, _Bin]:
        inner = self._enter(y)
        bin_ = self._find(inner, *h, of_output=True)
        moved = bin_.inverse(inner)
        return self._leave(y, inner, moved), moved, bin_

    def log_slope(self, x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *seen: Any) -> Tensor:
        inner, bin_ = seen
        return bin_.log_slope(inner).masked_fill(self._outside(x), 0 if self.tails else torch.nan)

    def _outside(self, x: Tensor) -> Tensor:
        if self.tails is None:
            return ~(x.abs() <= self.bound)  # NaN is, too
        return x.abs() >= (self.bound if self.tails == "linear" else math.inf)

    def _enter(self, x: Tensor) -> Tensor:
        """Return ``x`` in the interval; elsewhere 0, or with circular tails the same point of the circle."""
        inner = widen(x).masked_fill(self._outside(x), 0)
        if self.tails is None:
            return _replaced(inner, inner.clamp(-self.bound, self.bound))  # a half may be beyond it
        if self.tails == "linear":
            return inner
        rest = torch.fmod(inner, 2 * self.bound)  # exact, as are the sums
        rest = torch.where(rest >= self.bound, rest - 2 * self.bound, rest)
        return torch.where(rest < -self.bound, rest + 2 * self.bound, rest)

    def _leave(self, x: Tensor, inner: Tensor, moved: Tensor) -> Tensor:
        """Undo :meth:`_enter` for ``moved``, what became of ``inner``; NaN outside if there are no tails."""
        if self.tails == "circular":
            return (moved + (widen(x) - inner)).to(x.dtype)
        if self.tails is None:
            within = moved.clamp(-self.bound, self.bound)  # rounding steps over the ends, which stay where they are
            moved = _replaced(moved, torch.where(inner.abs() >= self.bound, inner, within))
        return torch.where(self._outside(x), x if self.tails else torch.nan, moved.to(x.dtype))

    def _find(self, value: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *, of_output: bool = False) -> _Bin:
        """Return the bin of each value, which is an x, or a y if ``of_output``."""
        index = _count_knots(heights if of_output else widths, (value / self.bound + 1) / 2)
        left, width = _side(widths, index, self.bound)
        bottom, height = _side(heights, index, self.bound)
        first, last = self._slope(slopes, index), self._slope(slopes, index + 1)
        return _Bin(left, width, bottom, height, first, last)

    def _sizes(self, h: Tensor) -> Tensor:
        """Return sizes in units of their sum, between 1 / sqrt(ratio) and sqrt(ratio), and 1 where ``h = 0``."""
        ratio = (1 / self.min_bin - 1) / (self.bins - 1)
        least, most = ratio**-0.5, ratio**0.5
        # Of this, autograd keeps one number each; of a softmax that is safe at infinity it would keep two.
        return least + (most - least) * torch.sigmoid(self.gain * h - math.log(most))

    def _slope(self, h: Tensor, knot: Tensor) -> Tensor:
        if self.tails == "linear":
            knot = knot - 1  # an end has no parameter, as if it were 0
        elif self.tails == "circular":
            knot = knot % self.bins
        return bounded(self.gain * _sum_of(h, _places(h) == knot), -math.log(self.min_slope)).exp()


def _replaced(value: Tensor, by: Tensor) -> Tensor:
    """Return what differs from ``value`` by rounding, with the gradients of ``value``."""
    return value + (by - value).detach()


def _count_knots(sizes: Tensor, value: Tensor) -> Tensor:
    """Count the knots below a value in [0, 1], those at the ends aside: the index of its bin."""
    with torch.no_grad():
        return (value * sizes.sum(0) >= sizes.cumsum(0)[:-1]).sum(0)


def _side(sizes: Tensor, index: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return where the bin begins in [-bound, bound], and its size."""
    unit, places = 2 * bound / sizes.sum(0), _places(sizes)
    return unit * _sum_of(sizes, places < index) - bound, unit * _sum_of(sizes, places == index)


def _places(blocks: Tensor) -> Tensor:
    return torch.arange(len(blocks), device=blocks.device).view(-1, *[1] * (blocks.ndim - 1))


def _sum_of(blocks: Tensor, mask: Tensor) -> Tensor:
    """Sum the blocks of the mask, which is all that autograd keeps of them; `torch.gather` would keep the blocks."""
    return torch.where(mask, blocks, 0).sum(0)
