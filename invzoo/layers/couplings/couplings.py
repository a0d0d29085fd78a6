"""Couplings, by the maps that move their values."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from .._checks import refuse
from ..maps.affine import Affine, Shift
from ..maps.mixture import MixtureOfLogistics
from ..maps.spline import RationalQuadratic
from ..rearrangements.split import SplitSpec
from .coupling import Coupling, Subnet

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "GINCoupling",
    "MixtureLogisticCoupling",
    "RationalQuadraticCoupling",
]


class AdditiveCoupling(Coupling):
    r"""Move each half of the input by a function of the other: ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``.

    Without ``g``, ``y2 = x2``. The inverse is ``x2 = y2 - g(y1)``, ``x1 = y1 - f(x2)``; the log-determinant is 0. In
    mode ``invert`` backward evaluates each subnet once.

    Shapes: one tensor, which is split and merged; or two streams, which are returned as two and never copied. ``f``
    maps the second stream's shape to the first one's, ``g`` the other way. With ``'checkerboard'``, both map the whole
    tensor's shape to itself and see zeros at the positions that they move.

    Args:
        f: a module or a function; it gets the side inputs as keyword arguments.
        g: likewise, or None.
        dim: the dimension that is split; 1 by default, but to be given for one tensor of three dims.
        split: ``'half'`` (those of `torch.chunk`), ``'interleave'``, ``'checkerboard'`` (over the dims after ``dim``),
            the first stream's share of the size, or both sizes.
        swap: let ``f`` move the second half by the first instead, and ``g`` the first by the second.
        options: ``zero_init`` and ``subnet_dtype`` of :class:`Coupling`, and those of :class:`InvertibleModule`.

    Raises:
        ValueError: for another ``split``, an input that cannot be split so, or a subnet that returns another shape.
        TypeError: for a subnet that cannot be called, or an input that is not one tensor or two.

    Reference:
        NICE: Non-linear Independent Components Estimation, Dinh, Krueger and Bengio, 2014.
        The Reversible Residual Network, Gomez, Ren, Urtasun and Grosse, 2017.

    Example:
        >>> layer = iz.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        True
    """

    def __init__(
        self,
        f: Subnet,
        g: Subnet | None = None,
        *,
        dim: int | None = None,
        split: SplitSpec = "half",
        swap: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(Shift(), f, g, dim=dim, split=split, swap=swap, **options)


class _ScaleAndShift(Coupling):
    """A coupling by affine maps. Abstract: a subclass says whether log-scales are centred."""

    _centred: ClassVar[bool]

    def __init__(
        self,
        f: Subnet,
        g: Subnet | None = None,
        *,
        dim: int | None = None,
        split: SplitSpec = "half",
        swap: bool = False,
        scale: str | Callable[[Tensor], Tensor] = "tanh",
        max_log_scale: float = 2.0,
        zero_init: bool = False,
        **options: Any,
    ) -> None:
        if self._centred and split == "checkerboard":
            refuse(self, "split", "be one into streams", repr(split))
        affine = Affine(scale, max_log_scale, centred=self._centred)
        super().__init__(affine, f, g, dim=dim, split=split, swap=swap, zero_init=zero_init, **options)


class AffineCoupling(_ScaleAndShift):
    r"""Scale and shift each half by functions of the other: ``y1 = x1 exp(s(x2)) + t(x2)``, then ``y2`` with ``g(y1)``.

    A subnet returns the log-scale's argument ``h`` and the shift ``t``, stacked along ``dim``. The inverse is
    ``x1 = (y1 - t) exp(-s)``; the log-determinant is the sum of ``s``. The log-scale is bounded by default, since deep
    stacks of unbounded ones cannot be inverted in float32.

    Shapes: as for :class:`AdditiveCoupling`, except that subnets return twice as many features in ``dim``.

    Args:
        f: a module or a function; it gets the side inputs as keyword arguments.
        g: likewise, or None: then ``y2 = x2``.
        dim, split, swap: as for :class:`AdditiveCoupling`.
        scale: how ``s`` follows from ``h``, with ``a = max_log_scale``. ``'tanh'``: ``a tanh(0.1 h / a)``;
            ``'softclip'``: ``(2 a / pi) arctan(h / a)``; ``'sigmoid'``: ``exp(s) = 0.1 + 0.9 sigmoid(h + 2)``;
            ``'unit'``: ``exp(s) = (1 + sigmoid(h)) / 2``; ``'exp'``: ``s = h``; a function: ``s = scale(h)``.
        max_log_scale: the bound ``a`` of ``'tanh'`` and ``'softclip'``.
        zero_init: set the last weighted module of each subnet to zero, so that the layer starts close to the identity.
        options: ``subnet_dtype`` of :class:`Coupling`, and those of :class:`InvertibleModule`.

    Raises:
        ValueError: for another ``split`` or ``scale``, an input that cannot be split so, or a subnet that returns
            another shape.
        TypeError: for a subnet that cannot be called, or an input that is not one tensor or two.

    Reference:
        Density estimation using Real NVP, Dinh, Sohl-Dickstein and Bengio, 2016.

    Example:
        >>> layer = iz.AffineCoupling(nn.Linear(2, 4))
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        True
    """

    _centred = False


class GINCoupling(_ScaleAndShift):
    r"""Scale and shift like :class:`AffineCoupling`, but keep volumes: the log-scales of a sample add up to 0.

    Their mean over all moved values is subtracted from them, so that they stay below twice the bound.

    Args:
        f: a module or a function; it returns the log-scale's argument and the shift, stacked along ``dim``.
        g: likewise, or None.
        dim, split, swap, scale, max_log_scale, zero_init: as for :class:`AffineCoupling`.
        options: ``subnet_dtype`` of :class:`Coupling`, and those of :class:`InvertibleModule`.

    Raises:
        ValueError: as :class:`AffineCoupling`, and for a checkerboard.
        TypeError: as :class:`AffineCoupling`.

    Reference:
        Disentanglement by Nonlinear ICA with General Incompressible-flow Networks (GIN), Sorrenson, Rother and Köthe,
        2020.

    Example:
        >>> layer = iz.GINCoupling(nn.Linear(2, 4))
        >>> layer.forward_and_log_det(torch.randn(3, 4))[1]
        tensor([0., 0., 0.])
    """

    _centred = True


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
        super().__init__(spline, f, g, dim=dim, split=split, swap=swap, zero_init=zero_init, **options)


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
        super().__init__(mixture, f, g, dim=dim, split=split, swap=swap, zero_init=zero_init, **options)
