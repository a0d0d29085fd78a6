"""Maps of each value by parameters of its own: what couplings, conditioned and autoregressive layers have in common.

A map knows no layer. Its parameters ``h`` come stacked along ``dim``, as many blocks as the map has parameters, each of
the shape of ``x`` (or broadcast to it). Who gives them, another half, a condition, an autoregressive net or a weight,
is the layer's business.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._checks import check_choice, check_positive

__all__ = ["Affine", "Map", "Shift"]


class Map(ABC):
    """A monotone map of each value, with its inverse and the logarithm of its slope. Abstract."""

    volume_preserving: ClassVar[bool] = False
    takes_complex: ClassVar[bool] = False
    records: ClassVar[bool] = True  # whether autograd saves anything of `forward`

    @property
    @abstractmethod
    def parameters(self) -> int:
        """How many parameters each value has."""

    @abstractmethod
    def forward(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        """Map ``x``."""

    @abstractmethod
    def inverse(self, y: Tensor, h: Tensor, dim: int) -> Tensor:
        """Undo :meth:`forward`."""

    @abstractmethod
    def log_slope(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        """Compute the logarithm of the derivative at ``x``, of the shape of ``x``, in at least float32."""

    def forward_and_log_slope(self, x: Tensor, h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Compute both; override it where they share work."""
        return self.forward(x, h, dim), self.log_slope(x, h, dim)

    def forward_(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        """As :meth:`forward`, in the memory of ``x`` if that saves any."""
        return self.forward(x, h, dim)

    def inverse_(self, y: Tensor, h: Tensor, dim: int) -> Tensor:
        """As :meth:`inverse`, in the memory of ``y`` if that saves any."""
        return self.inverse(y, h, dim)

    @abstractmethod
    def check(self, owner: object) -> None:
        """Raise if the options make no map; ``owner`` is the layer that has them."""

    def reset(self, weight: Tensor) -> None:
        """Write the parameters of the start, (parameters, features), into ``weight``."""
        weight.zero_()


@dataclass(frozen=True)
class Shift(Map):
    """``x -> x + h``."""

    volume_preserving = True
    takes_complex = True
    records = False
    parameters = 1

    def check(self, owner: object) -> None:
        """Nothing can be wrong."""

    def forward(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        return x + h

    def inverse(self, y: Tensor, h: Tensor, dim: int) -> Tensor:
        return y - h

    def forward_(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        return x.add_(h)

    def inverse_(self, y: Tensor, h: Tensor, dim: int) -> Tensor:
        return y.sub_(h)

    def log_slope(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Affine(Map):
    """``x -> x exp(s) + t`` with ``(h, t)`` the parameters and ``s`` a bounded function of ``h``.

    Args:
        scale: how ``s`` follows from ``h``, with ``a = max_log_scale``. ``'tanh'``: ``a tanh(0.1 h / a)``;
            ``'softclip'``: ``(2 a / pi) arctan(h / a)``; ``'sigmoid'``: ``exp(s) = 0.1 + 0.9 sigmoid(h + 2)``;
            ``'unit'``: ``exp(s) = (1 + sigmoid(h)) / 2``; ``'exp'``: ``s = h``.
        max_log_scale: the bound ``a`` of ``'tanh'`` and ``'softclip'``.
        centred: subtract the mean of ``s`` over each sample, so that volumes are kept.
    """

    scale: str = "tanh"
    max_log_scale: float = 2.0
    centred: bool = False

    parameters = 2

    @property
    def volume_preserving(self) -> bool:  # type: ignore[override]
        return self.centred

    def check(self, owner: object) -> None:
        check_choice(owner, "scale", self.scale, _LOG_SCALES)
        check_positive(owner, "max_log_scale", self.max_log_scale)

    def forward(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        log_scale, shift = self._parts(x, h, dim)
        return (x * log_scale.exp() + shift).to(x.dtype)

    def inverse(self, y: Tensor, h: Tensor, dim: int) -> Tensor:
        log_scale, shift = self._parts(y, h, dim)
        return ((y - shift) * (-log_scale).exp()).to(y.dtype)

    def forward_(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        log_scale, shift = self._parts(x, h, dim)
        return self.forward(x, h, dim) if x.dtype != shift.dtype else x.mul_(log_scale.exp()).add_(shift)

    def inverse_(self, y: Tensor, h: Tensor, dim: int) -> Tensor:
        log_scale, shift = self._parts(y, h, dim)
        return self.inverse(y, h, dim) if y.dtype != shift.dtype else y.sub_(shift).mul_((-log_scale).exp())

    def log_slope(self, x: Tensor, h: Tensor, dim: int) -> Tensor:
        return self._parts(x, h, dim)[0].expand_as(x)

    def forward_and_log_slope(self, x: Tensor, h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._parts(x, h, dim)
        return (x * log_scale.exp() + shift).to(x.dtype), log_scale.expand_as(x)

    def _parts(self, x: Tensor, h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        # In float32 at least: under autocast, exp(s) and exp(-s) in bfloat16 would not undo each other.
        raw, shift = h.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim)
        log_scale = _LOG_SCALES[self.scale](raw, self.max_log_scale)
        if self.centred:
            log_scale = log_scale - log_scale.mean(tuple(range(1, log_scale.ndim)), keepdim=True)
        return log_scale, shift


_LOG_SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "tanh": lambda h, a: a * torch.tanh(h * (0.1 / a)),
    "softclip": lambda h, a: a * (2 / math.pi) * torch.atan(h / a),
    "sigmoid": lambda h, _: torch.log(0.1 + 0.9 * torch.sigmoid(h + 2)),
    "unit": lambda h, _: torch.log1p(torch.sigmoid(h)) - math.log(2),
    "exp": lambda h, _: h,
}
