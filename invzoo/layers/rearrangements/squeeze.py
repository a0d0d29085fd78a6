"""Space to depth: pixels become channels, and back."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from ...protocol import Like
from .._checks import check_choice, check_positive_int, check_tensor, refuse
from .base import Rearrangement

__all__ = ["ORDERS", "Squeeze", "Unsqueeze", "cells", "check_pixels", "positions", "sizes_of"]

ORDERS = ("channels_first", "positions_first")


def cells(dims: int, order: str) -> tuple[str, str, str]:
    """Return the einops patterns of an image, of its cells, and of the image whose channels are the cells' entries.

    The cells are split off as (b, channels, rows, position in the row, columns, position in the column, ...).
    """
    rows, positions = [f"h{i}" for i in range(dims)], [f"p{i}" for i in range(dims)]
    pairs = [*zip(rows, positions, strict=True)]
    channels = " ".join(["c", *positions] if order == "channels_first" else [*positions, "c"])
    return (
        f"b c {' '.join(f'({h} {p})' for h, p in pairs)}",
        f"b c {' '.join(f'{h} {p}' for h, p in pairs)}",
        f"b ({channels}) {' '.join(rows)}",
    )


def sizes_of(owner: object, argument: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """The size of a cell in each dim of pixels; one number is that of both dims of an image."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value, value)
    for size in sizes:
        check_positive_int(owner, argument, size)
    if not 1 <= len(sizes) <= 3:
        refuse(owner, argument, "be an int or one to three of them", value)
    return sizes


def positions(factors: Sequence[int]) -> dict[str, int]:
    """Return the sizes of a cell, as the patterns name them."""
    return {f"p{i}": factor for i, factor in enumerate(factors)}


def check_pixels(owner: object, argument: str, x: Any, factor: tuple[int, ...] | int, *, deep: bool) -> None:
    """``x`` has pixels whose sizes the factor divides; or the channels, if ``deep``."""
    check_tensor(owner, argument, x)
    dims = {len(factor)} if not isinstance(factor, int) else {1, 2, 3}
    if x.ndim - 2 not in dims:
        number = "one to three dims" if isinstance(factor, int) else f"{len(factor)} dims"
        refuse(owner, argument, f"have dims (batch, channels, ...) with {number} of pixels", f"shape {tuple(x.shape)}")
    factors = _factors(factor, x.ndim - 2)
    if deep and x.shape[1] % math.prod(factors):
        refuse(owner, argument, f"have a multiple of {math.prod(factors)} channels", f"shape {tuple(x.shape)}")
    if not deep and any(n % f for n, f in zip(x.shape[2:], factors, strict=True)):
        refuse(owner, argument, f"have sizes that are multiples of {factors} in dims 2, ...", f"shape {tuple(x.shape)}")


def _factors(factor: tuple[int, ...] | int, dims: int) -> tuple[int, ...]:
    return (factor,) * dims if isinstance(factor, int) else factor


class _Cells(Rearrangement):
    """Space to depth and back. Abstract: a subclass says which of the two is the function."""

    pixels_in: ClassVar[str]  # x or y; the other has them as channels
    factor: int | tuple[int, ...]
    order: str

    def __init__(self, factor: int | Sequence[int] = 2, *, order: str = "channels_first", **options: Any) -> None:
        super().__init__(**options)
        sizes = sizes_of(self, "factor", factor)
        check_choice(self, "order", order, ORDERS)
        self.factor, self.order = factor if isinstance(factor, int) else sizes, order

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_pixels(self, argument, x, self.factor, deep=argument != self.pixels_in)

    def given(self, like: Like) -> tuple[str, str, dict[str, int]]:
        """Return the patterns of x and y, and the sizes of a cell."""
        factors = _factors(self.factor, like.ndim - 2)
        image, _, deep = cells(len(factors), self.order)
        sides = (image, deep) if self.pixels_in == "x" else (deep, image)
        return *sides, positions(factors)

    def move(self, x: Tensor, source: str, target: str, sizes: dict[str, int]) -> Tensor:
        return rearrange(x, f"{source} -> {target}", **sizes)

    def undo(self, y: Tensor, source: str, target: str, sizes: dict[str, int]) -> Tensor:
        return rearrange(y, f"{target} -> {source}", **sizes)

    def extra_repr(self) -> str:
        return f"{self.factor}, order={self.order!r}"


class Squeeze(_Cells):
    """Move pixels into channels, ``(c, h p, w q) -> (c p q, h, w)``: space to depth.

    An image is cut into cells of ``factor`` pixels a side; each becomes one pixel, with all its entries as channels.

    Shapes: ``(B, C, h p) -> (B, C p, h)``, likewise with two and three dims of pixels.

    Args:
        factor: of each dim of pixels, or one for all.
        order: of the new channels. ``'channels_first'``: ``c p q``, each channel's positions side by side, as in
            `torch.nn.PixelUnshuffle`. ``'positions_first'``: ``p q c``, each position's channels side by side, as in
            TensorFlow's `space_to_depth`; the halves of the channels are then the even and the odd rows.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input with another number of dims, or sizes that the factor does not divide.

    Reference:
        "Density estimation using Real NVP", Dinh, Sohl-Dickstein and Bengio, 2016.

    Example:
        >>> x = torch.tensor([[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]])
        >>> iz.Squeeze()(x).flatten()
        tensor([1, 2, 3, 4, 5, 6, 7, 8])
        >>> iz.Squeeze(order="positions_first")(x).flatten()
        tensor([1, 5, 2, 6, 3, 7, 4, 8])
    """

    pixels_in = "x"


class Unsqueeze(_Cells):
    """Move channels into pixels, ``(c p q, h, w) -> (c, h p, w q)``: the inverse of :class:`Squeeze`.

    Shapes: ``(B, C p, h) -> (B, C, h p)``, likewise with two and three dims of pixels.

    Args:
        factor, order: as for :class:`Squeeze`; ``'channels_first'`` is the order of `torch.nn.PixelShuffle`.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input with another number of dims, or channels that cannot be shared out.

    Example:
        >>> iz.Unsqueeze()(torch.arange(4).reshape(1, 4, 1, 1))
        tensor([[[[0, 1],
                  [2, 3]]]])
    """

    pixels_in = "y"
