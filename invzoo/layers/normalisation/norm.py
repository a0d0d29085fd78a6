"""Normalisation by statistics of x that its inverse needs, so that backward keeps them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from ...dtypes import bounded, widen
from ...module import InvertibleModule
from ...protocol import Like
from .._checks import check_features, check_like, check_positive, check_positive_int, refuse
from ..elementwise import check_real
from ..elementwise_map import per_feature

__all__ = ["InvertibleGroupNorm", "InvertibleLayerNorm", "InvertibleRMSNorm", "Norm", "moments"]


class Norm(InvertibleModule):
    """Standardise, then scale by ``e^s`` and shift. Abstract.

    The function returns statistics of x behind y, for the inverse; callers get y alone. It does not undo an inverse
    that was given other statistics, since it takes its own.
    """

    two_way = False
    keeps_seen = True

    eps: float | None
    max_log_scale: float
    log_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        eps: float | None,
        scale: bool,
        bias: bool,
        max_log_scale: float,
        factory: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if eps is not None:
            check_positive(self, "eps", eps)
        check_positive(self, "max_log_scale", max_log_scale)
        self.eps, self.max_log_scale = eps, max_log_scale
        for name, wanted in (("log_scale", scale), ("bias", bias)):
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape, **factory)) if wanted else None)

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def moments(x: Tensor, dims: tuple[int, ...], *, keepdim: bool) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance over ``dims``: zeros for an empty tensor, where torch would warn of NaN."""
    if x.numel() == 0:
        zero = x.sum(dims, keepdim)
        return zero, zero
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=keepdim)
    return mean, var


class _SampleNorm(Norm):
    """Standardise over some dims of each sample. Abstract.

    Everything is computed in at least float32, and the statistics stay in it.
    """

    widens = True
    statistics: ClassVar[tuple[str, ...]] = ("mean", "rstd")  # the last is what x is multiplied by

    @property
    def weight(self) -> Tensor | None:
        """``e^s``, in at least float32."""
        return None if self.log_scale is None else bounded(widen(self.log_scale), self.max_log_scale).exp()

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_real(self, "input", x)
        for parameter in self.parameters():
            check_like(self, "input", x, parameter)
        self._check_shape(x)

    def given(self, like: Like) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self.weight, None if self.bias is None else widen(self.bias)
        return tuple(None if p is None else self._aligned(p, like) for p in (weight, bias))  # type: ignore[return-value]

    def seen(self, x: Tensor, *h: Any) -> tuple[Tensor, ...]:
        groups, dims = self._grouped(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if len(self.statistics) == 1:
            return ((groups.square().mean(dims, keepdim=True) + eps).rsqrt(),)
        mean, var = moments(groups, dims, keepdim=True)
        return mean, (var + eps).rsqrt()

    def move(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor) -> Tensor:
        *mean, rstd = statistics
        groups = self._grouped(x)[0] * rstd
        y = (groups - mean[0] * rstd if mean else groups).reshape(x.shape)
        if weight is not None:
            y = y * weight
        return y if bias is None else y + bias

    def undo(self, y: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor) -> Tensor:
        if len(statistics) != len(self.statistics):
            expected = f"be given y, {', '.join(self.statistics)}, as function returns them"
            refuse(self, "inverse", expected, f"y and {len(statistics)} statistics", TypeError)
        *mean, rstd = statistics
        x = y if bias is None else y - bias
        groups = self._grouped(x if weight is None else x / weight)[0] / rstd
        return (groups + mean[0] if mean else groups).reshape(y.shape)

    @abstractmethod
    def _check_shape(self, x: Tensor) -> None:
        """Raise if x does not have the layer's features."""

    @abstractmethod
    def _grouped(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return x with a dim for each group, and the dims over which the groups are standardised."""

    def _aligned(self, parameter: Tensor, like: Like) -> Tensor:
        return parameter


class InvertibleGroupNorm(_SampleNorm):
    r"""Standardise each group of channels of each sample, then scale and shift: ``y = e^s (x - mean) rstd + b``.

    As :class:`InvertibleLayerNorm`, with one mean and rstd for each group, and s and b for each channel. As many groups
    as channels make an instance norm.

    Shapes: ``(B, channels, ...) -> (B, channels, ...)``; mean and rstd ``(B, groups, 1, ...)``.

    Args:
        groups: into which the channels are divided evenly.
        channels: size of dim 1.
        eps: added to the variance.
        affine: whether ``s`` and ``b`` are learned; 0 otherwise.
        max_log_scale, device, dtype: as for :class:`InvertibleLayerNorm`.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, an inverse without statistics, or a log-determinant.

    References:
        "Group Normalization", Wu and He, 2018.
        "Instance Normalization: The Missing Ingredient for Fast Stylization", Ulyanov, Vedaldi and Lempitsky, 2016.

    Example:
        >>> layer = iz.InvertibleGroupNorm(2, 4)
        >>> x = torch.randn(3, 4, 5)
        >>> torch.allclose(layer.inverse(*layer.function(x)), x, atol=1e-6)
        True
    """

    groups: int
    channels: int

    def __init__(
        self,
        groups: int,
        channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        max_log_scale: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check_positive_int(self, "groups", groups)
        check_positive_int(self, "channels", channels)
        if channels % groups:
            refuse(self, "channels", f"be a multiple of groups={groups}", channels)
        factory = {"device": device, "dtype": dtype}
        super().__init__((channels,), eps, affine, affine, max_log_scale, factory, **options)
        self.groups, self.channels = groups, channels

    def _check_shape(self, x: Tensor) -> None:
        check_features(self, "input", x, 1, self.channels)

    def _grouped(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        groups = rearrange(x, "b (g c) ... -> b g c ...", g=self.groups)
        return groups, tuple(range(2, groups.ndim))

    def _aligned(self, parameter: Tensor, like: Like) -> Tensor:
        return per_feature(parameter, like, 1)

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.channels}, eps={self.eps}, affine={self.bias is not None}"


class _TokenNorm(_SampleNorm):
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
