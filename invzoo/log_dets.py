"""Log-determinants: one number per sample, in the dtype of the input but at least float32."""

from typing import Any

import torch
from torch import Tensor

from .errors import refuse

__all__ = ["LogDets", "for_each_sample", "log_det_dtype", "sum_per_sample", "zero_log_det"]


def log_det_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the log-determinant of a map of ``x``."""
    dtype = x.dtype.to_real() if x.is_complex() else x.dtype
    return torch.promote_types(dtype, torch.float32)


def sum_per_sample(owner: object, values: Tensor) -> Tensor:
    """Sum a layer's log-slopes over all dims but the first, in at least float32: (B, ...) -> (B,).

    Args:
        owner: the layer, which the message names.
        values: what each entry adds to the log-determinant.

    Raises:
        ValueError: for a scalar, which has no batch dim.

    Example:
        >>> iz.sum_per_sample(iz.Identity(), torch.zeros(3, 4, 5)).shape
        torch.Size([3])
    """
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


def for_each_sample(x: Tensor, log_det: Tensor) -> Tensor:
    """Return a log-determinant, one per sample of ``x`` or the same for all of them, in its shape (B,) and dtype."""
    return log_det.to(log_det_dtype(x)).expand(len(x)).contiguous()


class LogDets:
    """The sum of the log-determinants of the steps of a map; steps that keep volumes may be left out."""

    __slots__ = ("_sum",)

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, log_det: Tensor) -> None:
        """Add that of one step."""
        self._sum = log_det if self._sum is None else self._sum + log_det

    def total(self, owner: object, inputs: tuple[Any, ...]) -> Tensor:
        """Return the sum, for ``inputs`` of the first step."""
        return zero_log_det(owner, inputs) if self._sum is None else self._sum
