"""Fixed orthonormal transforms: wavelets, the cosine transform and the Hadamard transform.

They are sums, shifts and multiples, of which autograd saves nothing, so that backward has nothing to rebuild; the
cosine transform saves one row of factors. All compute in at least float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...dtypes import widen
from ...engine import Tape
from ...module import InvertibleModule
from .._checks import check_choice, check_dim, check_floating, given_dims, refuse
from .split import Partition
from .squeeze import ORDERS, cells, check_pixels, positions

__all__ = ["DCT", "WAVELETS", "HaarDownsample", "HaarUpsample", "Hadamard", "dct", "idct", "walsh_hadamard"]

# The lowpass filters with one, two and three vanishing moments, of sum 2: "Ten Lectures on Wavelets", Daubechies, 1992.
_A, _B = math.sqrt(10), math.sqrt(5 + 2 * math.sqrt(10))
_DB2 = 1 + 3**0.5, 3 + 3**0.5, 3 - 3**0.5, 1 - 3**0.5
_DB3 = 1 + _A + _B, 5 + _A + 3 * _B, 10 - 2 * _A + 2 * _B, 10 - 2 * _A - 2 * _B, 5 + _A - 3 * _B, 1 + _A - _B
WAVELETS: dict[str, list[float]] = {"haar": [1, 1], "db2": [h / 4 for h in _DB2], "db3": [h / 16 for h in _DB3]}

_ALTERNATING = Partition("interleave", -1)
_Block = tuple[tuple[float, float], tuple[float, float]]


def polyphase(lowpass: Sequence[float], *, transposed: bool = False) -> list[_Block]:
    """Return the matrices M_k with ``(low, high)[n] = sum_k M_k (even, odd)[n + k]``, or their transposes.

    The highpass filter is ``g[i] = (-1)^i h[-1 - i]``.
    """
    highpass = [(-1) ** i * h for i, h in enumerate(reversed(lowpass))]
    rows = [((h[k], h[k + 1]), (g[k], g[k + 1])) for h, g in [(lowpass, highpass)] for k in range(0, len(h), 2)]
    return [((p, r), (q, s)) for (p, q), (r, s) in rows] if transposed else rows


def mix(z: Tensor, blocks: Sequence[_Block], step: int, dim: int) -> Tensor:
    """Return ``sum_k M_k z[n + step k]`` for the pairs ``z[n]`` in dim + 1, where n counts along dim, periodically."""
    ahead = [z.roll(-step * k, dim) if k else z for k in range(len(blocks))]
    a, b = zip(*(pairs.unbind(dim + 1) for pairs in ahead), strict=True)
    first, second = (
        sum(block[row][0] * x + block[row][1] * y for x, y, block in zip(a, b, blocks, strict=True)) for row in (0, 1)
    )
    return torch.stack((first, second), dim + 1)


def dct(x: Tensor) -> Tensor:
    """Return the orthonormal DCT-II over the last dim."""
    v = torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1)
    return (_fourier(torch.fft.fft, v + 0j) * _twiddles(x, -1)).real


def idct(y: Tensor) -> Tensor:
    """Return the orthonormal DCT-III over the last dim, the transpose of the DCT-II."""
    v = _fourier(torch.fft.ifft, (y - 1j * F.pad(y[..., 1:].flip(-1), (1, 0))) * _twiddles(y, 1)).real
    half = -(-v.shape[-1] // 2)
    return _ALTERNATING.join(v[..., :half], v[..., half:].flip(-1))


def _fourier(transform: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Transform complex numbers: autograd would save real ones. MKL refuses a batch of none."""
    return transform(v) if v.numel() else v


