"""Maps of the real line onto an interval, and the way back.

A log-slope is written without differences of what is nearly equal, and on the side that is given, x or y: the other may
have no digits left.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...dtypes import widen
from .._checks import refuse
from ..elementwise import log_cosh, softplus

__all__ = ["EXP", "SOFTPLUS", "TANH", "Logistic", "Way"]


class Way(NamedTuple):
    """One of the two, and its log-slope, both at the value that it takes."""

    map: Callable[[Tensor], Tensor]
    log_slope: Callable[[Tensor], Tensor]


# The gradient of torch.atanh has 1 - y ** 2, which has no digits left near 1; the terms here have opposite signs.
TANH = (
    Way(torch.tanh, lambda x: -2 * log_cosh(x)),
    Way(lambda y: (torch.log1p(y) - torch.log1p(-y)) / 2, lambda y: -torch.log1p(y) - torch.log1p(-y)),
)

SOFTPLUS = (
    Way(softplus, lambda x: -softplus(-x)),
    Way(lambda y: y + torch.log(-torch.expm1(-y)), lambda y: -torch.log(-torch.expm1(-y))),
)

EXP = Way(torch.exp, lambda x: x), Way(torch.log, lambda y: -y.log())


@dataclass(frozen=True)
class Logistic:
    """``x -> (sigmoid(x) - eps) / (1 - 2 eps)``, whose ends are below 0 and above 1."""

    eps: float = 0.0

    @classmethod
    def of(cls, owner: object, eps: float) -> "Logistic":
        """Make one of a layer's option."""
        if not isinstance(eps, int | float) or isinstance(eps, bool):
            refuse(owner, "eps", "be a number", repr(eps), TypeError)
        if not 0 <= eps < 0.5:
            refuse(owner, "eps", "be in [0, 0.5)", eps)
        return cls(eps)

    @property
    def ends(self) -> tuple[float, float]:
        margin = self.eps / (1 - 2 * self.eps)
        return 0 - margin, 1 + margin

    @property
    def ways(self) -> tuple[Way, Way]:
        return Way(self.squash, self.squash_log_slope), Way(self.stretch, self.stretch_log_slope)

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
