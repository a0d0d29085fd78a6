"""Normalisation of each token by statistics that backward keeps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_positive_int, refuse
from .norm import SampleNorm

__all__ = ["InvertibleLayerNorm", "InvertibleRMSNorm"]


class _TokenNorm(SampleNorm):
    """Standardise over the last dims. Abstract."""

    normalized_shape: tuple[int, ...]

    def __init__(self, normalized_shape: int | Sequence[int], *args: Any, **options: Any) -> None:
        shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        for size in shape or (0,):
            check_positive_int(self, "normalized_shape", size)
        super().__init__(shape, *args, **options)
        self.normalized_shape = shape

    def _check_shape(self, x: Tensor) -> None:
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            refuse(self, "input", f"end in shape {self.normalized_shape}", f"shape {tuple(x.shape)}")

    def _grouped(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return x, tuple(range(-len(self.normalized_shape), 0))

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.log_scale is not None}"


class InvertibleLayerNorm(_TokenNorm):
    r"""Standardise each token, then scale and shift: ``y = e^s (x - mean) rstd + b``, ``rstd = 1 / sqrt(var + eps)``.

    ``s = a tanh(r / a)`` is bounded by ``a = max_log_scale``. What ``y`` lost are two numbers for each token, mean and
    rstd. The function returns them behind y, callers get y alone, and in mode ``invert`` they are all that is kept:
    ``x = (y - b) e^{-s} / rstd + mean``. Without them there is no inverse, and the layer has no log-determinant.

    Shapes: ``(..., *normalized_shape) -> (..., *normalized_shape)``; mean and rstd have ones in the last dims.

    Args:
        normalized_shape: the last dims, or the size of the last one.
        eps: added to the variance.
        elementwise_affine: whether ``s`` and ``b`` are learned; 0 otherwise.
        bias: whether ``b`` is, if ``s`` is.
        max_log_scale: the bound ``a`` on ``s``, in nats.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, an inverse without statistics, or a log-determinant.

    Reference:
        "Layer Normalization", Ba, Kiros and Hinton, 2016.

    Example:
        >>> layer = iz.InvertibleLayerNorm(4)
        >>> x = torch.randn(2, 3, 4)
        >>> y, mean, rstd = layer.function(x)
        >>> torch.equal(y, layer(x)), torch.allclose(layer.inverse(y, mean, rstd), x, atol=1e-6)
        (True, True)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        max_log_scale: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        shifts = elementwise_affine and bias
        super().__init__(normalized_shape, eps, elementwise_affine, shifts, max_log_scale, factory, **options)


class InvertibleRMSNorm(_TokenNorm):
    r"""Divide each token by its root mean square, then scale: ``y = e^s x rrms``, ``rrms = 1 / sqrt(mean(x^2) + eps)``.

    ``s = a tanh(r / a)`` is bounded by ``a = max_log_scale``. What ``y`` lost is one number for each token, rrms. The
    function returns it behind y, callers get y alone, and in mode ``invert`` it is all that is kept:
    ``x = y e^{-s} / rrms``. Without it there is no inverse, and the layer has no log-determinant.

    Shapes: ``(..., *normalized_shape) -> (..., *normalized_shape)``; rrms has ones in the last dims.

    Args:
        normalized_shape: the last dims, or the size of the last one.
        eps: added to the mean square; None for the machine epsilon, of at least float32.
        elementwise_affine: whether ``s`` is learned; 0 otherwise.
        max_log_scale, device, dtype: as for :class:`InvertibleLayerNorm`.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, an inverse without statistics, or a log-determinant.

    Reference:
        "Root Mean Square Layer Normalization", Zhang and Sennrich, 2019.

    Example:
        >>> layer = iz.InvertibleRMSNorm(4)
        >>> x = torch.randn(2, 3, 4)
        >>> y, rrms = layer.function(x)
        >>> torch.equal(y, layer(x)), torch.allclose(layer.inverse(y, rrms), x, atol=1e-6)
        (True, True)
    """

    statistics = ("rrms",)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        *,
        elementwise_affine: bool = True,
        max_log_scale: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(normalized_shape, eps, elementwise_affine, False, max_log_scale, factory, **options)