def _twiddles(x: Tensor, sign: int) -> Tensor:
    """``(s_k e^(-i pi k / 2 n))^-sign``, where ``s_k = sqrt(2 / n)``, and ``sqrt(1 / n)`` for k = 0."""
    n = x.shape[-1]
    k = torch.arange(n, dtype=x.dtype, device=x.device)
    scale = ((1 + (k > 0).to(x.dtype)) / n).sqrt()
    return torch.polar(scale**-sign, k * (sign * math.pi / (2 * n)))


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return the orthonormal Hadamard transform over the last dim, whose size is a power of two."""
    n = x.shape[-1]
    for _ in range(n.bit_length() - 1):  # each step transforms the lowest bit of the index, and makes it the highest
        a, b = x[..., ::2], x[..., 1::2]
        x = torch.cat((a + b, a - b), -1)
    return x * n**-0.5


class _Haar(InvertibleModule):
    """A wavelet transform into channels, and back. Abstract: a subclass says which of the two is the function."""

    volume_preserving = True
    widens = True
    deep: ClassVar[str]  # which of x and y has the pixels of cells as channels

    def __init__(self, wavelet: str = "haar", *, order: str = "channels_first", **options: Any) -> None:
        super().__init__(**options)
        check_choice(self, "wavelet", wavelet, WAVELETS)
        check_choice(self, "order", order, ORDERS)
        self.wavelet, self.order = wavelet, order

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_floating(self, argument, x)
        check_pixels(self, argument, x, 2, deep=argument == self.deep)

    def move(self, x: Tensor) -> Tensor:
        return self._step(x, deep=self.deep == "x")

    def undo(self, y: Tensor) -> Tensor:
        return self._step(y, deep=self.deep == "y")

    def _step(self, x: Tensor, *, deep: bool) -> Tensor:
        dims = x.ndim - 2
        image, split, channels = cells(dims, self.order)
        source, target = (channels, image) if deep else (image, channels)
        z = rearrange(x, f"{source} -> {split}", **positions([2] * dims))
        for dim in range(2, z.ndim, 2):
            z = mix(z, polyphase(WAVELETS[self.wavelet], transposed=deep), -1 if deep else 1, dim)
        return rearrange(z * 2 ** (-dims / 2), f"{split} -> {target}")

    def extra_repr(self) -> str:
        return f"{self.wavelet!r}, order={self.order!r}"


class HaarDownsample(_Haar):
    """Replace each cell of pixels by its mean and its differences, as channels: a step of a wavelet transform.

    Along each dim of pixels, ``low = (x0 + x1) / sqrt(2)`` and ``high = (x0 - x1) / sqrt(2)``: an orthonormal map, so
    that norms stay as they are. Longer filters mix neighbouring cells too, periodically at the borders.

    Shapes: ``(B, C, h, w) -> (B, 4 C, h / 2, w / 2)``, likewise 2 C with one dim of pixels and 8 C with three.

    Args:
        wavelet: ``'haar'``, or Daubechies' ``'db2'`` or ``'db3'`` with filters of length 4 and 6.
        order: of the new channels, as for :class:`Squeeze`. ``'channels_first'``: the bands of a channel side by side;
            ``'positions_first'``: the channels of a band, first the low band of all.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input with another number of dims, or odd sizes.
        TypeError: for values that are not floating point or complex.

    References:
        "i-RevNet: Deep Invertible Networks", Jacobsen, Smeulders and Oyallon, 2018.
        "Ten Lectures on Wavelets", Daubechies, 1992.

    Example:
        >>> layer = iz.HaarDownsample()
        >>> layer(torch.tensor([[[[1., 2.], [3., 6.]]]])).flatten()
        tensor([ 6., -2., -3.,  1.])
    """

    deep = "y"


class HaarUpsample(_Haar):
    """Make pixels of a mean and differences in channels: the inverse of :class:`HaarDownsample`.

    Shapes: ``(B, 4 C, h, w) -> (B, C, 2 h, 2 w)``, likewise from 2 C with one dim of pixels and 8 C with three.

    Args:
        wavelet, order: as for :class:`HaarDownsample`.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input with another number of dims, or channels that cannot be shared out.
        TypeError: for values that are not floating point or complex.

    Example:
        >>> iz.HaarUpsample()(torch.tensor([[[[6.]], [[-2.]], [[-3.]], [[1.]]]])).flatten()
        tensor([1., 2., 3., 6.])
    """

    deep = "x"


class _Transform(InvertibleModule):
    """An orthonormal transform along some dims. Abstract."""

    volume_preserving = True

    def __init__(self, dim: int | Sequence[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.dim = given_dims(self, dim)

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_floating(self, argument, x)
        for dim in self.dim:
            check_dim(self, argument, x, dim, inner=True)
            self._check_size(argument, x, dim)

    def _along(self, transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        z = widen(x)
        for dim in sorted({dim % x.ndim for dim in self.dim}):
            z = transform(z.movedim(dim, -1)).movedim(-1, dim)
        return z.to(x.dtype)

    def _check_size(self, argument: str, x: Tensor, dim: int) -> None:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"dim={self.dim[0] if len(self.dim) == 1 else self.dim}"


class DCT(_Transform):
    r"""Take the orthonormal discrete cosine transform (DCT-II) along some dims; the inverse is its transpose, DCT-III.

    .. math:: y_k = s_k \sum_m x_m \cos(\pi k (2 m + 1) / 2 n), \quad s_0 = \sqrt{1 / n}, \; s_k = \sqrt{2 / n}

    Shapes: ``(B, ..., n, ...) -> (B, ..., n, ...)``.

    Args:
        dim: the dimension, which may be negative, or several: (-2, -1) for images.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim``, or with no entries in it; the batch is not transformed.
        TypeError: for values that are not real floating point.

    Reference:
        "A Fast Cosine Transform in One and Two Dimensions", Makhoul, 1980.

    Example:
        >>> iz.DCT()(torch.tensor([[1., 1., 1., 1.]]))
        tensor([[2., 0., 0., 0.]])
    """

    def __init__(self, dim: int | Sequence[int] = -1, **options: Any) -> None:
        super().__init__(dim, **options)

    # By hand, since the one replay of all layers would take the transform once more.

    def function(self, x: Tensor) -> Tensor:
        self.check_argument("x", x)
        return self._along(dct, x)

    def inverse(self, y: Tensor) -> Tensor:
        self.check_argument("y", y)
        return self._along(idct, y)

    def replay(self, tape: Tape, *outputs: Tensor, **side: Any) -> None:
        x = tape.input(0, self.inverse(*outputs))
        tape.run(self.function, x[:0])  # autograd saves the factors alone, and does so for an empty batch too

    def _check_size(self, argument: str, x: Tensor, dim: int) -> None:
        if x.is_complex():
            refuse(self, argument, "be real floating point", x.dtype, TypeError)
        if x.shape[dim] == 0:
            refuse(self, argument, f"have entries in dim {dim}", f"shape {tuple(x.shape)}")


class Hadamard(_Transform):
    r"""Take the orthonormal Hadamard transform along some dims: its own inverse, in n log(n) sums.

    Every output is a sum of all inputs with signs, so that the layer mixes features as widely as a matrix could.

    .. math:: y_k = n^{-1/2} \sum_m (-1)^{\langle k, m \rangle} x_m

    with the number of common bits of k and m as the product.

    Shapes: ``(B, ..., n, ...) -> (B, ..., n, ...)`` where ``n`` is a power of two.

    Args:
        dim: the dimension, which may be negative, or several; 1 by default, but to be given for one tensor of three
            dims.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim``, or of another size in it; the batch is not transformed.
        TypeError: for values that are not floating point or complex.

    Example:
        >>> iz.Hadamard()(torch.tensor([[1., 2., 3., 4.]]))
        tensor([[ 5., -1., -2.,  0.]])
    """

    def move(self, x: Tensor) -> Tensor:
        return self._along(walsh_hadamard, x)

    undo = move  # type: ignore[assignment]  # words take any arguments

    def _check_size(self, argument: str, x: Tensor, dim: int) -> None:
        if x.shape[dim].bit_count() != 1:
            refuse(self, argument, f"have a power of two as its size in dim {dim}", f"shape {tuple(x.shape)}")
