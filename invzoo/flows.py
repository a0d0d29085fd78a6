"""Normalizing flows: invertible modules as transforms of `torch.distributions`."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import product, zip_longest
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Transform

from .domains import of_events
from .engine._torch import stamps
from .engine.fingerprint import fingerprint
from .engine.surroundings.buffers import loose_tensors
from .errors import refuse
from .module import InvertibleModule
from .shapes import output_shapes, reached, tensors_in

__all__ = ["as_transform"]


def as_transform(
    layer: InvertibleModule, event_dim: int | tuple[int, int] = 1, *, cache_size: int = 0, **side: Any
) -> Transform:
    """Return a layer as a `torch.distributions.Transform`, both of whose directions save memory as the layer does.

    With it a flow is a `TransformedDistribution`, whose ``log_prob`` and ``rsample`` can be trained through. Densities
    are evaluated by the inverse, ``x = layer.inverse(y)``; give ``layer.inv`` where the layer maps data to noise.

    Args:
        layer: an invertible module that takes and returns one tensor and has a log-determinant.
        event_dim: how many of the last dims make up one sample, those before them being batch dims; two numbers if an
            output has more or fewer of them than an input.
        cache_size: 1 to keep the latest value and what it was mapped to, as transforms of `torch.distributions` do, so
            that the density of a sample takes no inverse. What is kept does not notice that parameters have moved.
        side: side inputs for every call, conditions say. Their batch dims come first, and are or are broadcast to the
            last batch dims of the samples; they may have none.

    Raises:
        TypeError: for a layer that is not an invertible module, or is a surjection; in use, for one that has no
            log-determinant.
        ValueError: for fewer than one event dim, or fewer than a constraint on the layer's values takes together; in
            use, for side inputs whose dims do not fit those of the samples.

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
    for dims, domain in zip(event_dims, (layer.domain, layer.codomain), strict=True):
        if isinstance(domain, tuple):
            expected = "take and return one tensor"
            refuse("as_transform", "layer", expected, f"{type(layer).__name__}, with {len(domain)}", TypeError)
        if dims < domain.event_dim:
            refuse("as_transform", "event_dim", f"be at least {domain.event_dim}, as that of {domain}", dims)
    return _LayerTransform(layer, event_dims, side, cache_size)


class _Latest(NamedTuple):
    """The log-determinant of an inverse, and what it holds for."""

    x: weakref.ref[Tensor]
    log_det: Callable[[], Tensor | None]
    circumstances: Any


