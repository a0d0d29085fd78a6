"""Layers that move each value by a spline: its parameters come from the other half, from a weight or a condition."""

from typing import Any

import torch

from .conditioned import Conditioner
from .coupling import Coupling, Subnet, zero_last
from .elementwise_map import PerFeatureMap
from .spline import RationalQuadratic
from .split import SplitSpec

__all__ = ["RationalQuadraticCoupling", "RationalQuadraticSpline"]


class RationalQuadraticCoupling(Coupling):
    r"""Move each value of one half by a spline whose bins and slopes are functions of the other half, and vice versa.

    A spline of rational quadratic pieces maps [-bound, bound] onto itself; its inverse has a closed form. A subnet
    returns its parameters ``h``, stacked along ``dim``: ``bins`` blocks for the widths of the bins, ``bins`` for the
    heights, and ``bins - 1`` for the slopes at the knots (with circular tails ``bins``, the first at the ends; without
    tails ``bins + 1``, with those at the ends). Where they are 0 the spline is the identity. It depends on ``0.1 h``,
    as :class:`AffineCoupling` does, and its bins and slopes are bounded: deep stacks of splines that follow their
    subnets faster cannot be inverted in float32.

    Shapes: as for :class:`AdditiveCoupling`, except that subnets return ``3 * bins - 1`` times as many features in
    ``dim``, or ``3 * bins`` times with circular tails, or ``3 * bins + 1`` times without tails.

    Args:
        f: a module or a function; it gets the side inputs as keyword arguments.
        g: likewise, or None: then ``y2 = x2``.
        bins: number of pieces, at least 2.
        bound: half the length of the interval.
        tails: ``'linear'``: the identity outside the interval. ``'circular'``, for angles: the ends of the interval are
            one point, with one slope; what is ``2 bound`` further comes out ``2 bound`` further. Subnets should then
            see their input as its sine and cosine. None, for data between bounds: the layer's domain and codomain
            are [-bound, bound], and the slopes at the ends are free.
        min_bin: the least width and height of a bin, as a share of the interval.
        min_slope: the least slope at a knot; the largest is its reciprocal.
        dim, split, swap, zero_init: as for :class:`AffineCoupling`; with ``zero_init`` it starts at the identity.
        options: ``subnet_dtype`` of :class:`AffineCoupling`, and those of :class:`InvertibleModule`.

    Raises:
        ValueError: for options that make no spline or no split, an input that cannot be split so, or a subnet that
            returns another shape; without tails, for values to be moved that are outside [-bound, bound]. NaN passes.
            Reading the values synchronises with a GPU; it is left out where they cannot be read: in compiled code and
            `torch.func` transforms, which give NaN.
        TypeError: for a subnet that cannot be called, or an input that is not one tensor or two.

    References:
        "Neural Spline Flows", Durkan, Bekasov, Murray and Papamakarios, 2019.
        "Normalizing Flows on Tori and Spheres", Rezende et al., 2020 (circular).

    Example:
        >>> layer = iz.RationalQuadraticCoupling(nn.Linear(2, 2 * 23))
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        True
    """

    def __init__(
        self,
        f: Subnet,
        g: Subnet | None = None,
        *,
        bins: int = 8,
        bound: float = 3.0,
        tails: str | None = "linear",
        min_bin: float = 1e-2,
        min_slope: float = 1e-2,
        dim: int | None = None,
        split: SplitSpec = "half",
        swap: bool = False,
        zero_init: bool = False,
        **options: Any,
    ) -> None:
        spline = RationalQuadratic(bins, bound, tails, min_bin, min_slope)
        super().__init__(spline, f, g, dim=dim, split=split, swap=swap, **options)
        for net in (f, g) if zero_init else ():
            zero_last(net)


class RationalQuadraticSpline(PerFeatureMap):
    r"""Move each feature by a spline of its own, which starts as the identity.

    A spline of rational quadratic pieces maps [-bound, bound] onto itself; its inverse has a closed form. The weight
    has a row for the width of each bin, then for each height, and then for the slope at each knot. With a conditioner,
    the parameters are the layer's own plus what it returns, so one that returns zeros changes nothing. The spline
    depends on 0.1 times their sum, and its bins and slopes are bounded, as in :class:`RationalQuadraticCoupling`.

    Shapes: ``(B, ...) -> (B, ...)`` with ``features`` in ``dim``. The conditioner returns ``(B, n * features)`` for
    the n rows of the weight, those of one row side by side, or the shape of x with that in ``dim``, or one that
    broadcasts to it.

    Args:
        features: size of ``dim``.
        dim: the dimension that has a spline for each entry; 1 by default, but to be given for one tensor of three dims.
        bins, bound, tails, min_bin, min_slope: as for :class:`RationalQuadraticCoupling`.
        conditioner: a module or a function of the side input ``context``, or None.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for options that make no spline, or if sizes, shapes or devices do not fit; without tails, for
            values outside [-bound, bound], as in :class:`RationalQuadraticCoupling`.
        TypeError: for values that are not real floating point, and if there is a conditioner without a context.

    Reference:
        "Neural Spline Flows", Durkan, Bekasov, Murray and Papamakarios, 2019.

    Example:
        >>> layer = iz.RationalQuadraticSpline(3, dim=1, conditioner=nn.Linear(2, 3 * 23))
        >>> x, context = torch.randn(4, 3, 5), torch.randn(4, 2)
        >>> y = layer(x, context=context)
        >>> torch.allclose(layer.inverse(y, context=context), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        *,
        dim: int | None = None,
        bins: int = 8,
        bound: float = 3.0,
        tails: str | None = "linear",
        min_bin: float = 1e-2,
        min_slope: float = 1e-2,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        spline, factory = RationalQuadratic(bins, bound, tails, min_bin, min_slope), {"device": device, "dtype": dtype}
        super().__init__(spline, features, dim, conditioner, factory, **options)
