"""Layers that move each value by a map whose parameters are weights, or functions of a condition."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..dtypes import widen
from ..protocol import Like
from ._checks import check_dim, check_features, check_like, check_positive_int, given_dim, parameter_of, refuse
from .conditioned import Conditioned, Conditioner
from .maps.base import Map, by_map

__all__ = ["ElementwiseMap", "PerFeatureMap", "per_feature"]


def per_feature(values: Tensor, x: Like, dim: int) -> Tensor:
    """View values of features, or samples and features, so that they broadcast to ``x`` with features in ``dim``."""
    shape = [*values.shape[:-1], *[1] * (x.ndim - values.ndim + 1)]
    shape[dim] = values.shape[-1]
    return values.reshape(shape)


class ElementwiseMap(Conditioned):
    """``x -> map(x)`` with parameters of the map that the layer finds without looking at values of x. Abstract.

    A subclass says what they are, and of how many features, if it has parameters of its own. They, and a conditioner
    behind them, are evaluated once in a call and once in its replay.

    Args:
        map: how a value moves by its parameters.
        dim: the dim along which the parameters are stacked.
        conditioner: makes parameters of ``context``, (B, n * features) or of the dims of x with n * features in
            ``dim``, n parameters a feature, those of one kind side by side; or None.
        options: those of :class:`InvertibleModule`.
    """

    domain = codomain = property(lambda self: self.map.domain)

    map: Map
    dim: int
    features: int | None = None
    own: ClassVar[str]  # a parameter of a layer that has features

    def __init__(self, map: Map, dim: int | None, conditioner: Conditioner | None, **options: Any) -> None:  # noqa: A002
        super().__init__(**options)
        map.check(self)
        self.set_conditioner(conditioner)
        self.map, self.dim = map, given_dim(self, dim)

    def check_argument(self, argument: str, x: Tensor) -> None:
        self.map.check_value(self, argument, x)
        if self.features is not None:
            check_like(self, argument, x, parameter_of(self, self.own))
            check_features(self, argument, x, self.dim, self.features)
        else:
            check_dim(self, argument, x, self.dim)

    @abstractmethod
    def map_parameters(self, like: Like, context: Any = None) -> Tensor:
        """Return the parameters stacked along ``dim``; their other dims are those of ``like``, or broadcast to them."""

    widens, seen, move, undo, undo_at, move_, undo_ = by_map(
        "widens", "seen", "move", "undo", "undo_at", "move_", "undo_"
    )

    def given(self, like: Like, *, context: Any = None) -> tuple[Any, ...]:
        return self.map.parts(self.map_parameters(like, context), like, self.dim)

    def log_slope(self, x: Tensor, *args: Any) -> Tensor:
        if self.dim % x.ndim == 0:
            wanted = f"have a batch dim before dim {self.dim}, for a log-determinant"
            refuse(self, "x", wanted, f"shape {tuple(x.shape)}")
        return self.map.log_slope(x, *args)

    def conditioned(self, own: Tensor, x: Like, context: Any) -> Tensor:
        """Return parameters of the layer, one per feature, plus what the conditioner makes of the context."""
        own, h = per_feature(widen(own), x, self.dim), self.evaluate_conditioner(context)
        return own if h is None else own + self.aligned(h, x)

    def aligned(self, h: Any, x: Like) -> Tensor:
        """Return what the conditioner returned in the dims of ``x`` and in at least float32."""
        shape = [*x.shape]
        shape[self.dim] *= self.map.parameters
        aligned = per_feature(h, x, self.dim) if h.ndim == 2 <= x.ndim else h
        fits = aligned.ndim == x.ndim and aligned.shape[self.dim] == shape[self.dim]
        if not fits or any(m not in (1, n) for m, n in zip(aligned.shape, shape, strict=True)):
            shapes = dict.fromkeys(((shape[0], shape[self.dim]), tuple(shape)))
            refuse(self, "conditioner", f"return shape {' or '.join(map(str, shapes))}", tuple(h.shape))
        if h.is_complex():
            refuse(self, "conditioner", "return real numbers", h.dtype, TypeError)
        return aligned.to(torch.promote_types(x.dtype, torch.float32))


class PerFeatureMap(ElementwiseMap):
    """A map whose parameters are its feature's own, plus those that a conditioner gives. Abstract.

    The weight has a row for each parameter of the map, and a column for each feature.

    Args:
        map: how a value moves by its parameters.
        features: size of dim ``dim``.
        dim: the dim of the features.
        conditioner: as for :class:`ElementwiseMap`.
        factory: ``device`` and ``dtype`` of the weight.
        options: those of :class:`InvertibleModule`.
    """

    features: int
    weight: nn.Parameter
    own = "weight"

    def __init__(
        self,
        map: Map,  # noqa: A002
        features: int,
        dim: int | None,
        conditioner: Conditioner | None,
        factory: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(map, dim, conditioner, **options)
        check_positive_int(self, "features", features)
        self.features = features
        self.weight = nn.Parameter(torch.empty(map.parameters, features, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.map.reset(self.weight)

    def map_parameters(self, like: Like, context: Any = None) -> Tensor:
        return self.conditioned(self.weight.flatten(), like, context)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}, {self.map}"
