"""Shapes of a layer's outputs, found by a run that nobody notices."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn.parameter import is_lazy

from .domains import inside
from .engine import map_tensors, tuple_of
from .engine._torch import compiling_nothing, is_hollow
from .engine.surroundings.devices import accelerators
from .engine.surroundings.observers import Observers
from .engine.surroundings.structure import walk
from .module import InvertibleModule

__all__ = ["output_shapes", "reached", "tensors_in"]


def output_shapes(layer: InvertibleModule, shape: Sequence[int], side: dict[str, Any]) -> list[Size]:
    """Return the shapes that the outputs have for an input of ``shape``.

    A run on the meta device says them; where that fails, since a subnet reads values or makes tensors of its own, one
    on zeros, or other values inside the layer's domain. What runs is a copy of the layer in eval mode.
    """
    with suppress(Exception):
        return _run(layer, shape, side, on_meta=True)
    return _run(layer, shape, side, on_meta=False)


@torch.no_grad()
def _run(layer: InvertibleModule, shape: Sequence[int], side: dict[str, Any], *, on_meta: bool) -> list[Size]:
    state = [x for module in reached(layer) for x in tensors_in(vars(module)) if not is_lazy(x)]
    like = next((x for x in (*state, *tensors_in(side)) if x.is_floating_point()), torch.empty(0))
    x = inside(layer.domain, torch.zeros(*shape, dtype=like.dtype, device=like.device))
    if on_meta:
        layer = copy.deepcopy(layer, {id(t): _to_meta(t) for t in state})
        x, side = map_tensors(_to_meta, (x, side))
    else:
        with suppress(Exception):  # what holds a lock, say, cannot be copied
            layer = copy.deepcopy(layer, {id(t): _apart(t) for t in state})
    with _unnoticed(reached(layer), accelerators([like, *state])):
        return [y.shape for y in tuple_of(layer(x, **side))]


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _apart(tensor: Tensor) -> Tensor:
    """Copy what a run may write into; no parameter is, nor what has no memory to copy."""
    return tensor if isinstance(tensor, nn.Parameter) or is_hollow(tensor) else tensor.clone()


def reached(layer: InvertibleModule) -> list[nn.Module]:
    """List the modules that a layer runs, those behind functions that it was given among them."""
    return walk(root for module in layer.modules() if isinstance(module, InvertibleModule) for root in module._roots())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


@contextmanager
def _unnoticed(modules: list[nn.Module], devices: set[torch.device]) -> Iterator[None]:
    """Run modules, which may be the caller's, in eval mode, and leave no traces.

    No random numbers are gone afterwards, no buffer has moved, no attribute is new, and none of the users' hooks ran.
    """
    before = [vars(module).copy() for module in modules]
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng([*devices], device_type=kind), Observers(modules).silenced(), compiling_nothing():
        try:
            for module, table in zip(modules, before, strict=True):
                state = {name: x for name, x in table.items() if name == "_buffers" or not name.startswith("_")}
                vars(module).update(map_tensors(_apart, state), training=False)
            yield
        finally:
            for module, table in zip(modules, before, strict=True):
                vars(module).clear()
                vars(module).update(table)
