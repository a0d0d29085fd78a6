"""Normalisation of each feature by the batch, or by running statistics."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..dtypes import bounded, widen
from ..log_dets import sum_per_sample
from ..module import Inverse, InvertibleModule
from ._checks import check_features, check_like, check_positive, check_positive_int, refuse
from .act_norm import dims_but, standardised
from .elementwise import check_real
from .elementwise_map import per_feature
from .maps import Affine
from .norm import HiddenStatistics, moments

__all__ = ["InvertibleBatchNorm"]

_AFFINE = Affine("exp")


class InvertibleBatchNorm(HiddenStatistics):
    r"""Standardise each feature over the batch, then scale and shift: ``y = e^s (x - mean) / std + b``.

    ``std = sqrt(var + eps)`` and ``s = a tanh(r / a)``. In training, mean and variance are those of the batch, which
    ``function`` returns behind y, since backward inverts with them; in eval mode they are the running ones. The inverse
    ``x = std e^{-s} (y - b) + mean`` uses the running statistics, in training too, unless it is given others.

    The log-determinant is the sum of ``s - log std`` over the features, times the number of pixels: that of the map
    with mean and std held fixed, as usual in flows, though in training they depend on x. Gradients reach x through
    them, as in `torch.nn.BatchNorm1d`.

    Shapes: ``(B, features, ...) -> (B, features, ...)``. The function returns mean and std, of shape (features,), too.

    Args:
        features: size of dim 1.
        eps: added to the variance.
        momentum: the share of a batch in the new running statistics; None averages all batches alike.
        affine: whether ``s`` and ``b`` are learned; 0 otherwise.
        track_running_stats: whether there are running statistics; without them the eval mode uses the batch's as well,
            and the inverse has to be given some.
        max_log_scale: the bound ``a`` on ``s``, in nats.
        device: of parameters and buffers.
        dtype: of parameters and buffers and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, shapes or devices do not fit, or for a batch with one value for each feature.
        TypeError: for values that are not real floating point, or an inverse without statistics.

    References:
        "Density estimation using Real NVP", Dinh, Sohl-Dickstein and Bengio, 2016.
        "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", Rota Bulò, Porzi and Kontschieder, 2017.

    Example:
        >>> layer = iz.InvertibleBatchNorm(3)
        >>> x = torch.randn(4, 3, 5)
        >>> y, mean, std = layer.function(x)
        >>> torch.equal(y, layer(x)), torch.allclose(layer.inverse(y, mean, std), x, atol=1e-6)
        (True, True)
    """

    features: int
    eps: float
    momentum: float | None
    max_log_scale: float
    log_scale: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        *,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        max_log_scale: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_positive_int(self, "features", features)
        check_positive(self, "eps", eps)
        check_positive(self, "max_log_scale", max_log_scale)
        if momentum is not None and not 0 <= momentum <= 1:
            refuse(self, "momentum", "be None or in [0, 1]", momentum)
        self.features, self.eps, self.momentum, self.max_log_scale = features, eps, momentum, max_log_scale
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("log_scale", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(features, **factory)) if affine else None)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(features, **factory) if track_running_stats else None)
        batches = torch.zeros((), dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", batches)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for tensor in (self.log_scale, self.bias, self.running_mean, self.num_batches_tracked):
            if tensor is not None:
                tensor.zero_()
        if self.running_var is not None:
            self.running_var.fill_(1)

    @property
    def inv(self) -> InvertibleModule:
        """The inverse by the running statistics, as in eval mode."""
        return Inverse(_ByRunningStatistics(self))

    def function(self, x: Tensor) -> Any:
        mean, std = self._statistics(x, track=True)
        y = _AFFINE.forward(x, self.map_parameters(x, mean, std), 1)
        return (y, mean, std) if self._uses_batch else y

    def inverse(self, y: Tensor, *statistics: Tensor) -> Tensor:
        return _AFFINE.inverse(y, self._given(y, statistics), 1)

    def inverse_with_log_det(self, y: Tensor, *statistics: Tensor) -> tuple[Tensor, Tensor]:
        h = self._given(y, statistics)
        x = _AFFINE.inverse(y, h, 1)
        return x, -sum_per_sample(self, _AFFINE.log_slope(x, h, 1))

    def log_det(self, x: Tensor) -> Tensor:
        h = self.map_parameters(x, *self._statistics(x, track=False))
        return sum_per_sample(self, _AFFINE.log_slope(x, h, 1))

    def function_and_log_det(self, x: Tensor) -> tuple[Any, Tensor]:
        mean, std = self._statistics(x, track=True)
        y, log_slope = _AFFINE.forward_and_log_slope(x, self.map_parameters(x, mean, std), 1)
        return ((y, mean, std) if self._uses_batch else y), sum_per_sample(self, log_slope)

    def map_parameters(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return the log-scale and the shift of the whole layer, stacked and broadcast to ``x``."""
        self._check(x)
        zero = torch.zeros_like(mean)
        log_scale = zero if self.log_scale is None else bounded(widen(self.log_scale), self.max_log_scale)
        shift = zero if self.bias is None else widen(self.bias)
        return per_feature(torch.cat(standardised(log_scale, shift, mean, std)), x, 1)

    def _given(self, y: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
        """Return the map's parameters by given statistics, or by the running ones."""
        if len(statistics) not in (0, 2):
            self._refuse_inverse(f"y and {len(statistics)} statistics")
        mean, std = statistics or self.running_statistics()
        return self.map_parameters(y, mean, std)

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the running mean and std, in at least float32."""
        if self.running_mean is None or self.running_var is None:
            self._refuse_inverse("y alone")
        return widen(self.running_mean), (widen(self.running_var) + self.eps).sqrt()

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, momentum={self.momentum}, affine={self.bias is not None}"

    @property
    def _uses_batch(self) -> bool:
        return self.training or self.running_mean is None

    def _statistics(self, x: Tensor, *, track: bool) -> tuple[Tensor, Tensor]:
        self._check(x)
        if not self._uses_batch:
            return self.running_statistics()
        n = x.numel() // self.features
        if n == 1:
            refuse(self, "input", "have more than one value for each feature in training", f"shape {tuple(x.shape)}")
        mean, var = moments(widen(x), dims_but(x, 1), keepdim=False)
        if track and n > 0:
            self._track(mean, var * (n / (n - 1)))
        return mean, (var + self.eps).sqrt()

    def _refuse_inverse(self, got: str) -> NoReturn:
        refuse(self, "inverse", "be given y, mean and std, as function returns them", got, TypeError)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            share = self.num_batches_tracked.to(running.dtype).reciprocal() if self.momentum is None else self.momentum
            running.lerp_(new.to(running.dtype), share)

    def _check(self, x: Tensor) -> None:
        check_real(self, "input", x)
        check_features(self, "input", x, 1, self.features)
        for tensor in (self.log_scale, self.running_mean):
            if tensor is not None:
                check_like(self, "input", x, tensor)


class _ByRunningStatistics(InvertibleModule):
    """A batch norm as it is in eval mode, whatever mode it is in: what its inverse undoes."""

    norm: InvertibleBatchNorm

    def __init__(self, norm: InvertibleBatchNorm) -> None:
        super().__init__()
        self.norm, self.training, self._policy, self._compiled = norm, norm.training, norm._policy, norm._compiled

    def compile(self, *args: Any, **options: Any) -> None:
        self.norm.compile(*args, **options)
        self._compiled = self.norm._compiled

    def function(self, x: Tensor) -> Tensor:
        return _AFFINE.forward(x, self._map_parameters(x), 1)

    def inverse(self, y: Tensor) -> Tensor:
        return _AFFINE.inverse(y, self._map_parameters(y), 1)

    def log_det(self, x: Tensor) -> Tensor:
        return sum_per_sample(self.norm, _AFFINE.log_slope(x, self._map_parameters(x), 1))

    def _map_parameters(self, x: Tensor) -> Tensor:
        return self.norm.map_parameters(x, *self.norm.running_statistics())

    def _name(self) -> str:
        return self.norm._name()
