"""Dequantization: noise that makes integers real numbers."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Uniform, constraints

from ...dtypes import widen
from .._checks import check_positive_int, refuse
from ..elementwise import check_real, readable
from .surjection import Noise, Surjection, zero_and_one

__all__ = ["Dequantize", "uniform"]


def uniform(x: Tensor) -> Distribution:
    """Positions between integers that do not depend on them."""
    return Uniform(*zero_and_one(x), validate_args=False)


class Dequantize(Surjection):
    """Make integers real numbers, ``x -> (x + u) / levels`` with noise ``u ~ q(u | x)`` in [0, 1); the inverse floors.

    The log-likelihood term is ``-n log(levels) - log q(u | x)``, of one draw. Noise within ``2 levels eps`` of 0 and 1
    is moved there, so that the inverse is exact in floating point; it takes any real number to the nearest level.

    Shapes: ``(B, ...) -> (B, ...)``; integers of any dtype become floating point, at least float32.

    Args:
        levels: how many there are: values are 0, ..., levels - 1.
        distribution: gives q(u | x), as in :class:`Surjection`, of values in [0, 1]; uniform by default.
        dtype: of what the inverse returns.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for values that are no such integers, or a distribution of other shapes. Reading the values
            synchronises with a GPU; it is left out where they cannot be read, as in compiled code.
        TypeError: for an input that is no tensor or complex, or a distribution that is none.

    References:
        "SurVAE Flows", Nielsen, Jaini, Hoogeboom, Winther and Welling, 2020.
        "Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design", Ho,
        Chen, Srinivas, Duan and Abbeel, 2019.

    Example:
        >>> layer = iz.Dequantize(256)
        >>> x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
        >>> torch.equal(layer.inverse(layer(x)), x)
        True
    """

    codomain = constraints.unit_interval
    draws = True

    def __init__(
        self,
        levels: int = 256,
        *,
        distribution: Noise = uniform,
        dtype: torch.dtype = torch.uint8,
        **options: Any,
    ) -> None:
        super().__init__(distribution, **options)
        check_positive_int(self, "levels", levels)
        if levels > 2**16:
            refuse(self, "levels", "be at most 65536, for room between them in float32", levels)
        if not dtype.is_floating_point and levels - 1 > torch.iinfo(dtype).max:
            refuse(self, "dtype", f"hold {levels} levels", dtype)
        self.levels, self.dtype = levels, dtype

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.integer_interval(0, self.levels - 1)

    def check_argument(self, argument: str, x: Tensor) -> None:
        if argument == "y":
            check_real(self, argument, x)
            return
        if x.is_complex() or x.dtype is torch.bool:
            refuse(self, argument, "be a Tensor of integers, of any dtype", x.dtype, TypeError)
        if readable(x):
            low, high = (value.item() for value in x.detach().aminmax())
            if not 0 <= low <= high < self.levels or (x.is_floating_point() and not x.equal(x.round())):
                got = f"values from {low:.8g} to {high:.8g}"
                refuse(self, argument, f"have integers in [0, {self.levels - 1}]", got)

    def lose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = widen(x) * self.levels
        left = scaled.detach().floor().clamp(0, self.levels - 1)
        return left.to(self.dtype), scaled - left

    def join(self, left: Tensor, lost: Tensor) -> Tensor:
        whole = widen(left if left.is_floating_point() else left.to(lost.dtype))
        margin = 2 * self.levels * torch.finfo(whole.dtype).eps
        return (whole + widen(lost).clamp(margin, 1 - margin)) / self.levels

    def log_prob(self, noise: Distribution, lost: Tensor) -> Tensor:
        return super().log_prob(noise, lost) + math.prod(lost.shape[1:]) * math.log(self.levels)

    def extra_repr(self) -> str:
        return f"{self.levels}"
