"""A spline for each feature, its own or a condition's."""

from typing import Any

import torch

from ..conditioned import Conditioner
from ..elementwise_map import PerFeatureMap
from ..maps.spline import RationalQuadratic

__all__ = ["RationalQuadraticSpline"]


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
