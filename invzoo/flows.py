"""Normalizing flows: invertible modules as transforms of `torch.distributions`."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor
from torch.distributions import Transform, constraints

from .errors import refuse
from .module import InvertibleModule
from .shapes import output_shapes

__all__ = ["as_transform"]


def as_transform(layer: InvertibleModule, event_dim: int | tuple[int, int] = 1, **side: Any) -> Transform:
    """Return a layer as a `torch.distributions.Transform`, both of whose directions save memory as the layer does.

    With it a flow is a `TransformedDistribution`, whose ``log_prob`` and ``rsample`` can be trained through. Densities
    are evaluated by the inverse, ``x = layer.inverse(y)``; give ``layer.inv`` where the layer maps data to noise.

    Args:
        layer: an invertible module that takes and returns one tensor and has a log-determinant.
        event_dim: how many of the last dims make up one sample, those before them being batch dims; two numbers if an
            output has more or fewer of them than an input.
        side: side inputs for every call, conditions say; batched like the samples, or broadcast over them.

    Raises:
        TypeError: for a layer that is not an invertible module; in use, for one that has no log-determinant.
        ValueError: for fewer than one event dim.

    Example:
        >>> flow = iz.InvertibleSequential(iz.AffineCoupling(nn.Linear(2, 4)), iz.InvertibleLinear(4, kind="scaled"))
        >>> base = torch.distributions.MultivariateNormal(torch.zeros(4), torch.eye(4))
        >>> density = torch.distributions.TransformedDistribution(base, [iz.as_transform(flow)])
        >>> density.log_prob(density.sample((5,))).shape
        torch.Size([5])
    """
    if not isinstance(layer, InvertibleModule):
        refuse("as_transform", "layer", "be an InvertibleModule", type(layer).__name__, TypeError)
    if not layer.bijective:
        refuse("as_transform", "layer", "be a bijection", f"a surjection, {type(layer).__name__}", TypeError)
    event_dims = (event_dim, event_dim) if isinstance(event_dim, int) else tuple(event_dim)
    if len(event_dims) != 2 or min(event_dims) < 1:
        refuse("as_transform", "event_dim", "be at least 1, or two such numbers", event_dim)
    return _LayerTransform(layer, event_dims, side)


class _LayerTransform(Transform):
    bijective = True

    def __init__(self, layer: InvertibleModule, event_dims: tuple[int, int], side: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.event_dims, self.side = layer, event_dims, side
        # The latest inverse and its log-determinant: a density asks for the one right after the other.
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.layer.domain, self.event_dims[0])

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.layer.codomain, self.event_dims[1])

    def _call(self, x: Tensor) -> Tensor:
        batch, event = self._split(x.shape, self.event_dims[0])
        y: Tensor = self.layer(x.reshape(-1, *event), **self._side(batch))
        return y.reshape(*batch, *y.shape[1:])

    def _inverse(self, y: Tensor) -> Tensor:
        batch, event = self._split(y.shape, self.event_dims[1])
        x, log_det = self.layer.inverse_and_log_det(y.reshape(-1, *event), **self._side(batch))
        x = x.reshape(*batch, *x.shape[1:])
        self._latest = x, y, -log_det.reshape(batch)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        latest, self._latest = self._latest, None
        if latest is not None and latest[0] is x and latest[1] is y:
            return latest[2]
        batch, event = self._split(x.shape, self.event_dims[0])
        return self.layer.forward_and_log_det(x.reshape(-1, *event), **self._side(batch))[1].reshape(batch)

    def _split(self, shape: Sequence[int], event_dim: int) -> tuple[Size, Size]:
        """Return the batch shape and the event shape."""
        if len(shape) < event_dim:
            refuse("as_transform", "value", f"have at least {event_dim} dims", f"shape {tuple(shape)}")
        return Size(shape[: len(shape) - event_dim]), Size(shape[len(shape) - event_dim :])

    def _side(self, batch: Size) -> dict[str, Any]:
        """Repeat the side inputs over those batch dims of the samples that they lack."""
        return {name: self._repeated(value, batch) for name, value in self.side.items()}

    def _repeated(self, value: Any, batch: Size) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.expand(*batch, *value.shape[1:]).flatten(0, len(batch) - 1) if batch else value

    def forward_shape(self, shape: Sequence[int]) -> Size:
        return self._shape(shape, inverted=False)

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        return self._shape(shape, inverted=True)

    def _shape(self, shape: Sequence[int], *, inverted: bool) -> Size:
        batch, event = self._split(shape, self.event_dims[inverted])
        side = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in self.side.items()}
        # A distribution asks for the shapes whenever it is made, which may be on every step.
        given = tuple((k, v.shape if isinstance(v, Tensor) else repr(v)) for k, v in side.items())
        known = _shapes.setdefault(self.layer, {})
        key = inverted, event, given, sum(1 for _ in self.layer.modules())
        if key not in known:
            (known[key],) = output_shapes(self.layer.inv if inverted else self.layer, (1, *event), side)
        return Size((*batch, *known[key][1:]))


_shapes: weakref.WeakKeyDictionary[InvertibleModule, dict[Any, Size]] = weakref.WeakKeyDictionary()
