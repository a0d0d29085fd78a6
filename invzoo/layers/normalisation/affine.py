"""Scales and shifts of each feature, learned or given by a condition."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...dtypes import bounded
from ...protocol import Like
from .._checks import check_callable, check_positive, check_positive_int
from ..conditioned import Conditioner
from ..elementwise_map import ElementwiseMap
from ..maps.affine import Affine

__all__ = ["ConditionalAffine", "ElementwiseAffine"]


class ElementwiseAffine(ElementwiseMap):
    r"""Scale and shift each feature: ``y = e^s x + b``, with ``s = a tanh(r / a)`` below ``a = max_log_scale``.

    The inverse is ``x = (y - b) e^{-s}``; the log-determinant is the sum of ``s`` over the features, times the number
    of pixels (of positions in all dims but the batch's and the features'). With a conditioner, ``r`` and ``b`` are the
    layer's own plus its two blocks, so one that returns zeros changes nothing.

    Shapes: ``(B, ...) -> (B, ...)`` with ``features`` in ``dim``. The conditioner returns ``(B, 2 * features)``, or the
    shape of x with twice the features in ``dim``, or one that broadcasts to it: the block of ``r``, then that of ``b``.

    Args:
        features: size of ``dim``.
        dim: the dimension that has a scale and a shift for each entry; 1 by default, but to be given for one tensor of
            three dims.
        bias: whether the layer has a ``b`` of its own.
        max_log_scale: the bound ``a``, in nats.
        conditioner: a module or a function of the side input ``context``, or None.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, and if there is a conditioner without a context.

    Example:
        >>> layer = iz.ElementwiseAffine(3, dim=1, conditioner=nn.Linear(2, 6))
        >>> x, context = torch.randn(4, 3, 5), torch.randn(4, 2)
        >>> y = layer(x, context=context)
        >>> torch.allclose(layer.inverse(y, context=context), x, atol=1e-5)
        True
    """

    features: int
    max_log_scale: float
    log_scale: nn.Parameter
    bias: nn.Parameter | None
    own = "log_scale"

    def __init__(
        self,
        features: int,
        *,
        dim: int | None = None,
        bias: bool = True,
        max_log_scale: float = 2.0,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(Affine("exp"), dim, conditioner, **options)
        check_positive_int(self, "features", features)
        check_positive(self, "max_log_scale", max_log_scale)
        self.features, self.max_log_scale = features, max_log_scale
        self.log_scale = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def map_parameters(self, like: Like, context: Any = None) -> Tensor:
        shift = torch.zeros_like(self.log_scale) if self.bias is None else self.bias
        raw, shift = self.conditioned(torch.cat((self.log_scale, shift)), like, context).chunk(2, self.dim)
        return torch.cat((bounded(raw, self.max_log_scale), shift), self.dim)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}, bias={self.bias is not None}, max_log_scale={self.max_log_scale}"


class ConditionalAffine(ElementwiseMap):
    r"""Scale and shift by functions of a condition alone: ``y = e^{s(c)} x + t(c)``.

    The inverse is ``x = (y - t) e^{-s}``; the log-determinant is the sum of ``s``. Behind a normalisation without
    parameters this is conditional, or spatially adaptive, normalisation.

    Shapes: ``(B, ...) -> (B, ...)``. With F features in ``dim``, the conditioner returns ``(B, 2 F)``, or the shape of
    x with 2 F features, or one that broadcasts to it: the argument of the log-scale, then the shift.

    Args:
        conditioner: a module or a function of the side input ``context``.
        dim: the dimension along which the conditioner stacks its blocks; 1 by default, but to be given for one tensor
            of three dims.
        scale, max_log_scale: as for :class:`AffineCoupling`.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for another ``scale``, or a conditioner that returns another shape.
        TypeError: for values that are not real floating point, or if there is no context.

    Reference:
        "Semantic Image Synthesis with Spatially-Adaptive Normalization", Park, Liu, Wang and Zhu, 2019.

    Example:
        >>> layer = iz.ConditionalAffine(nn.Linear(2, 6))
        >>> x, context = torch.randn(4, 3), torch.randn(4, 2)
        >>> torch.allclose(layer.inverse(layer(x, context=context), context=context), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        conditioner: Conditioner,
        *,
        dim: int | None = None,
        scale: str | Callable[[Tensor], Tensor] = "tanh",
        max_log_scale: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(Affine(scale, max_log_scale), dim, conditioner, **options)
        check_callable(self, "conditioner", conditioner)

    def map_parameters(self, like: Like, context: Any = None) -> Tensor:
        return self.aligned(self.evaluate_conditioner(context), like)

    def extra_repr(self) -> str:
        return f"{self.map}, dim={self.dim}"
