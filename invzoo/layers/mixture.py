r"""Mixtures of logistic distributions, as a map of each value and in couplings."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import bounded
from ..engine import unrecorded
from ._checks import check_positive, check_positive_int
from .coupling import Coupling, Subnet, zero_last
from .curves import Curve
from .roots import newton, with_gradients
from .split import SplitSpec

__all__ = ["MixtureLogisticCoupling", "MixtureOfLogistics"]


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

    def check(self, owner: object) -> None:
        check_positive_int(owner, "components", self.components)
        for name in ("max_mean", "max_log_scale", "gain"):
            check_positive(owner, name, getattr(self, name))

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


class MixtureLogisticCoupling(Coupling):
    r"""Move each half by mixtures of logistic distributions that depend on the other: ``y1 = e^a logit(F(x1)) + b``.

    F is the distribution function of a mixture of logistic distributions, so that a value moves by a smooth curve with
    as many steps as there are components, and by a straight line far out. A subnet returns, stacked along ``dim``, a
    block for the log-weight of each component, then for each mean, each log-scale, and at last a and b. They are
    multiplied by 0.1, and all but b are bounded, so that deep stacks can be inverted in float32. Where they are 0, the
    means are spread over [-0.3, 0.3], so that components can become different, and slopes are between 0.97 and 1.

    The inverse solves for x1 by Newton's method in a bracket: one evaluation of the subnet, but about ten of the
    mixture, at most 24. Behind small subnets mode ``recompute`` is several times faster than ``invert``. The inverse's
    gradients are those of the implicit function, the first two of them.

    Shapes: as for :class:`AdditiveCoupling`, except that subnets return ``3 * components + 2`` times as many features
    in ``dim``.

    Args:
        f: a module or a function; it gets the side inputs as keyword arguments.
        g: likewise, or None: then ``y2 = x2``.
        components: number of logistic distributions.
        max_mean: bound on the means.
        max_log_scale: bound on a and on the components' log-scales, in nats.
        dim, split, swap, zero_init: as for :class:`AffineCoupling`.
        options: ``subnet_dtype`` of :class:`AffineCoupling`, and those of :class:`InvertibleModule`.

    Raises:
        ValueError: for options that are not positive, another ``split``, an input that cannot be split so, or a subnet
            that returns another shape.
        TypeError: for a subnet that cannot be called, or an input that is not one tensor or two.

    Reference:
        "Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design", Ho,
        Chen, Srinivas, Duan and Abbeel, 2019.

    Example:
        >>> layer = iz.MixtureLogisticCoupling(nn.Linear(2, 2 * 14))
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        f: Subnet,
        g: Subnet | None = None,
        *,
        components: int = 4,
        max_mean: float = 3.0,
        max_log_scale: float = 1.0,
        dim: int | None = None,
        split: SplitSpec = "half",
        swap: bool = False,
        zero_init: bool = False,
        **options: Any,
    ) -> None:
        mixture = MixtureOfLogistics(components, max_mean, max_log_scale)
        super().__init__(mixture, f, g, dim=dim, split=split, swap=swap, **options)
        for net in (f, g) if zero_init else ():
            zero_last(net)
