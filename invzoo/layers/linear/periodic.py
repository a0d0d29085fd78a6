"""Convolutions of images that continue periodically, which the Fourier transform makes a matrix per frequency."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...dtypes import full_precision, widen
from ...log_dets import for_each_sample
from ...protocol import Like
from .kernel_conv import KernelConv

__all__ = ["PeriodicConv", "frequency_response", "map_frequencies", "multiplicity"]


def frequency_response(kernel: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The matrix sum_t ``kernel[:, :, t]`` exp(2 pi i f . t / sizes) of every frequency f of `torch.fft.rfftn`.

    From (out, in, *taps), with t = 0 in the middle, to (frequencies, out, in). A kernel larger than the image wraps.
    """
    response = torch.complex(kernel, torch.zeros_like(kernel))
    counts = (*sizes[:-1], sizes[-1] // 2 + 1)
    for taps, size, count in zip(kernel.shape[2:], sizes, counts, strict=True):
        offsets = torch.arange(taps, device=kernel.device) - (taps - 1) // 2
        turns = torch.outer(offsets, torch.arange(count, device=kernel.device)) % size
        angles = turns.to(kernel.dtype) * (2 * math.pi / size)
        response = torch.tensordot(response, torch.polar(torch.ones_like(angles), angles), ([2], [0]))
    return rearrange(response, "o i ... -> (...) o i")


def multiplicity(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """How many frequencies of `torch.fft.fftn` each one of `torch.fft.rfftn` stands for."""
    last = torch.arange(sizes[-1] // 2 + 1, device=device)
    counts = 2 - (last == 0).long() - (2 * last == sizes[-1]).long()
    return counts.repeat(math.prod(sizes[:-1]))


def map_frequencies(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``function`` to the Fourier transform of x (B, C, ...), seen as (frequencies, C, B)."""
    if len(x) == 0:  # not every library for Fourier transforms takes an empty batch
        return map_frequencies(F.pad(x, [0, 0] * (x.ndim - 1) + [0, 1]), function)[:0]
    dims = tuple(range(2, x.ndim))
    spectrum = torch.fft.rfftn(x, dim=dims)
    mapped = function(rearrange(spectrum, "b c ... -> (...) c b"))
    return torch.fft.irfftn(rearrange(mapped, "f c b -> b c f").reshape(spectrum.shape), x.shape[2:], dims)


class PeriodicConv(KernelConv):
    r"""Convolves with a learned kernel that stays invertible, around the edges of the image: y = e^s (x + N x) + b.

    .. math:: \hat x_f = (I + \hat N_f)^{-1} \, \hat u_f, \qquad u = e^{-s} (y - b)

    It equals a `torch.nn.Conv2d` with ``padding="same", padding_mode="circular"`` and the weight :attr:`kernel`.
    At every frequency f, :math:`\hat N_f` is a matrix of channels with a norm below ``max_norm``, whatever is learned,
    so that the condition number of the layer is at most (1 + max_norm) / (1 - max_norm) e^(2 max_log_scale), for any
    size of the image. The log-determinant is the number of pixels times the sum of s, plus that of
    :math:`\log |\det (I + \hat N_f)|` over all frequencies. The layer starts as the identity.

    Both directions take a Fourier transform there and back, and a complex matrix of channels for half of the
    frequencies: together as many numbers as ``channels`` images.

    Shapes: x and y (B, channels, ...), with as many dims of pixels as ``kernel_size`` has sizes.

    Args:
        channels: size of dim 1.
        kernel_size: one number for images, or a tuple of one to three, one for each dim of pixels. Images may be
            smaller.
        bias: whether b is learned; zero otherwise.
        max_norm: bound on the norm of N, below 1.
        max_log_scale: bound on abs(s) in nats.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, options, shapes or devices do not fit.
        TypeError: if an input is no real floating point tensor, or not of the layer's dtype.

    References:
        "Emerging Convolutions for Generative Normalizing Flows", Hoogeboom, van den Berg and Welling, 2019.
        "Invertible Convolutional Flow", Karami, Schuurmans, Sohl-Dickstein, Dinh and Duckworth, 2019.

    Example:
        >>> layer = iz.PeriodicConv(4, 3)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> y.shape, log_det.shape, torch.allclose(layer.inverse(y), x, atol=1e-5)
        (torch.Size([2, 4, 8, 8]), torch.Size([2]), True)
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, ...],
        bias: bool = True,
        *,
        max_norm: float = 0.5,
        max_log_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(channels, kernel_size, max_norm, max_log_scale, **options)
        self._make_parameters(taps=self.kernel_size, bias=bias, device=device, dtype=dtype)

    @property
    def kernel(self) -> Tensor:
        """e^s (1 + N), of shape ``(channels, channels, *kernel_size)``, in at least float32."""
        with full_precision(self.weight):
            middle = [(size - 1) // 2 for size in self.kernel_size]  # or in front of it
            return self._kernel(widen(self.weight), *middle)

    def log_slope(self, x: Tensor, matrices: Tensor, shift: Tensor) -> Tensor:
        per_frequency = torch.linalg.slogdet(matrices).logabsdet * multiplicity(tuple(x.shape[2:]), x.device)
        return for_each_sample(x, per_frequency.sum())

    def _matrices(self, like: Like) -> Tensor:
        return frequency_response(self.kernel, tuple(like.shape[2:]))

    def _convolve(self, x: Tensor, matrices: Tensor) -> Tensor:
        return map_frequencies(x, lambda z: matrices @ z)

    def _solve(self, y: Tensor, matrices: Tensor) -> Tensor:
        return map_frequencies(y, lambda z: torch.linalg.solve_ex(matrices, z).result)
