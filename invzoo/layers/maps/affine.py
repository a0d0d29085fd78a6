"""Maps that shift, and that scale and shift."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...protocol import Like
from .._checks import check_choice, check_positive, check_tensor, refuse
from .base import Map

__all__ = ["Affine", "Shift"]


@dataclass(frozen=True)
class Shift(Map):
    """``x -> x + h``, of numbers of any kind: with h of another dtype, what PyTorch makes of their sum."""

    volume_preserving = True
    parameters = 1

    def check_value(self, owner: object, argument: str, x: Any) -> None:
        check_tensor(owner, argument, x)
        if x.dtype is torch.bool:
            refuse(owner, argument, "be numbers", x.dtype, TypeError)

    def parts(self, h: Tensor, like: Like, dim: int) -> tuple[Tensor]:
        return (h,)

    def move(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h

    def undo(self, y: Tensor, h: Tensor) -> Tensor:
        return y - h

    def move_(self, x: Tensor, h: Tensor) -> Tensor:
        return x.add_(h)

    def undo_(self, y: Tensor, h: Tensor) -> Tensor:
        return y.sub_(h)


@dataclass(frozen=True)
class Affine(Map):
    """``x -> x exp(s) + t`` with ``(h, t)`` the parameters and ``s`` a bounded function of ``h``.

    Args:
        scale: how ``s`` follows from ``h``, with ``a = max_log_scale``. ``'tanh'``: ``a tanh(0.1 h / a)``;
            ``'softclip'``: ``(2 a / pi) arctan(h / a)``; ``'sigmoid'``: ``exp(s) = 0.1 + 0.9 sigmoid(h + 2)``;
            ``'unit'``: ``exp(s) = (1 + sigmoid(h)) / 2``; ``'exp'``: ``s = h``; a function: ``s = scale(h)``.
        max_log_scale: the bound ``a`` of ``'tanh'`` and ``'softclip'``.
        centred: subtract the mean of ``s`` over each sample, so that volumes are kept.
    """

    scale: str | Callable[[Tensor], Tensor] = "tanh"
    max_log_scale: float = 2.0
    centred: bool = False

    parameters = 2

    @property
    def volume_preserving(self) -> bool:  # type: ignore[override]
        return self.centred

    def check(self, owner: object) -> None:
        if not callable(self.scale):
            check_choice(owner, "scale", self.scale, _LOG_SCALES)
        check_positive(owner, "max_log_scale", self.max_log_scale)

    def parts(self, h: Tensor, like: Like, dim: int) -> tuple[Tensor, Tensor]:
        # In float32 at least: under autocast, exp(s) and exp(-s) in bfloat16 would not undo each other.
        raw, shift = h.to(torch.promote_types(like.dtype, torch.float32)).chunk(2, dim)
        log_scale = self.scale(raw) if callable(self.scale) else _LOG_SCALES[self.scale](raw, self.max_log_scale)
        if self.centred:
            log_scale = log_scale - log_scale.mean(tuple(range(1, log_scale.ndim)), keepdim=True)
        return log_scale, shift

    def move(self, x: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:
        return (x * log_scale.exp() + shift).to(x.dtype)

    def undo(self, y: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:
        return ((y - shift) * (-log_scale).exp()).to(y.dtype)

    def move_(self, x: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:
        same = x.dtype == shift.dtype
        return x.mul_(log_scale.exp()).add_(shift) if same else self.move(x, log_scale, shift)

    def undo_(self, y: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:
        same = y.dtype == shift.dtype
        return y.sub_(shift).mul_((-log_scale).exp()) if same else self.undo(y, log_scale, shift)

    def log_slope(self, x: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:
        return log_scale.expand_as(x)


_LOG_SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "tanh": lambda h, a: a * torch.tanh(h * (0.1 / a)),
    "softclip": lambda h, a: a * (2 / math.pi) * torch.atan(h / a),
    "sigmoid": lambda h, _: torch.log(0.1 + 0.9 * torch.sigmoid(h + 2)),
    "unit": lambda h, _: torch.log1p(torch.sigmoid(h)) - math.log(2),
    "exp": lambda h, _: h,
}