class _Same(list[Tensor]):
    """Tensors that are equal to these very ones alone."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and len(self) == len(other) and all(map(is_, self, other))


class _LayerTransform(Transform):
    bijective = True

    def __init__(
        self, layer: InvertibleModule, event_dims: tuple[int, int], side: dict[str, Any], cache_size: int
    ) -> None:
        super().__init__(cache_size)
        self.layer, self.event_dims, self.side = layer, event_dims, side
        self._latest: _Latest | None = None  # a density asks for the log-determinant right after the inverse

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() | {"_latest": None}
        return state | {"_cached_x_y": (None, None)} if self._cache_size else state

    def with_cache(self, cache_size: int = 1) -> Transform:
        if cache_size == self._cache_size:
            return self
        return _LayerTransform(self.layer, self.event_dims, self.side, cache_size)

    domain = property(lambda self: of_events(self.layer.domain, self.event_dims[0]))
    codomain = property(lambda self: of_events(self.layer.codomain, self.event_dims[1]))

    def _call(self, x: Tensor) -> Tensor:
        batch, inputs, side = self._flat(x, inverted=False)
        y: Tensor = self.layer(inputs, **side)
        return y.reshape(*batch, *y.shape[1:])

    def _inverse(self, y: Tensor) -> Tensor:
        batch, outputs, side = self._flat(y, inverted=True)
        x, log_det = self.layer.inverse_and_log_det(outputs, **side)
        x = x.reshape(*batch, *x.shape[1:])
        self._remember(x, -log_det.reshape(batch))
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        latest, self._latest = self._latest, None
        if latest is not None and latest.x() is x:
            log_det = latest.log_det()
            if log_det is not None and latest.circumstances == self._circumstances(x):
                return log_det
        batch, inputs, side = self._flat(x, inverted=False)
        return self.layer.forward_and_log_det(inputs, **side)[1].reshape(batch)

    def _remember(self, x: Tensor, log_det: Tensor) -> None:
        """Keep a log-determinant for as long as x lives; that is a view of its own, which no graph of log_det holds."""
        circumstances = self._circumstances(x)
        if torch.compiler.is_compiling():  # references last as long as what is traced, which is enough
            self._latest = _Latest(weakref.ref(x), weakref.ref(log_det), circumstances)
            return
        this = weakref.ref(self)

        def forget(reference: Any) -> None:
            transform = this()
            if transform is not None and transform._latest is not None and transform._latest.x is reference:
                transform._latest = None

        self._latest = _Latest(weakref.ref(x, forget), lambda: log_det, circumstances)

    def _circumstances(self, x: Tensor) -> tuple[Any, ...]:
        """Return what a log-determinant depends on besides values, equal as long as nothing of it has changed."""
        if torch.compiler.is_compiling():
            return (torch.is_grad_enabled(),)
        modules = reached(self.layer)
        state = _Same(tensors_in(self.side))
        for module in modules:
            for table in (module._parameters, module._buffers, loose_tensors(module)):
                state += [tensor for tensor in table.values() if tensor is not None]
        unversioned = [fingerprint(tensor) for tensor in (x, *state) if tensor.is_inference()]
        flags = [module.training for module in modules]
        return torch.is_grad_enabled(), flags, state, stamps([x, *state]), unversioned

    def _split(self, shape: Sequence[int], event_dim: int) -> tuple[Size, Size]:
        """Return the batch shape and the event shape."""
        if len(shape) < event_dim:
            refuse("as_transform", "value", f"have at least {event_dim} dims", f"shape {tuple(shape)}")
        return Size(shape[: len(shape) - event_dim]), Size(shape[len(shape) - event_dim :])

    def _flat(self, value: Tensor, *, inverted: bool) -> tuple[Size, Tensor, dict[str, Any]]:
        """Return the batch shape, and the value and the side inputs with one batch dim for all."""
        batch, event = self._split(value.shape, self.event_dims[inverted])
        dims = self._batch_dims(batch, event, inverted=inverted)
        batch = self._broadcast(batch, dims) or batch
        side = {name: _expanded(x, dims[name], batch) if name in dims else x for name, x in self.side.items()}
        return batch, _expanded(value, value.ndim - len(event), batch), side

    def _batch_dims(self, batch: Size, event: Size, *, inverted: bool) -> dict[str, int]:
        """Return how many of its dims are batch dims, of each side input that has any dims.

        What the shapes leave open the layer decides: those that it can be run with are right.
        """
        sides = {name: x.shape for name, x in self.side.items() if isinstance(x, Tensor) and x.ndim}
        choices = [dict(zip(sides, ns, strict=True)) for ns in product(*(_fits(s, batch) for s in sides.values()))]
        choices = [dims for dims in choices if self._broadcast(batch, dims) is not None]
        likely = next((dims for dims in choices if all(dims.values()) and self._broadcast(batch, dims) == batch), None)
        if likely is not None and (len(choices) == 1 or torch.compiler.is_compiling()):
            return likely
        taken = next((dims for dims in choices if self._takes(event, dims, inverted=inverted)), likely)
        if taken is None:
            expected = f"have batch dims that broadcast with those of the samples, {tuple(batch)}"
            got = ", ".join(f"shape {tuple(shape)}" for shape in sides.values())
            refuse("as_transform", " and ".join(sides), expected, got)
        return taken

    def _broadcast(self, batch: Size, dims: dict[str, int]) -> Size | None:
        """Broadcast the batch dims of samples and of side inputs; None where they do not fit."""
        return _broadcast(batch, *(_without_ones(self.side[name].shape[:n], len(batch)) for name, n in dims.items()))

    def _takes(self, event: Size, dims: dict[str, int], *, inverted: bool) -> bool:
        known, key, _ = self._entry(event, dims, inverted=inverted)
        if key not in known:
            known[key] = None  # unless it can be run
            with suppress(Exception):
                self._event_shape(event, dims, inverted=inverted)
        shape = known[key]
        return shape is not None and len(shape) == self.event_dims[not inverted]

    def forward_shape(self, shape: Sequence[int]) -> Size:
        return self._shape(shape, inverted=False)

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        return self._shape(shape, inverted=True)

    def _shape(self, shape: Sequence[int], *, inverted: bool) -> Size:
        batch, event = self._split(shape, self.event_dims[inverted])
        return batch + self._event_shape(event, self._batch_dims(batch, event, inverted=inverted), inverted=inverted)

    def _event_shape(self, event: Size, dims: dict[str, int], *, inverted: bool) -> Size:
        """Return the event shape of what comes out, for side inputs with that many batch dims."""
        known, key, side = self._entry(event, dims, inverted=inverted)
        shape = known.get(key)
        if shape is None:
            (y,) = output_shapes(self.layer.inv if inverted else self.layer, (1, *event), side)
            shape = known[key] = y[1:]
        return shape

    def _entry(self, event: Size, dims: dict[str, int], *, inverted: bool) -> tuple[dict[Any, Any], Any, Any]:
        """Return the shapes known of the layer, the key of those that are asked for, and the side inputs of a sample.

        A distribution asks whenever it is made, which may be on every step.
        """
        side = {name: _first(x, dims[name]) if name in dims else x for name, x in self.side.items()}
        given = tuple((k, x.shape if isinstance(x, Tensor) else repr(x)) for k, x in side.items())
        key = (inverted, event, given, tuple(map(id, self.layer.modules())))
        return _shapes.setdefault(self.layer, {}), key, side


def _fits(shape: Size, batch: Size) -> list[int]:
    """Return how many dims of a side input may be batch dims, given those of the samples; the likeliest number first.

    It may have none. Samples that lack its batch dims are broadcast, but only where it fits in no other way.
    """
    results = {n: _broadcast(batch, _without_ones(shape[:n], len(batch))) for n in range(1, len(shape) + 1)}
    inside = [n for n, result in results.items() if result == batch]
    beyond = [n for n, result in results.items() if result not in (batch, None)]
    return inside if inside and len(shape) > 1 else [*inside, *beyond, 0]


def _without_ones(batch: Size, n: int) -> Size:
    """Leave out the first ones of more than ``n`` batch dims, which add none."""
    while len(batch) > n and batch[0] == 1:
        batch = batch[1:]
    return batch


def _broadcast(*batches: Size) -> Size | None:
    sizes = [[n for n in ns if n != 1] or [1] for ns in zip_longest(*map(reversed, batches), fillvalue=1)]
    if any(n != ns[0] for ns in sizes for n in ns):
        return None
    return Size(ns[0] for ns in reversed(sizes))


def _first(value: Tensor, n: int) -> Tensor:
    """Return the first of a batch with ``n`` dims."""
    return value[(slice(1),) * n].reshape(-1, *value.shape[n:])


def _expanded(value: Tensor, n: int, batch: Size) -> Tensor:
    """Broadcast the first ``n`` dims, which are batch dims, and make one of them."""
    value, event = value.reshape(_without_ones(value.shape[:n], len(batch)) + value.shape[n:]), value.shape[n:]
    return value.expand(*batch, *event).reshape(batch.numel(), *event)


_shapes: weakref.WeakKeyDictionary[InvertibleModule, dict[Any, Size | None]] = weakref.WeakKeyDictionary()
