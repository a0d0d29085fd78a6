"""Normalisation of each feature by the batch, or by running statistics."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ...dtypes import bounded, widen
from ...log_dets import sum_per_sample
from ...module import Inverse, InvertibleModule
from ...protocol import Like
from .._checks import check_features, check_like, check_positive, check_positive_int, refuse
from ..elementwise import check_real
from ..elementwise_map import per_feature
from ..maps.affine import Affine
from .act_norm import dims_but, standardised
from .norm import Norm, moments

__all__ = ["InvertibleBatchNorm"]

_AFFINE = Affine("exp")


class InvertibleBatchNorm(Norm):
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
        check_positive_int(self, "features", features)
        check_positive(self, "eps", eps)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__((features,), eps, affine, affine, max_log_scale, factory, **options)
        if momentum is not None and not 0 <= momentum <= 1:
            refuse(self, "momentum", "be None or in [0, 1]", momentum)
        self.features, self.momentum = features, momentum
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

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_real(self, "input", x)
        check_features(self, "input", x, 1, self.features)
        for tensor in (self.log_scale, self.running_mean):
            if tensor is not None:
                check_like(self, "input", x, tensor)
        if argument == "x" and self._uses_batch and x.numel() == self.features:
            refuse(self, "input", "have more than one value for each feature in training", f"shape {tuple(x.shape)}")

    def given(self, like: Tensor | Like) -> tuple[Tensor | float, Tensor | float]:
        if self.log_scale is None or self.bias is None:
            return 0.0, 0.0
        return bounded(widen(self.log_scale), self.max_log_scale), widen(self.bias)

    def seen(self, x: Tensor, s: Any, b: Any, *statistics: Tensor) -> tuple[Tensor, ...]:
        return () if statistics or not self._uses_batch else self._statistics(x, track=True)

    def move(self, x: Tensor, s: Any, b: Any, *statistics: Tensor) -> Tensor:
        return _AFFINE.move(x, *self._affine(x, s, b, *statistics))

    def undo(self, y: Tensor, s: Any, b: Any, *statistics: Tensor) -> tuple[Tensor, ...]:
        if len(statistics) not in (0, 2):
            self._refuse_inverse(f"y and {len(statistics)} statistics")
        statistics = statistics or self.running_statistics()
        return _AFFINE.undo(y, *self._affine(y, s, b, *statistics)), *statistics

    def log_slope(self, x: Tensor, s: Any, b: Any, *statistics: Tensor) -> Tensor:
        return _AFFINE.log_slope(x, *self._affine(x, s, b, *statistics[-2:]))

    def log_det(self, x: Tensor) -> Tensor:
        self.check_argument("x", x)
        statistics = self._statistics(x, track=False) if self._uses_batch else ()
        return sum_per_sample(self, self.log_slope(x, *self.given(x), *statistics))

    def _affine(self, x: Tensor | Like, s: Any, b: Any, *statistics: Tensor) -> list[Tensor]:
        """Return the log-scale and the shift of the whole layer, broadcast to ``x``."""
        both = standardised(s, b, *(statistics or self.running_statistics()))
        return [per_feature(p, x, 1) for p in both]

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
        n = x.numel() // self.features
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


class _ByRunningStatistics(InvertibleModule):
    """A batch norm as it is in eval mode, whatever mode it is in: what its inverse undoes."""

    norm: InvertibleBatchNorm

    def __init__(self, norm: InvertibleBatchNorm) -> None:
        super().__init__()
        self.norm, self.training, self._policy, self._compiled = norm, norm.training, norm._policy, norm._compiled

    def compile(self, *args: Any, **options: Any) -> None:
        self.norm.compile(*args, **options)
        self._compiled = self.norm._compiled

    def given(self, like: Like) -> list[Tensor]:
        return self.norm._affine(like, *self.norm.given(like))

    move, undo, log_slope = _AFFINE.move, _AFFINE.undo, _AFFINE.log_slope

    def check_argument(self, argument: str, x: Tensor) -> None:
        self.norm.check_argument("y", x)

    def _name(self) -> str:
        return self.norm._name()
