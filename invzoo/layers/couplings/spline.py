"""Couplings by splines."""

from typing import Any

from ..maps.spline import RationalQuadratic
from ..rearrangements.split import SplitSpec
from .coupling import Coupling, Subnet, zero_last

__all__ = ["RationalQuadraticCoupling"]


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
