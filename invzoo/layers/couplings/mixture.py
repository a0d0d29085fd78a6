"""Couplings by mixtures of logistic distributions."""

from typing import Any

from ..maps.mixture import MixtureOfLogistics
from ..rearrangements.split import SplitSpec
from .coupling import Coupling, Subnet, zero_last

__all__ = ["MixtureLogisticCoupling"]


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
