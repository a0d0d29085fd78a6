"""Maps of each value that are integrals of a positive density, linear outside an interval."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dtypes import bounded
from .._checks import check_positive
from .curves import ImplicitCurve

__all__ = ["BernsteinIntegral", "Integral", "NetIntegral", "SquaresIntegral", "clenshaw_curtis"]


def clenshaw_curtis(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the n + 1 nodes and weights of Clenshaw and Curtis on [0, 1], exact for polynomials of degree n."""
    k = torch.arange(n + 1, device=like.device, dtype=like.dtype)
    j, angles = k[1 : n // 2 + 1], k * (math.pi / n)
    terms = torch.where(2 * j == n, 1, 2) / (4 * j * j - 1) * torch.cos(2 * j * angles[:, None])
    ends = torch.where(k % n == 0, 0.5, 1).to(k)  # two numbers make a tensor of the default dtype
    return (1 - torch.cos(angles)) / 2, ends * (1 - terms.sum(1)) / n


@dataclass(frozen=True)
class Integral(ImplicitCurve):
    """``x -> p[0] + (integral from 0 to x of a density with parameters p[1:])``. Abstract.

    Outside [-tail_bound, tail_bound] the density is what it is at the nearer end, so that the map is linear there.
    """

    tail_bound: float = 5.0

    @property
    @abstractmethod
    def order(self) -> int:
        """The degree of the polynomials that the quadrature integrates exactly."""

    @property
    @abstractmethod
    def slopes(self) -> tuple[float, float]:
        """Bounds on the density."""

    @abstractmethod
    def log_density(self, t: Tensor, p: Tensor) -> Tensor:
        """Compute the logarithm of the density at ``t`` inside the bounds."""

    def split(self, p: Tensor) -> tuple[Tensor, Tensor]:
        return p[0], p[1:]

    def move(self, x: Tensor, shift: Tensor, p: Tensor) -> Tensor:
        end = x.clamp(-self.tail_bound, self.tail_bound)
        return shift + self._area(end, p) + (x - end) * self._density(end, p)

    def log_slope(self, x: Tensor, shift: Tensor, p: Tensor) -> Tensor:
        return self.log_density(x.clamp(-self.tail_bound, self.tail_bound), p)

    def bracket(self, y: Tensor, shift: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (least, most), guess = self.slopes, y - shift
        near, far = guess / (1.01 * most), guess / (0.99 * least)  # the quadrature is not exact
        return torch.minimum(near, far), torch.maximum(near, far), guess

    def _density(self, t: Tensor, p: Tensor) -> Tensor:
        return self.log_density(t, p).exp()

    def _area(self, x: Tensor, p: Tensor) -> Tensor:
        # The last term is 0, with the derivatives of the area in x, the first two, as they are without quadrature.
        fixed, shape = x.detach(), (-1,) + (1,) * x.ndim
        nodes, weights = (values.view(shape) for values in clenshaw_curtis(self.order, x))
        mean = (weights * self._density(nodes * fixed, p.unsqueeze(1))).sum(0)
        return fixed * mean + (x - fixed) * self._density((x + fixed) / 2, p)


@dataclass(frozen=True)
class NetIntegral(Integral):
    """The log-density is a net with one hidden layer of tanh, bounded by ``max_log_slope``."""

    hidden: int = 8
    order: int = 32
    max_log_slope: float = 3.0

    @property
    def parameters(self) -> int:
        return 3 * self.hidden + 2

    @property
    def slopes(self) -> tuple[float, float]:
        return math.exp(-self.max_log_slope), math.exp(self.max_log_slope)

    def reset(self, weight: Tensor) -> None:
        weight.zero_()
        weight[2 : 2 + 2 * self.hidden].normal_()

    def log_density(self, t: Tensor, p: Tensor) -> Tensor:
        inner, bias, outer = p[1:].unflatten(0, (3, self.hidden))
        return bounded(p[0] + (outer * torch.tanh(inner * t + bias)).sum(0), self.max_log_slope)


@dataclass(frozen=True)
class SquaresIntegral(Integral):
    """The density is m + (1 - m) times the mean of squares of polynomials 1 + a_0 + a_1 t + ..., all abs(a) < 1."""

    degree: int = 3
    polynomials: int = 2
    min_slope: float = 1e-2

    @property
    def parameters(self) -> int:
        return self.polynomials * (self.degree + 1) + 1

    @property
    def order(self) -> int:
        return 2 * self.degree

    @property
    def slopes(self) -> tuple[float, float]:
        return self.min_slope, (self.degree + 2) ** 2

    def check(self, owner: object) -> None:
        super().check(owner)
        check_positive(owner, "min_slope", self.min_slope, below=1)

    def reset(self, weight: Tensor) -> None:
        weight.zero_()
        weight[1:].normal_(std=0.01)  # so that the polynomials differ

    def log_density(self, t: Tensor, p: Tensor) -> Tensor:
        value, u = torch.zeros_like(t), t / self.tail_bound
        for a in bounded(p, 1.0).unflatten(0, (self.degree + 1, self.polynomials)):
            value = value * u + a
        return torch.log(self.min_slope + (1 - self.min_slope) * (1 + value).square().mean(0))


@dataclass(frozen=True)
class BernsteinIntegral(Integral):
    """The density is a polynomial with positive Bernstein coefficients exp(p), p bounded by ``max_log_slope``."""

    degree: int = 8
    max_log_slope: float = 3.0

    @property
    def parameters(self) -> int:
        return self.degree + 1

    @property
    def order(self) -> int:
        return max(self.degree - 1, 1)

    slopes = NetIntegral.slopes

    def log_density(self, t: Tensor, p: Tensor) -> Tensor:
        u = (t / self.tail_bound + 1) / 2
        value = bounded(p, self.max_log_slope).exp()
        while len(value) > 1:  # de Casteljau
            value = torch.lerp(value[:-1], value[1:], u)
        return value[0].log()
