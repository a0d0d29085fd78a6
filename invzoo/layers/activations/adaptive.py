"""Activations that learn their shape, one for each feature."""

from typing import Any

import torch

from ..conditioned import Conditioner
from ..elementwise_map import PerFeatureMap
from ..maps.curves import SinhArcsinhCurve, SnakeCurve, TwoSlopes

__all__ = ["InvertiblePReLU", "SinhArcsinh", "Snake"]


class InvertiblePReLU(PerFeatureMap):
    """Scale positive and negative values by learned slopes: ``x -> a x`` where ``x > 0`` and ``b x`` elsewhere.

    The logarithms of both slopes are learned and bounded: ``log a = m tanh(h / m)``. The output has the input's sign,
    which tells the inverse what to divide by. The derivative at 0 is b; an exact zero that later layers rebuild may
    come back with either sign.

    Shapes: x and y (B, features, ...), or with the features in ``dim``.

    Args:
        features: size of dim ``dim``.
        negative_slope: b at the start, where a is 1.
        dim: the dim of the features, not the first; 1 by default, but to be given for one tensor of three dims.
        max_log_slope: m, in nats.
        conditioner: a module or function that makes of ``context`` what is added to h: (B, 2 * features), or of the
            dims of x with that in ``dim``.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for a slope beyond the bound, and if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, or not of the layer's dtype.

    Reference:
        "Delving Deep into Rectifiers", He, Zhang, Ren and Sun, 2015.

    Example:
        >>> layer = iz.InvertiblePReLU(2, 0.5)
        >>> layer(torch.tensor([[-4., 3.]]))
        tensor([[-2.,  3.]], grad_fn=...)
    """

    def __init__(
        self,
        features: int,
        negative_slope: float = 0.25,
        *,
        dim: int | None = None,
        max_log_slope: float = 2.0,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        curve, factory = TwoSlopes(negative_slope, max_log_slope), {"device": device, "dtype": dtype}
        super().__init__(curve, features, dim, conditioner, factory, **options)


class SinhArcsinh(PerFeatureMap):
    """Skew values and change their tails: ``x -> sinh(exp(t) asinh(x) + s)``, ``y -> sinh((asinh(y) - s) / exp(t))``.

    Skew s and log-tail t are learned and bounded, as ``max_skew * tanh(h / max_skew)`` and likewise, and 0 at the
    start: the identity. Far from 0 the map is a power of abs(x), with exponent exp(t).

    Shapes: x and y (B, features, ...), or with the features in ``dim``.

    Args:
        features: size of dim ``dim``.
        dim: the dim of the features, not the first; 1 by default, but to be given for one tensor of three dims.
        max_skew: bound on abs(s).
        max_log_tail: bound on abs(t), in nats.
        conditioner: a module or function that makes of ``context`` what is added to the layer's own h: (B, 2 *
            features), all s first, or of the dims of x with that in ``dim``.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for a bound that is not positive, and if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, or not of the layer's dtype.

    Reference:
        "Sinh-arcsinh distributions", Jones and Pewsey, 2009.

    Example:
        >>> layer, x = iz.SinhArcsinh(3), torch.randn(2, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        dim: int | None = None,
        *,
        max_skew: float = 1.0,
        max_log_tail: float = 0.5,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        curve, factory = SinhArcsinhCurve(max_skew, max_log_tail), {"device": device, "dtype": dtype}
        super().__init__(curve, features, dim, conditioner, factory, **options)


class Snake(PerFeatureMap):
    """Add a periodic wave: ``x -> x + sin(a x)^2 / (2 a)``, with a learned frequency a.

    That is half the amplitude of the paper's, whose slope touches 0; here it is 1 + sin(2 a x) / 2, between 1/2 and
    3/2. The inverse takes Newton's method a few steps, and its gradients are those of the implicit function. The
    logarithm of a is learned and bounded, and 0 at the start.

    Shapes: x and y (B, features, ...), or with the features in ``dim``.

    Args:
        features: size of dim ``dim``.
        dim: the dim of the features, not the first; 1 by default, but to be given for one tensor of three dims.
        max_log_frequency: bound on abs(log(a)), in nats.
        conditioner: a module or function that makes of ``context`` what is added to the unbounded log(a): (B,
            features), or of the dims of x with that in ``dim``.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for a bound that is not positive, and if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, or not of the layer's dtype.

    Reference:
        "Neural Networks Fail to Learn Periodic Functions and How to Fix It", Ziyin, Hartwig and Ueda, 2020.

    Example:
        >>> layer, x = iz.Snake(3), torch.randn(2, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        dim: int | None = None,
        *,
        max_log_frequency: float = 2.0,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        curve, factory = SnakeCurve(max_log_frequency), {"device": device, "dtype": dtype}
        super().__init__(curve, features, dim, conditioner, factory, **options)
