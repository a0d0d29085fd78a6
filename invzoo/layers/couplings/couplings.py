"""Couplings that shift, or scale and shift."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._checks import refuse
from ..maps.affine import Affine, Shift
from ..rearrangements.split import SplitSpec
from .coupling import Coupling, Subnet, zero_last

__all__ = ["AdditiveCoupling", "AffineCoupling", "GINCoupling"]


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
        options: ``subnet_dtype`` of :class:`Coupling`, and those of :class:`InvertibleModule`.

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


class AffineCoupling(Coupling):
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
        super().__init__(Affine(scale, max_log_scale), f, g, dim=dim, split=split, swap=swap, **options)
        for net in (f, g) if zero_init else ():
            zero_last(net)


class GINCoupling(Coupling):
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
        super().__init__(Affine(scale, max_log_scale, centred=True), f, g, dim=dim, split=split, swap=swap, **options)
        if self.streams is None:
            refuse(self, "split", "be one into streams", "'checkerboard'")
        for net in (f, g) if zero_init else ():
            zero_last(net)
