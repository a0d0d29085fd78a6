"""Normalisation of each feature by the first batch."""

import warnings
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ... import engine
from ...dtypes import bounded, widen
from ...engine import is_fake, tracing, version_of
from ...protocol import Like
from .._checks import check_positive, check_positive_int, refuse
from ..elementwise_map import ElementwiseMap, per_feature
from ..maps.affine import Affine

__all__ = ["ActNorm", "standardised"]


def standardised(log_scale: Tensor | float, shift: Tensor | float, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return s and b such that ``e^s x + b`` standardises x, then scales and shifts it as given."""
    log_scale = log_scale - std.log()
    return log_scale, shift - mean * log_scale.exp()


def dims_but(x: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(d for d in range(x.ndim) if d != dim % x.ndim)


def moments_of_all_ranks(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and std of each feature over the batches of all ranks, and how many values each has."""
    dims, x = dims_but(x, dim), widen(x)
    count = x.new_full((1,), x.numel() // max(x.shape[dim], 1))
    *total, count = _over_ranks(torch.cat((x.sum(dims), count))).split([x.shape[dim], 1])
    mean = total[0] / count.clamp_min(1)
    squares = _over_ranks((x - per_feature(mean, x, dim)).square().sum(dims))
    return mean, (squares / count.clamp_min(1)).sqrt(), count


def _over_ranks(x: Tensor) -> Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x)
    return x


class ActNorm(ElementwiseMap):
    r"""Standardise each feature by the first batch, then scale and shift: ``y = e^s (x - mean) / std + b``.

    ``mean`` and ``std`` are buffers that the first training batch sets, and nothing moves them after; the bounded
    ``s = a tanh(r / a)`` and ``b`` start at 0 and are learned, so that the bound holds relative to the data. The
    log-determinant is the sum of ``s - log std`` over the features, times the number of pixels.

    Until it is initialised the layer takes the data as standardised. The first call in training mode whose batch has
    two values or more for each feature, all of them finite, initialises it, with or without gradients. Whichever way it
    goes, what comes out has a mean of 0 and a deviation of 1: that of ``layer(x)`` in a flow from data to noise, that
    of ``layer.inverse(y)`` in one from noise to data, which is trained by its inverse. The eval mode and backward never
    initialise it, nor do ``function`` and ``log_det``. To initialise it again, ``reset_parameters()``. Initialise it,
    or load its state, before you compile it. If `torch.distributed` is initialised, the statistics are those of all
    ranks' batches together, so every rank of the default group has to run the layer.

    Shapes: ``(B, ...) -> (B, ...)`` with ``features`` in ``dim``.

    Args:
        features: size of ``dim``.
        dim: the dimension that has a scale and a shift for each entry; 1 by default, but to be given for one tensor of
            three dims.
        max_log_scale: the bound ``a`` on ``s``, in nats.
        min_std: the least ``std``. A feature that varies less in the first batch, a constant one say, gets this std,
            and a warning says so.
        device: of parameters and buffers.
        dtype: of parameters and buffers and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, shapes or devices do not fit, and for a `torch.func` transform or `torch.jit` trace of a
            layer in training that is not initialised.
        TypeError: for values that are not real floating point.

    Reference:
        "Glow: Generative Flow with Invertible 1x1 Convolutions", Kingma and Dhariwal, 2018.

    Example:
        >>> layer = iz.ActNorm(3)
        >>> y = layer(5 + 2 * torch.randn(100, 3))
        >>> torch.allclose(y.std(0, correction=0), torch.ones(3))
        True
    """

    features: int
    max_log_scale: float
    min_std: float
    log_scale: nn.Parameter
    bias: nn.Parameter
    mean: Tensor
    std: Tensor
    initialized: Tensor
    own = "log_scale"
    _seen: tuple[Tensor, int] | None  # the flag, and its version, when it was read and set

    def __init__(
        self,
        features: int,
        *,
        dim: int | None = None,
        max_log_scale: float = 2.0,
        min_std: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(Affine("exp"), dim, None, **options)
        check_positive_int(self, "features", features)
        check_positive(self, "max_log_scale", max_log_scale)
        check_positive(self, "min_std", min_std)
        self.features, self.max_log_scale, self.min_std = features, max_log_scale, min_std
        for name in ("log_scale", "bias"):
            setattr(self, name, nn.Parameter(torch.empty(features, device=device, dtype=dtype)))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(features, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.empty((), device=device, dtype=torch.bool))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: the next training batch initialises the layer."""
        for parameter in (self.log_scale, self.bias, self.mean, self.initialized):
            parameter.zero_()
        self.std.fill_(1)
        self._seen = None

    # A buffer that changed inside the engine's call would be as it was when backward inverts, so it changes before.
    def prepare(self, values: tuple[Any, ...], *, inverted: bool) -> None:
        if not self.training or is_fake(self.initialized) or self._known_to_be_initialized():
            return
        if not self.initialized:
            self._initialize(*values, inverted=inverted)
        self._read_flag()

    def map_parameters(self, like: Like, context: Any = None) -> Tensor:
        log_scale = bounded(widen(self.log_scale), self.max_log_scale)
        h = torch.cat(standardised(log_scale, widen(self.bias), widen(self.mean), widen(self.std)))
        return self.conditioned(h, like, context)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}, max_log_scale={self.max_log_scale}, min_std={self.min_std}"

    def _read_flag(self) -> None:
        flag = self.initialized
        self._seen = (flag, version_of(flag)) if not is_fake(flag) and flag else None

    def _known_to_be_initialized(self) -> bool:
        """Whether this very flag was read before; reading it again would wait for a GPU, and break a graph."""
        if self._seen is None or torch.compiler.is_compiling():
            return self._seen is not None
        flag, version = self._seen
        return flag is self.initialized and version == version_of(flag)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._read_flag()

    @torch.no_grad()
    def _initialize(self, x: Tensor, *, inverted: bool) -> None:
        self.check_argument("y" if inverted else "x", x)
        if engine.transformed() or tracing() is not None:
            refuse(self, "layer", "have seen a training batch before it is transformed or traced", "one that has not")
        mean, std, count = moments_of_all_ranks(x, self.dim)
        if inverted:  # what is learned is undone first
            scale = bounded(widen(self.log_scale), self.max_log_scale).exp()
            mean, std = (mean - self.bias) / scale, std / scale
        if count < 2 or not torch.stack((mean, std)).isfinite().all():
            return
        if low := (std < self.min_std).nonzero().flatten().tolist():
            warnings.warn(
                f"{type(self).__name__}: Expected every feature to vary in the batch that initialises the layer; got a "
                f"std below min_std={self.min_std} in features {low}, which are divided by min_std instead",
                stacklevel=5,
            )
        std = std.clamp_min(self.min_std)
        self.mean.copy_(-mean / std if inverted else mean)
        self.std.copy_(1 / std if inverted else std)
        self.initialized.fill_(True)
