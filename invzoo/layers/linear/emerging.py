"""Convolutions that are triangular in an order of the pixels, so that back-substitution undoes them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...dtypes import widen
from ...log_dets import for_each_sample
from ...protocol import Like
from .._checks import check_choice, refuse
from .kernel_conv import KernelConv
from .linear import mix_channels
from .orthogonal import identity

__all__ = ["EmergingConv", "back_substitute", "correlate"]

Offset = tuple[int, ...]


def raster_offsets(kernel_size: tuple[int, ...]) -> tuple[Offset, ...]:
    """What a raster scan meets of a kernel up to its centre, as offsets from that, which comes last."""
    centred = itertools.product(*(range(-(k // 2), k // 2 + 1) for k in kernel_size))
    return tuple(offset for offset in centred if offset <= (0,) * len(offset))


def corner_offsets(kernel_size: tuple[int, ...]) -> tuple[Offset, ...]:
    """All taps of a kernel, as offsets from the last one."""
    return tuple(itertools.product(*(range(1 - k, 1) for k in kernel_size)))


def raster_times(kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    """How many steps apart neighbours along each dim are solved, so that all taps lead back in time."""
    return tuple(math.prod(1 + k // 2 for k in kernel_size[dim + 1 :]) for dim in range(len(kernel_size)))


def corner_times(kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    """Likewise: a step is an anti-diagonal."""
    return (1,) * len(kernel_size)


_MASKS = {"raster": (raster_offsets, raster_times), "corner": (corner_offsets, corner_times)}


def shifted(x: Tensor, offsets: Sequence[Offset]) -> list[Tensor]:
    """Return x[..., p + ``offset``] at each pixel p of the last dims of x, for every offset, with zeros around x."""
    margins = [max(map(abs, along)) for along in zip(*offsets, strict=True)]
    sizes = x.shape[x.ndim - len(margins) :]
    padded = F.pad(x, [m for margin in reversed(margins) for m in (margin, margin)])
    starts = [[m + o for m, o in zip(margins, offset, strict=True)] for offset in offsets]
    windows: list[Any] = [[slice(a, a + n) for a, n in zip(start, sizes, strict=True)] for start in starts]
    return [padded[..., *window] for window in windows]


def correlate(x: Tensor, kernel: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
    """Sum ``kernel[..., t]`` x[p + ``offsets[t]``] at each pixel p of x (B, C, ...), with zeros around x.

    Not F.conv, whose float32 products are TF32 on CUDA by default, good to 1e-3 only.
    """
    columns = torch.cat(shifted(x, offsets), 1)
    return mix_channels(columns, rearrange(kernel, "o i t -> o (t i)"), kernel.new_zeros(len(kernel)))


def back_substitute(y: Tensor, kernel: Tensor, offsets: tuple[Offset, ...], times: tuple[int, ...]) -> Tensor:
    """Solve ``correlate(x, kernel, offsets)`` = y for x; the last offset is zero and its tap lower triangular.

    Pixel p is solved in step p . ``times``, together with all others of that step. A line of pixels along the last dim
    has at most one of them, so that the image is laid out as (steps, lines), with zeros where a line has none.
    """
    centre = kernel[..., -1]
    inverse = torch.linalg.solve_triangular(centre, identity(centre, len(centre)), upper=False)
    y = mix_channels(y, inverse, inverse.new_zeros(len(inverse)))
    if len(offsets) == 1:
        return y
    matrix = inverse @ rearrange(kernel[..., :-1], "o i t -> o (i t)")
    sizes, lines = y.shape[2:], math.prod(y.shape[2:-1])
    steps = 1 + sum(time * (n - 1) for time, n in zip(times, sizes, strict=True))
    line = torch.arange(lines * sizes[-1], device=y.device) // sizes[-1]
    place = _steps(sizes, times, y.device).flatten() * lines + line
    right = _spread(rearrange(y, "b c ... -> c (...) b"), place, steps * lines).split(lines, 1)
    inside = _spread(torch.ones_like(line, dtype=torch.bool)[None], place, steps * lines)[0, :, None].split(lines)
    x = _wavefronts(right, inside, matrix, *_sources(offsets[:-1], times, sizes[:-1], y.device))
    return rearrange(x[:, place], "c p b -> b c p").reshape(y.shape)


def _wavefronts(
    right: Sequence[Tensor], inside: Sequence[Tensor], matrix: Tensor, sources: Tensor, delay: int
) -> Tensor:
    """Subtract from each step what ``matrix`` makes of ``sources`` in the ``delay`` steps before it."""
    nothing = torch.zeros_like(right[0][:, :1])
    solved = [torch.zeros_like(right[0])] * delay
    for y, mask in zip(right, inside, strict=True):
        known = torch.cat([nothing, *solved[-delay:]], 1).index_select(1, sources).reshape(matrix.shape[1], -1)
        x = torch.addmm(y.flatten(1), matrix, known, alpha=-1).view_as(y)
        solved.append(x.where(mask, 0))
    return torch.cat(solved[delay:], 1)


def _sources(
    offsets: tuple[Offset, ...], times: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> tuple[Tensor, int]:
    """Where each tap finds what it adds to each line: behind a zero, in the steps of a delay; and the delay."""
    numbers = torch.arange(1, 1 + math.prod(sizes), device=device).view(sizes)
    lines = torch.stack(shifted(numbers, [o[:-1] for o in offsets])).view(len(offsets), -1)  # 0 where there is none
    lags = [-sum(o * time for o, time in zip(offset, times, strict=True)) for offset in offsets]
    ahead = torch.tensor([max(lags) - lag for lag in lags], device=device)
    return (lines + ahead[:, None] * lines.shape[1]).where(lines > 0, 0).flatten(), max(lags)


def _spread(values: Tensor, place: Tensor, size: int) -> Tensor:
    """Put ``values`` at ``place`` in dim 1 of zeros."""
    return values.new_zeros(len(values), size, *values.shape[2:]).index_copy(1, place, values)


def _steps(sizes: tuple[int, ...], times: tuple[int, ...], device: torch.device) -> Tensor:
    """The step in which each pixel is solved."""
    steps = torch.zeros((), dtype=torch.long, device=device)
    for size, time in zip(sizes, times, strict=True):
        steps = steps.unsqueeze(-1) + time * torch.arange(size, device=device)
    return steps


class EmergingConv(KernelConv):
    r"""Convolves twice, once with the pixels before each and once with those behind it: y = A' A x + b.

    .. math:: (A x)_p = e^s \Big(x_p + \sum_{t \le 0} N_t \, x_{p + t}\Big), \qquad x = A^{-1} A'^{-1} (y - b)

    The sum is over the taps up to the centre, whose N_0 sees earlier channels only, with zeros around the image. A' is
    of the same kind, with weights of its own, and sees pixels and channels in reverse. As both are triangular, the
    log-determinant is the number of pixels times the sum of all s. Whatever is learned, the convolution with N has a
    norm below ``max_norm``, and the layer a condition number of at most
    ((1 + max_norm) / (1 - max_norm))^2 e^(4 max_log_scale), for images of any size. It starts as the identity.

    ======== ================================= ======================================================
    mask     taps                              steps of back-substitution for A, and as many for A'
    ======== ================================= ======================================================
    "raster" the first half of a centred k x k width + (k // 2 + 1) height
    "corner" k x k above and to the left       width + height
    ======== ================================= ======================================================

    The inverse solves for all pixels of a step at once. Mode ``invert`` keeps the input instead.

    Shapes: x and y (B, channels, ...), with as many dims of pixels as ``kernel_size`` has sizes.

    Args:
        channels: size of dim 1.
        kernel_size: k; one number for images, or a tuple of one to three, one for each dim of pixels. Odd for "raster".
        bias: whether b is learned; zero otherwise.
        mask: "raster" or "corner", as in the table.
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
        "FInC Flow: Fast and Invertible k x k Convolutions for Normalizing Flows", Kallappa, Nagar and Varma, 2023
        ("corner").

    Example:
        >>> layer = iz.EmergingConv(4, 3)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> y.shape, log_det.shape, torch.allclose(layer.inverse(y), x, atol=1e-5)
        (torch.Size([2, 4, 8, 8]), torch.Size([2]), True)
    """

    slow_inverse = True

    mask: str

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, ...],
        bias: bool = True,
        *,
        mask: str = "raster",
        max_norm: float = 0.5,
        max_log_scale: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(channels, kernel_size, max_norm, max_log_scale, **options)
        check_choice(self, "mask", mask, _MASKS)
        if mask == "raster" and not all(size % 2 for size in self.kernel_size):
            refuse(self, "kernel_size", "be odd with mask='raster'", kernel_size)
        self.mask = mask
        offsets, times = _MASKS[mask]
        self._offsets, self._times = offsets(self.kernel_size), times(self.kernel_size)
        self._reversed = [*range(1, len(self.kernel_size) + 2)]
        self._make_parameters(2, taps=(len(self._offsets),), bias=bias, device=device, dtype=dtype)

    def log_slope(self, x: Tensor, *h: Tensor) -> Tensor:
        return for_each_sample(x, self._log_scales.sum() * math.prod(x.shape[2:]))

    def _convolve(self, x: Tensor, matrices: Tensor) -> Tensor:
        for kernel in matrices:
            x = correlate(x, kernel, self._offsets).flip(self._reversed)
        return x

    def _solve(self, y: Tensor, matrices: Tensor) -> Tensor:
        for kernel in matrices.flip(0):
            y = back_substitute(y.flip(self._reversed), kernel, self._offsets, self._times)
        return y

    def _matrices(self, like: Like) -> Tensor:
        """e^s (1 + N) of both maps: (2, channels, channels, taps), the centre last, with channels before it only."""
        *before, centre = widen(self.weight).unbind(-1)
        return self._kernel(torch.stack([*before, centre.tril(-1)], -1), len(before))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.mask!r}"
