"""What convolutions with larger kernels share: a kernel e^s (1 + N) whose N is a contraction, and their checks."""

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dtypes import bounded, computed, full_precision, widen
from ...module import InvertibleModule
from ...protocol import Like
from .._checks import (
    check_dims,
    check_features,
    check_like,
    check_positive,
    check_positive_int,
    parameter_of,
    refuse,
)
from ..elementwise import check_real
from .orthogonal import identity

__all__ = ["KernelConv", "contraction"]

_LAYOUTS = {
    1: "(batch, channels, length)",
    2: "(batch, channels, height, width)",
    3: "(batch, channels, depth, height, width)",
}


def contraction(weight: Tensor, bound: float) -> Tensor:
    """Scale a kernel (..., out, in, taps) so that its convolution has a spectral norm below ``bound``, smoothly.

    With r and c the sums of magnitudes per output and per input channel, w / sqrt(r c) has norm at most 1 whatever the
    padding and the size of the image (Schur's test); here r and c are 1 + r / bound and 1 + c / bound. A kernel that is
    small compared to the bound stays as it is.
    """
    magnitude = weight.abs().sum(-1)
    rows, columns = (1 + magnitude.sum(dim, keepdim=True) / bound for dim in (-1, -2))
    return weight / (rows * columns).sqrt().unsqueeze(-1)


class KernelConv(InvertibleModule):
    """x -> e^s (x + N x) + b with a convolution N of norm below one, or several such maps. Abstract.

    The weight counts in units of 1 / sqrt(fan-in), as a change of every entry by one should change N by about one.
    Everything is computed in at least float32, under autocast too; the output has the promoted dtype of input and
    parameters, which without autocast is the dtype of both.
    """

    channels: int
    kernel_size: tuple[int, ...]
    max_norm: float
    max_log_scale: float
    weight: nn.Parameter
    log_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, ...],
        max_norm: float,
        max_log_scale: float,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.channels, self.max_norm, self.max_log_scale = channels, max_norm, max_log_scale
        if not isinstance(kernel_size, int | tuple | list):
            refuse(self, "kernel_size", "be an int or a tuple of them", repr(kernel_size), TypeError)
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self._check_arguments()

    def _check_arguments(self) -> None:
        check_positive_int(self, "channels", self.channels)
        if len(self.kernel_size) not in _LAYOUTS:
            refuse(self, "kernel_size", "have one to three sizes", self.kernel_size)
        for size in self.kernel_size:
            check_positive_int(self, "kernel_size", size)
        check_positive(self, "max_norm", self.max_norm)
        check_positive(self, "max_log_scale", self.max_log_scale)
        if self.max_norm >= 1:
            refuse(self, "max_norm", "be below 1", self.max_norm)

    def _make_parameters(self, *maps: int, taps: tuple[int, ...], bias: bool, **factory: Any) -> None:
        """One bias, and a weight and log-scales for each of ``maps``."""
        self.weight = nn.Parameter(torch.empty(*maps, self.channels, self.channels, *taps, **factory))
        self.log_scale = nn.Parameter(torch.empty(*maps, self.channels, **factory))
        self.bias = nn.Parameter(torch.empty(self.channels, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the layer the identity."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @abstractmethod
    def _matrices(self, like: Like) -> Tensor:
        """Return what the maps do to values of this shape, as matrices of channels."""

    @abstractmethod
    def _convolve(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Return what the maps make of x."""

    @abstractmethod
    def _solve(self, y: Tensor, matrices: Tensor) -> Tensor:
        """Undo :meth:`_convolve`."""

    def given(self, like: Like) -> tuple[Tensor, Tensor]:
        with full_precision(like):
            matrices = self._matrices(like)
        bias = matrices.real.new_zeros(self.channels) if self.bias is None else widen(self.bias)
        return matrices, bias.view(-1, *[1] * len(self.kernel_size))

    def move(self, x: Tensor, matrices: Tensor, shift: Tensor) -> Tensor:
        return computed(lambda x: self._convolve(x, matrices) + shift, x, self._parameter)

    def undo(self, y: Tensor, matrices: Tensor, shift: Tensor) -> Tensor:
        return computed(lambda y: self._solve(y - shift, matrices), y, self._parameter)

    @property
    def _parameter(self) -> Tensor:
        return parameter_of(self, "weight")

    @property
    def _log_scales(self) -> Tensor:
        return bounded(widen(self.log_scale), self.max_log_scale)

    def _kernel(self, weight: Tensor, *centre: int) -> Tensor:
        """e^s (1 + N) of shape (..., channels, channels, *taps), where N is a contraction that ``weight`` gives."""
        taps = weight.flatten(-len(centre))
        place, size = 0, taps.shape[-1]
        for width, c in zip(weight.shape[-len(centre) :], centre, strict=True):
            place = place * width + c
        n = contraction(taps / math.sqrt(self.channels * size), self.max_norm)
        one = F.pad(identity(taps[..., 0], self.channels).unsqueeze(-1), (place, size - 1 - place))
        return (self._log_scales.exp()[..., None, None] * (one + n)).view_as(weight)

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_real(self, argument, x)
        check_like(self, argument, x, self._parameter)
        spatial = len(self.kernel_size)
        check_dims(self, argument, x, (spatial + 2,), _LAYOUTS[spatial])
        check_features(self, argument, x, 1, self.channels)
        if 0 in x.shape[2:]:
            refuse(self, argument, "have at least one pixel", f"shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}" + (", bias=False" if self.bias is None else "")
