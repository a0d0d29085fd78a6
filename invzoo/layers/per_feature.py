"""Layers that move each value by a curve whose parameters are learned for its feature, or given by a condition."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import SideNames, Tape
from ..log_dets import sum_per_sample
from ._checks import check_features, check_like, check_positive_int, refuse
from .curves import Curve
from .elementwise import Elementwise, check_real
from .matrix import widen

__all__ = ["Conditioner", "PerFeature"]

Conditioner = Callable[[Any], Tensor]


class PerFeature(Elementwise):
    """Each value moves by a curve whose parameters are its feature's own, plus those of its sample. Abstract.

    Args:
        curve: how a value moves by its parameters.
        features: size of dim ``dim``.
        dim: the dim of the features.
        conditioner: makes of ``context`` what is added to the layer's own parameters: (B, n * features), or of the dims
            of ``x`` with n * features in ``dim``, n parameters a feature, those of one kind side by side.
        factory: ``device`` and ``dtype`` of the layer's own parameters.
        options: those of :class:`InvertibleModule`.
    """

    features: int
    dim: int
    weight: nn.Parameter
    conditioner: Conditioner | None

    def __init__(
        self,
        curve: Curve,
        features: int,
        dim: int,
        conditioner: Conditioner | None,
        factory: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_positive_int(self, "features", features)
        curve.check(self)
        if not (conditioner is None or callable(conditioner)):
            refuse(self, "conditioner", "be a module or a function", type(conditioner).__name__, TypeError)
        self.curve, self.features, self.dim = curve, features, dim
        self.weight = nn.Parameter(torch.empty(curve.parameters, features, **factory))
        self.conditioner = conditioner
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.curve.reset(self.weight)

    def side_names(self) -> SideNames:
        return SideNames(frozenset(() if self.conditioner is None else ("context",)), False)

    def function(self, x: Tensor, context: Any = None) -> Tensor:
        self._check("x", x)
        return self.curve.forward(x, self._parameters_of(x, context), self.dim)

    def inverse(self, y: Tensor, context: Any = None) -> Tensor:
        self._check("y", y)
        return self.curve.inverse(y, self._parameters_of(y, context), self.dim)

    def log_slope(self, x: Tensor, context: Any = None) -> Tensor:
        check_features(self, "x", x, self.dim, self.features)
        return self.curve.log_slope(x, self._parameters_of(x, context), self.dim)

    def function_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        h = self._parameters_of(x, context)
        return self.curve.forward(x, h, self.dim), sum_per_sample(self, self.curve.log_slope(x, h, self.dim))

    def replay(self, tape: Tape, *outputs: Tensor, **side: Any) -> None:
        """Run the conditioner once for both directions."""
        (y,) = outputs
        h = tape.run(self._parameters_of, y, side.get("context"))
        tape.run(self.curve.forward, tape.input(0, self.curve.inverse(y, h, self.dim)), h, self.dim)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}"

    def _check(self, argument: str, x: Tensor) -> None:
        check_real(self, argument, x)
        check_like(self, argument, x, self.weight)
        check_features(self, argument, x, self.dim, self.features)
        if self.dim % x.ndim == 0:
            refuse(self, argument, f"have a batch dim before dim {self.dim}", f"shape {tuple(x.shape)}")

    def _parameters_of(self, x: Tensor, context: Any) -> Tensor:
        """Return the parameters of the curve: n * features in the dim of the features, broadcast in others."""
        own = _spread(widen(self.weight).flatten()[None], x, self.dim)
        if self.conditioner is None:
            if context is not None:
                refuse(self, "context", "be None without a conditioner", type(context).__name__, TypeError)
            return own
        if context is None:
            refuse(self, "context", "be given, for the conditioner", None, TypeError)
        return own + self._given(x, widen(self.conditioner(context)))

    def _given(self, x: Tensor, h: Tensor) -> Tensor:
        h = _spread(h, x, self.dim) if h.ndim == 2 else h
        if h.ndim != x.ndim or h.shape[self.dim] != self.weight.numel():
            refuse(self, "conditioner", f"give (B, {self.weight.numel()}), or that in dim {self.dim}", tuple(h.shape))
        return h


def _spread(h: Tensor, x: Tensor, dim: int) -> Tensor:
    """(B, n) -> (B, 1, ..., n, ..., 1), with n in ``dim`` of ``x``."""
    return h.reshape(len(h), *(h.shape[1] if i == dim % x.ndim else 1 for i in range(1, x.ndim)))
