"""Maps of the real line onto an interval, and the way back.

A log-slope is written without differences of what is nearly equal, and on the side that is given, x or y: the other may
have no digits left.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import widen
from .elementwise import log_cosh, softplus

__all__ = ["Exp", "Logistic", "Softplus", "Squash", "Tanh"]


class Squash(ABC):
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
class Logistic(Squash):
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
class Tanh(Squash):
    """``x -> tanh(x)``."""

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
class Softplus(Squash):
    """``x -> log(1 + exp(x))``."""

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
class Exp(Squash):
    """``x -> exp(x)``."""

    ends = (0.0, math.inf)

    def squash(self, x: Tensor) -> Tensor:
        return x.exp()

    def stretch(self, y: Tensor) -> Tensor:
        return y.log()

    def squash_log_slope(self, x: Tensor) -> Tensor:
        return x

    def stretch_log_slope(self, y: Tensor) -> Tensor:
        return -y.log()
