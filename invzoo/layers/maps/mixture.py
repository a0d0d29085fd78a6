"""Mixtures of logistic distributions, as a map of each value."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dtypes import bounded
from ...engine import unrecorded
from .curves import Curve
from .roots import newton, with_gradients

__all__ = ["MixtureOfLogistics"]


class _Mixture(NamedTuple):
    """Logistic distributions and their weights, in dim 0; ``F`` below is the distribution function."""

    log_weight: Tensor
    mean: Tensor
    log_scale: Tensor

    def logit(self, x: Tensor) -> Tensor:
        """Compute log F(x) - log(1 - F(x)), without 1 - F."""
        below, above = self._tails(x)
        return below.logsumexp(0) - above.logsumexp(0)

    def log_slope(self, x: Tensor) -> Tensor:
        """Compute the logarithm of the derivative of :meth:`logit`: of what each component adds to F' / (F (1 - F))."""
        below, above = self._tails(x.clamp(-_FAR, _FAR))
        shares = below.log_softmax(0) + above.log_softmax(0) - self.log_weight
        return (shares - self.log_scale).logsumexp(0)

    def slope(self, x: Tensor) -> Tensor:
        return self.log_slope(x).exp()

    def roots(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bound and guess the root of ``logit(x) = y`` by those of the components, each of which is a line."""
        roots = self.mean + self.log_scale.exp() * y
        low, high = roots.amin(0), roots.amax(0)
        near = (self.log_weight.exp() * roots).sum(0).clamp(low, high)
        return low, high, near.where(y.abs() < _FAR, low.where(y < 0, high))  # far out one component is all

    def _tails(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logarithm of each component's mass below x, and above."""
        z = (x - self.mean) * (-self.log_scale).exp()
        return self.log_weight + F.logsigmoid(z), self.log_weight + F.logsigmoid(-z)


_FAR = 2.0**60  # there the slope is that of one component alone, and no sum overflows
_MAX_LOG_WEIGHT = 10.0
_SPREAD = 0.3  # of the means at the start: components that are all the same would stay so
_STEPS = 24  # of Newton's method, where values do not settle before


@dataclass(frozen=True)
class MixtureOfLogistics(Curve):
    """``x -> e^a logit(F(x)) + b``, with F the distribution function of a mixture of logistic distributions.

    The parameters, times ``gain``, are the logarithm of each component's weight, its mean, its log-scale; then a and b.
    All but b are bounded.

    Args:
        components: number of logistic distributions.
        max_mean: bound on the means.
        max_log_scale: bound on a and on the log-scales of the components.
        gain: factor of the parameters.
    """

    components: int = 4
    max_mean: float = 3.0
    max_log_scale: float = 1.0
    gain: float = 0.1

    @property
    def parameters(self) -> int:
        return 3 * self.components + 2

    def move(self, x: Tensor, mixture: _Mixture, log_scale: Tensor, shift: Tensor) -> Tensor:
        return mixture.logit(x) * log_scale.exp() + shift

    def undo(self, y: Tensor, mixture: _Mixture, log_scale: Tensor, shift: Tensor) -> Tensor:
        y = (y - shift) * (-log_scale).exp()
        return with_gradients(mixture.logit, mixture.slope, y, _search(mixture, y.detach()))

    def undo_at(self, x: Tensor, y: Tensor, mixture: _Mixture, log_scale: Tensor, shift: Tensor) -> Tensor:
        return with_gradients(mixture.logit, mixture.slope, (y - shift) * (-log_scale).exp(), x)

    def log_slope(self, x: Tensor, mixture: _Mixture, log_scale: Tensor, shift: Tensor) -> Tensor:
        return mixture.log_slope(x) + log_scale

    def split(self, p: Tensor) -> tuple[_Mixture, Tensor, Tensor]:
        k = self.components
        weight, mean, log_scale, outer, shift = (self.gain * p).split((k, k, k, 1, 1))
        mixture = _Mixture(
            bounded(weight, _MAX_LOG_WEIGHT).log_softmax(0),
            bounded(mean + self._start(mean), self.max_mean),
            bounded(log_scale, self.max_log_scale),
        )
        return mixture, bounded(outer[0], self.max_log_scale), shift[0]

    def _start(self, mean: Tensor) -> Tensor:
        """Return the means where ``h = 0``."""
        ends = _SPREAD if self.components > 1 else 0.0
        start = torch.linspace(-ends, ends, self.components, device=mean.device, dtype=mean.dtype)
        return start.view(-1, *[1] * (mean.ndim - 1))


@unrecorded
def _search(mixture: _Mixture, y: Tensor) -> Tensor:
    """Solve ``logit(x) = y``."""

    def curve(x: Tensor) -> Tensor:  # y itself where rounding can tell no difference: there Newton's method settles
        values = mixture.logit(x)
        return torch.where((values - y).abs() <= rounding, y, values)

    rounding = 4 * torch.finfo(y.dtype).eps * (1 + y.abs())
    return newton(curve, mixture.slope, y, *mixture.roots(y), steps=_STEPS)
