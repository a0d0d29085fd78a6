"""A few numbers that tell whether a tensor was rebuilt as it was, at the cost of one pass over it and no memory."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._torch import is_distributed, is_fake, whole, without_modes
from .nested import plain_parts
from .uncompiled import uncompiled

__all__ = ["Fingerprint", "Prints", "distance", "fingerprint", "precision_of", "project", "tolerance"]

Fingerprint = list[float]  # four random projections of each part, and the norm of all


@lru_cache(maxsize=64)
def _weights(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed numbers that look random, of mean 0 and variance 1, without a random number generator.

    They are a hash of the position. Signs would do for errors that look random themselves, but a constant one, say,
    they would cancel.
    """
    hashed = torch.arange(1, rows * columns + 1, device=device)
    for _ in range(2):  # in 32 bits of 64
        hashed = hashed * 0x45D9F3B % 2**32
        hashed = hashed ^ (hashed >> 16)
    uniform = hashed.reshape(rows, columns).to(dtype) / 2**31 - 1
    return uniform * math.sqrt(3)


@uncompiled
def fingerprint(tensor: Tensor) -> Fingerprint:
    """Take a fingerprint: an error of relative size e moves each of its projections by about e times the norm."""
    if is_fake(tensor):
        return [math.nan]
    parts = plain_parts(whole(tensor.detach()) if is_distributed(tensor) else tensor)
    # Where a nested tensor's rows begin, say, is large, and would hide errors of its values.
    values = [x for x in parts if x.is_floating_point() or x.is_complex()] or parts
    rows = [project(x).tolist() for x in values]
    return [*(number for row in rows for number in row[:-1]), math.hypot(*(row[-1] for row in rows))]


@torch.no_grad()
def project(tensor: Tensor) -> Tensor:
    """Project a tensor on four random rank-one matrices; return the projections and the norm in one tensor."""
    with without_modes(), torch.autocast(tensor.device.type, enabled=False):
        return _project(tensor)


def _project(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg()
    flat = torch.view_as_real(flat) if flat.is_complex() else flat
    flat = flat.reshape(-1).to(precision_of(flat.dtype))
    kind = flat.dtype, flat.device
    width = 1 << max(0, math.isqrt(flat.numel()).bit_length() - 1)  # rows of a power of two, then the rest
    body = flat.numel() // width * width
    folded = flat[:body].reshape(-1, width) @ _weights(width, 4, *kind)
    numbers = (folded * _weights(len(folded), 4, *kind).flip(1)).sum(0)
    if rest := flat[body:].numel():
        numbers = numbers + flat[body:] @ _weights(rest, 4, *kind)
    return torch.cat([numbers, torch.linalg.vector_norm(flat).reshape(1)])


def precision_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that projections of a tensor are computed in."""
    inexact = dtype.is_floating_point or dtype.is_complex
    return torch.float32 if inexact and torch.finfo(dtype).bits <= 32 else torch.float64


class _Precisions(dict[torch.dtype, float]):
    def __missing__(self, dtype: torch.dtype) -> float:
        inexact = dtype.is_floating_point or dtype.is_complex
        self[dtype] = math.sqrt(torch.finfo(dtype).eps) if inexact else 0.0
        return self[dtype]


_precisions = _Precisions()


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Return the relative error allowed in a rebuilt tensor: the root of the coarsest precision involved."""
    return max(map(_precisions.__getitem__, dtypes), default=0.0)


def distance(was: Fingerprint, now: Fingerprint) -> float:
    """Estimate the relative error; infinite values in the original cannot come back, so they count as 0."""
    if not all(map(math.isfinite, was)):
        return 0.0
    error = math.sqrt(sum((a - b) ** 2 for a, b in zip(was[:-1], now[:-1], strict=True)) / 4)
    return error / was[-1] if was[-1] else error


class Prints:
    """The fingerprints of some values, to compare what a replay makes of them.

    Args:
        what: what errors call one of the values.
        values: those that are no tensors are not compared.
    """

    __slots__ = ("_prints", "what")

    def __init__(self, what: str, values: Iterable[Any]):
        self.what = what
        self._prints = [(i, fingerprint(x)) for i, x in enumerate(values) if isinstance(x, Tensor)]

    def compare(self, name: str, values: Sequence[Any], allowed: float) -> None:
        """Raise if values of the replay of ``name`` are others; None stands for one that nobody needs any more."""
        for position, was in self._prints:
            value = values[position]
            error = 0.0 if value is None else distance(was, fingerprint(value))
            if not error <= allowed:
                raise RuntimeError(
                    f"Expected {name} to be replayed within a relative error of {allowed:.1e}; got {error:.1e}, for "
                    f"{self.what} {position}. Its inverse is wrong, or it is not deterministic, or too ill-conditioned "
                    "for this precision. Mend it, or use mode 'recompute' or 'store'"
                )
