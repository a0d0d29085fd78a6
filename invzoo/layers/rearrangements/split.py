"""Splitting a tensor into two streams, and merging two streams into a tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import engine
from ...engine import Operation
from ...module import InvertibleModule
from .._checks import check_dim_given, given_dim, refuse
from .base import Rearrangement

__all__ = ["Merge", "Partition", "Split", "SplitSpec", "checkerboard", "cut", "join", "merging", "splitting"]

SplitSpec = str | float | tuple[int, int]


@dataclass(frozen=True, slots=True)
class Partition:
    """How one tensor is two streams.

    Args:
        split: ``'half'`` (those of `torch.chunk`), ``'interleave'`` (even and odd positions), the first stream's share
            of the size (a float between 0 and 1, rounded up), or both sizes.
        dim: the dimension that is split.
    """

    split: SplitSpec = "half"
    dim: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.split, str):
            valid = self.split in ("half", "interleave")
        elif isinstance(self.split, float):
            valid = 0 < self.split < 1
        else:
            valid = len(self.split) == 2 and all(isinstance(n, int) and n > 0 for n in self.split)
        if not valid:
            expected = "be 'half', 'interleave', a share between 0 and 1, or two positive sizes"
            refuse("Split", "split", expected, repr(self.split))

    def sizes(self, n: int) -> tuple[int, int]:
        """Return the sizes of the streams of ``n`` features."""
        if isinstance(self.split, tuple):
            return self.split
        first = -(-n // 2) if isinstance(self.split, str) else min(n - 1, -int(-n * self.split // 1))
        return first, n - first

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams of ``x``, as views."""
        if not -x.ndim <= self.dim < x.ndim:
            refuse("Split", "input", f"have a dim {self.dim}", f"shape {tuple(x.shape)}")
        sizes = self.sizes(x.shape[self.dim])
        if min(sizes) < 1 or sum(sizes) != x.shape[self.dim]:
            expected = f"{sum(sizes)} features" if isinstance(self.split, tuple) else "at least 2 features"
            refuse("Split", "input", f"have {expected} in dim {self.dim}", f"shape {tuple(x.shape)}")
        if self.split == "interleave":
            index = [slice(None)] * (self.dim % x.ndim)
            return x[(*index, slice(0, None, 2))], x[(*index, slice(1, None, 2))]
        first, second = x.split(sizes, self.dim)
        return first, second

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams of ``x``, as copies: views would keep all of it as long as one of them lives."""
        first, second = self.cut(x)
        return first.clone(), second.clone()

    def join(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the tensor whose streams these are."""
        if self.split != "interleave":
            return torch.cat((x1, x2), self.dim)
        dim, n = self.dim % x1.ndim, x2.shape[self.dim]
        pairs = torch.stack((x1.narrow(dim, 0, n), x2), dim + 1).flatten(dim, dim + 1)
        return pairs if x1.shape[dim] == n else torch.cat((pairs, x1.narrow(dim, n, 1)), dim)


def checkerboard(x: Tensor, dim: int, parity: int) -> Tensor:
    """Mark the positions behind ``dim`` whose coordinates have an even sum (``parity`` 0) or an odd one."""
    shape = x.shape[dim % x.ndim + 1 :]
    if not shape:
        refuse("Coupling", "input", f"have spatial dims after dim {dim}, for a checkerboard", f"shape {tuple(x.shape)}")
    coordinates = torch.meshgrid(*(torch.arange(n, device=x.device) for n in shape), indexing="ij")
    return torch.stack(coordinates).sum(0) % 2 == parity


def splitting(owner: InvertibleModule, there: Callable[..., Any], back: Callable[..., Any]) -> Operation:
    """Make the call that splits what a layer gets."""
    return Operation(f"{owner._name()} (split)", there, back, None, (), owner._policy)


def merging(owner: InvertibleModule, there: Callable[..., Any], back: Callable[..., Any]) -> Operation:
    """Make the call that merges what a layer returns."""
    return Operation(f"{owner._name()} (merge)", there, back, None, (), owner._policy)


def cut(partition: Partition, x: Tensor, owner: InvertibleModule) -> tuple[Tensor, Tensor]:
    """Split a tensor for a layer in a call of its own, so that backward can merge the streams again."""
    return engine.call(splitting(owner, partition.part, partition.join), (x,), {})


def join(partition: Partition, streams: tuple[Tensor, Tensor], owner: InvertibleModule) -> Tensor:
    """Merge the two streams of a layer in a call of its own, so that one activation is held and not two."""
    return engine.call(merging(owner, partition.join, partition.part), streams, {})


class _Partitioned(Rearrangement):
    """One tensor and its two streams: several values move at once, so both directions are written. Abstract."""

    def __init__(self, dim: int | None = None, split: SplitSpec = "half", **options: Any) -> None:
        super().__init__(**options)
        self.partition = Partition(split, given_dim(self, dim))

    def extra_repr(self) -> str:
        return f"dim={self.partition.dim}, split={self.partition.split!r}"


class Split(_Partitioned):
    r"""Split a tensor into two streams, ``x -> (x1, x2)``.

    Shapes: ``(..., n, ...) -> (..., n1, ...), (..., n2, ...)`` with ``n1 + n2 = n``.

    Args:
        dim: the dimension that is split; 1 by default, but to be given for one tensor of three dims.
        split: ``'half'`` (those of `torch.chunk`: the first one is larger if ``n`` is odd), ``'interleave'`` (even and
            odd positions), the first stream's share of ``n`` (a float between 0 and 1, rounded up), or both sizes.

    Raises:
        ValueError: for another ``split``, or an input that cannot be split so.

    Example:
        >>> iz.Split()(torch.arange(5.).unsqueeze(0))
        (tensor([[0., 1., 2.]]), tensor([[3., 4.]]))
    """

    def function(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_dim_given(self, x)
        return self.partition.cut(x)

    def inverse(self, x1: Tensor, x2: Tensor) -> Tensor:
        check_dim_given(self, x1)
        return self.partition.join(x1, x2)


class Merge(_Partitioned):
    """Merge two streams into a tensor, ``(x1, x2) -> x``: the inverse of :class:`Split`.

    Shapes: ``(..., n1, ...), (..., n2, ...) -> (..., n1 + n2, ...)``.

    Args:
        dim, split: as for :class:`Split`. Streams whose sizes are not what it would give cannot be merged.

    Raises:
        ValueError: for streams of other sizes.

    Example:
        >>> iz.Merge(split="interleave")(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[0., 1., 0., 1.]])
    """

    def function(self, x1: Tensor, x2: Tensor) -> Tensor:
        check_dim_given(self, x1)
        sizes = x1.shape[self.partition.dim], x2.shape[self.partition.dim]
        if (expected := self.partition.sizes(sum(sizes))) != sizes:
            refuse(self, "inputs", f"have {expected[0]} and {expected[1]} features", f"{sizes[0]} and {sizes[1]}")
        return self.partition.join(x1, x2)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_dim_given(self, x)
        return self.partition.cut(x)
