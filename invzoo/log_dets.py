"""Log-determinants: one number per sample, in the dtype of the input but at least float32."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import refuse

__all__ = ["log_det_dtype", "sum_per_sample", "total", "zero_log_det"]


def log_det_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the log-determinant of a map of ``x``."""
    dtype = x.dtype.to_real() if x.is_complex() else x.dtype
    return torch.promote_types(dtype, torch.float32)


def sum_per_sample(owner: object, values: Tensor) -> Tensor:
    """Sum over all dims but the first what the entries add to a log-determinant: (B, ...) -> (B,)."""
    if values.ndim == 0:
        refuse(owner, "input", "have a batch dim, for a log-determinant", "a scalar")
    values = values.to(log_det_dtype(values))
    return values.sum(tuple(range(1, values.ndim))) if values.ndim > 1 else values


def zero_log_det(owner: object, inputs: tuple[Any, ...]) -> Tensor:
    """Return the log-determinant of a map that keeps volumes: zeros of shape (B,)."""
    x = inputs[0]
    if not isinstance(x, Tensor) or x.ndim == 0:
        got = "a scalar" if isinstance(x, Tensor) else type(x).__name__
        refuse(owner, "input", "be a Tensor with a batch dim, for a log-determinant", got)
    return x.new_zeros(len(x), dtype=log_det_dtype(x))


def total(owner: object, inputs: tuple[Any, ...], log_dets: Sequence[Tensor]) -> Tensor:
    """Add up the log-determinants of the steps of a map of ``inputs``; those that keep volumes may be left out."""
    return sum(log_dets[1:], log_dets[0]) if log_dets else zero_log_det(owner, inputs)
