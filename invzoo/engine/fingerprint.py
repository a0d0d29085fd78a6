"""A few numbers that tell whether a tensor was rebuilt as it was, at the cost of one pass over it and no memory."""

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from ._torch import is_fake, without_modes

__all__ = ["Fingerprint", "distance", "fingerprint", "tolerance"]

Fingerprint = list[float]  # four projections on random signs, and the norm


@lru_cache(maxsize=64)
def _signs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed pseudo-random signs, without a random number generator: bits of a multiplicative hash of the position."""
    hashed = (torch.arange(1, rows * columns + 1, device=device) * 0x9E3779B97F4A7C1) >> 40
    return ((hashed & 1) * 2 - 1).reshape(rows, columns).to(dtype)


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Fingerprint:
    """Project a tensor on four random rank-one sign matrices: an error of relative size e moves each by about e."""
    if is_fake(tensor):
        return [math.nan]
    with without_modes(), torch.autocast(tensor.device.type, enabled=False):
        return _project(tensor)


def _project(tensor: Tensor) -> Fingerprint:
    flat = tensor.detach().resolve_conj().resolve_neg()
    flat = torch.view_as_real(flat) if flat.is_complex() else flat
    flat = flat.reshape(-1) if flat.dtype in (torch.float32, torch.float64) else flat.reshape(-1).double()
    width = 1 << max(0, math.isqrt(flat.numel()).bit_length() - 1)  # rows of a power of two, then the rest
    body = flat.numel() // width * width
    folded = flat[:body].reshape(-1, width) @ _signs(width, 4, flat.dtype, flat.device)
    numbers = (folded * _signs(len(folded), 4, flat.dtype, flat.device).flip(1)).sum(0)
    if rest := flat[body:].numel():
        numbers = numbers + flat[body:] @ _signs(rest, 4, flat.dtype, flat.device)
    return [*numbers.tolist(), torch.linalg.vector_norm(flat).item()]


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
