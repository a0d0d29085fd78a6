"""Down- and up-sampling by learned orthogonal matrices."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ...dtypes import computed, full_precision, widen
from ...module import InvertibleModule
from ...protocol import Like
from .._checks import check_choice, check_features, check_floating, check_like, check_positive_int, refuse
from ..rearrangements.squeeze import cells, check_pixels, positions, sizes_of
from ..rearrangements.wavelet import dct
from .matrix import Cayley, Householder, Matrix, make_matrix
from .orthogonal import identity, polish

__all__ = ["KINDS", "OrthogonalDownsample", "OrthogonalUpsample", "to_channels", "to_pixels"]

KINDS: dict[str, type[Matrix]] = {"householder": Householder, "cayley": Cayley}
INITS = ("haar", "dct", "random")
CELLS = {dims: cells(dims, "channels_first") for dims in (1, 2, 3)}  # the compiler follows no cached function


def haar_matrix(n: int) -> Tensor:
    """The orthonormal Haar transform of n values, a power of two: the mean first, then ever finer differences."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    pair, coarse = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2), haar_matrix(n // 2)
    return torch.cat((torch.kron(coarse, pair[:1]), torch.kron(torch.eye(n // 2, dtype=torch.float64), pair[1:])))


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II of n values."""
    return dct(torch.eye(n, dtype=torch.float64)).mT


def start_matrix(init: str, sizes: Sequence[int]) -> Tensor:
    """The transform of a cell of pixels along all its dims, for ``'haar'`` or ``'dct'``."""
    return functools.reduce(torch.kron, map({"haar": haar_matrix, "dct": dct_matrix}[init], sizes))


def to_channels(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Make a channel of each entry of a cell: (b, c, h p, w q) -> (b, c p q, h, w)."""
    image, _, deep = CELLS[len(sizes)]
    return rearrange(x, f"{image} -> {deep}", **positions(sizes))


def to_pixels(y: Tensor, sizes: Sequence[int]) -> Tensor:
    """Undo :func:`to_channels`."""
    image, _, deep = CELLS[len(sizes)]
    return rearrange(y, f"{deep} -> {image}", **positions(sizes))


def mix_groups(z: Tensor, weight: Tensor) -> Tensor:
    """Multiply the channels of each group by its own matrix; ``weight`` is (groups, n, n)."""
    groups, n = weight.shape[:2]
    return (weight @ z.reshape(len(z), groups, n, math.prod(z.shape[2:]))).reshape(z.shape)


class _OrthogonalSampling(InvertibleModule):
    """Down- and up-sampling by an orthogonal matrix per channel. Abstract: a subclass says which is the function.

    The matrix is a fixed one times a learned one, so that it starts where it should, and any parameters that are drawn
    at random, from which learning starts well, will do.
    """

    volume_preserving = True
    deep: ClassVar[str]  # which of x and y has the pixels of cells as channels

    channels: int
    stride: tuple[int, ...]
    init: str
    matrix: Matrix
    basis: Tensor

    def __init__(
        self,
        channels: int,
        stride: int | Sequence[int] = 2,
        *,
        kind: str = "householder",
        init: str = "haar",
        reflections: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.channels, self.stride, self.init = channels, sizes_of(self, "stride", stride), init
        self._check_arguments()
        cell = math.prod(self.stride)
        groups = channels if self.deep == "y" else channels // cell
        settings, factory = {"reflections": reflections}, {"device": device, "dtype": dtype}
        self.matrix = make_matrix(self, KINDS, kind, cell, cell, settings, batch=(groups,), **factory)
        parameter = self.matrix.own()[0]
        self.register_buffer("basis", torch.empty(groups, cell, cell, device=parameter.device, dtype=parameter.dtype))
        self.reset_parameters()

    def _check_arguments(self) -> None:
        check_positive_int(self, "channels", self.channels)
        check_choice(self, "init", self.init, INITS)
        if self.init == "haar" and any(n & (n - 1) for n in self.stride):
            refuse(self, "stride", "be powers of two with init='haar'", self.stride)
        if self.deep == "x" and self.channels % (cell := math.prod(self.stride)):
            refuse(self, "channels", f"be a multiple of {cell}, the pixels of a cell", self.channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.matrix.reset_parameters()
        self.basis.copy_(identity(self.basis, self.basis.shape[-1]))
        if self.init != "random":
            self.basis.copy_(start_matrix(self.init, self.stride).to(widen(self.basis)) @ self.weight.mH)

    @property
    def weight(self) -> Tensor:
        """The orthogonal matrix of each channel, (channels, prod(stride), prod(stride)), in at least float32."""
        with full_precision(self.basis):
            # The basis may have been in half precision, or come from there: two steps make it orthogonal again.
            return polish(polish(widen(self.basis))) @ self.matrix.weight(*self.matrix())

    def given(self, like: Like) -> Tensor:
        return self.weight

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        return computed(lambda x: mix_groups(to_channels(x, self.stride), weight), x, self.basis)

    def _up(self, y: Tensor, weight: Tensor) -> Tensor:
        return computed(lambda y: to_pixels(mix_groups(y, weight.mH), self.stride), y, self.basis)

    def check_argument(self, argument: str, x: Tensor) -> None:
        deep = argument == self.deep
        check_floating(self, argument, x)
        check_like(self, argument, x, self.basis)
        check_pixels(self, argument, x, self.stride, deep=deep)
        check_features(self, argument, x, 1, len(self.basis) * (math.prod(self.stride) if deep else 1))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, stride={self.stride}, init={self.init!r}"


class OrthogonalDownsample(_OrthogonalSampling):
    """Turns each cell of pixels of a channel into as many channels, by a learned orthogonal matrix: y = Q x.

    A convolution with one group a channel whose kernel is as large as its stride; its inverse, x = Q^H y, is the
    transposed convolution. Norms stay as they are, and so do volumes.

    Shapes: x (B, channels, h p, w q), y (B, channels p q, h, w) with stride (p, q); likewise one or three dims.

    Args:
        channels: size of dim 1 of x.
        stride: the size of a cell, one number for each dim of pixels; an int is meant for both dims of an image.
        kind: "householder" or "cayley", how Q is parametrised, as in :class:`InvertibleLinear`.
        init: what Q is at the start: "haar" (of strides that are powers of two) or "dct", the orthonormal transform
            along each dim, or "random".
        reflections: how many, for "householder"; p q if None.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, options, shapes or devices do not fit.
        TypeError: if an input is no floating point or complex tensor, or not of the layer's dtype.

    Reference:
        "iUNets: Fully invertible U-Nets with Learnable Up- and Downsampling", Etmann, Ke and Schönlieb, 2020.

    Example:
        >>> layer = iz.OrthogonalDownsample(3, 2)
        >>> x = torch.randn(1, 3, 4, 6)
        >>> layer(x).shape, torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        (torch.Size([1, 12, 2, 3]), True)
    """

    deep = "y"
    move, undo = _OrthogonalSampling._down, _OrthogonalSampling._up


class OrthogonalUpsample(_OrthogonalSampling):
    """Turns groups of channels into cells of pixels, by a learned orthogonal matrix: y = Q^H x.

    It is :class:`OrthogonalDownsample` the other way round.

    Shapes: x (B, channels, h, w), y (B, channels / (p q), h p, w q) with stride (p, q); likewise one or three dims.

    Args:
        channels: size of dim 1 of x, a multiple of p q.
        stride: the size of a cell, one number for each dim of pixels; an int is meant for both dims of an image.
        kind, init, reflections: as for :class:`OrthogonalDownsample`; init is that of Q.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, options, shapes or devices do not fit.
        TypeError: if an input is no floating point or complex tensor, or not of the layer's dtype.

    Reference:
        "iUNets: Fully invertible U-Nets with Learnable Up- and Downsampling", Etmann, Ke and Schönlieb, 2020.

    Example:
        >>> layer = iz.OrthogonalUpsample(8, (2, 2, 2), init="dct")
        >>> x = torch.randn(1, 8, 1, 2, 3)
        >>> layer(x).shape, torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        (torch.Size([1, 1, 2, 4, 6]), True)
    """

    deep = "x"
    move, undo = _OrthogonalSampling._up, _OrthogonalSampling._down  # type: ignore[assignment]  # words take any arguments
