"""A convolution of patches that do not overlap."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Tape
from ..module import InvertibleModule
from ._checks import check_choice, check_dims, check_features, check_floating, check_like, check_positive_int, refuse
from .conv import mix_channels
from .matrix import Orthonormal, full_precision, widen
from .sampling import KINDS, sizes_of, to_channels, to_pixels
from .squeeze import check_pixels

__all__ = ["InvertiblePatchConv"]


class InvertiblePatchConv(InvertibleModule):
    """Multiplies each patch of pixels, of all channels, by a learned matrix with orthonormal columns: y = Q x + b.

    A convolution whose stride is its kernel's size, as at the entrance of a vision transformer. The inverse is
    x = Q^H (y - b). With out_channels = channels prod(kernel_size), Q is square, and the layer a bijection that keeps
    volumes. With more, it is injective, has no log-determinant, and its inverse maps to the nearest patch.

    Shapes: x (B, channels, h p, w q), y (B, out_channels, h, w) with kernel_size (p, q); likewise one or three dims of
    pixels.

    Args:
        channels: size of dim 1 of x.
        out_channels: size of dim 1 of y, at least channels p q; that if None.
        kernel_size: the size of a patch, one number for each dim of pixels; an int is meant for both dims of an image.
        bias: whether b is learned; zero otherwise.
        kind: "householder" or "cayley", how Q is parametrised, as in :class:`InvertibleLinear`.
        reflections: how many, for "householder"; channels p q if None.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, options, shapes or devices do not fit.
        TypeError: if an input is no floating point or complex tensor, or not of the layer's dtype.

    Example:
        >>> layer = iz.InvertiblePatchConv(3, 64, 4)
        >>> x = torch.randn(1, 3, 8, 8)
        >>> layer(x).shape, torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        (torch.Size([1, 64, 2, 2]), True)
    """

    channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    matrix: Orthonormal
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int | Sequence[int] = 2,
        *,
        bias: bool = True,
        kind: str = "householder",
        reflections: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_positive_int(self, "channels", channels)
        check_choice(self, "kind", kind, KINDS)
        self.channels, self.kernel_size = channels, sizes_of(self, "kernel_size", kernel_size)
        patch = channels * math.prod(self.kernel_size)
        self.out_channels = patch if out_channels is None else out_channels
        check_positive_int(self, "out_channels", self.out_channels)
        if self.out_channels < patch:
            refuse(self, "out_channels", f"be at least {patch}, the entries of a patch", out_channels)
        if reflections is not None and kind != "householder":
            refuse(self, "reflections", f"be None with kind={kind!r}", reflections)
        settings = {} if reflections is None else {"reflections": reflections}
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.matrix = KINDS[kind](type(self).__name__, self.out_channels, patch, **settings, **factory)
        self.bias = nn.Parameter(torch.zeros(self.out_channels, **factory)) if bias else None
        self.volume_preserving = self.out_channels == patch  # type: ignore[misc]

    def reset_parameters(self) -> None:
        self.matrix.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Tensor:
        """Q, of shape ``(out_channels, channels, *kernel_size)``, that of a convolution, in at least float32."""
        return self._columns(self._parameter).reshape(self.out_channels, self.channels, *self.kernel_size)

    def function(self, x: Tensor) -> Tensor:
        self._check_image("x", x)
        return self._multiply(x, self._columns(x))

    def inverse(self, y: Tensor) -> Tensor:
        self._check_patches("y", y)
        return self._project(y, self._columns(y))

    def replay(self, tape: Tape, *outputs: Tensor, **side: Any) -> None:
        """Build the matrix once for both directions."""
        (y,) = outputs
        q = tape.run(self._columns, y)
        x = tape.input(0, self._project(y, q))
        tape.run(self._multiply, x, q)

    @property
    def _parameter(self) -> Tensor:
        return self.matrix.own()[0]

    @property
    def _shift(self) -> Tensor:
        return widen(self._parameter.new_zeros(self.out_channels) if self.bias is None else self.bias)

    def _columns(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return self.matrix.weight(*self.matrix.factors())

    def _multiply(self, x: Tensor, q: Tensor) -> Tensor:
        with full_precision(x):
            return self._map(to_channels(x, self.kernel_size), q, self._shift)

    def _project(self, y: Tensor, q: Tensor) -> Tensor:
        with full_precision(y):
            return to_pixels(self._map(y, q.mH, -q.mH @ self._shift), self.kernel_size)

    def _map(self, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = torch.promote_types(z.dtype, weight.dtype)
        y = mix_channels(z.to(dtype), weight.to(dtype), bias.to(dtype))
        return y.to(torch.promote_types(z.dtype, self._parameter.dtype))

    def _check_image(self, argument: str, x: Tensor) -> None:
        check_floating(self, argument, x)
        check_like(self, argument, x, self._parameter)
        check_pixels(self, argument, x, self.kernel_size, deep=False)
        check_features(self, argument, x, 1, self.channels)

    def _check_patches(self, argument: str, y: Tensor) -> None:
        check_floating(self, argument, y)
        check_like(self, argument, y, self._parameter)
        check_dims(
            self,
            argument,
            y,
            (len(self.kernel_size) + 2,),
            f"(batch, channels, ...) with {len(self.kernel_size)} dims of pixels",
        )
        check_features(self, argument, y, 1, self.out_channels)

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, out_channels={self.out_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}"
        )
