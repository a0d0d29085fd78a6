"""Tensors inside other values, and what was set on tensors."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["attributes_of", "map_tensors", "plain_parts", "tuple_of"]


def tuple_of(value: Any) -> tuple[Any, ...]:
    """Return several values as they are, and one as a tuple of one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor in nested lists, tuples, dicts and dataclasses, or classes derived of them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [map_tensors(function, v) for v in value]
        if all(part is v for part, v in zip(parts, value, strict=True)):
            return value
        # What operators return that have several outputs takes no other constructor than its own.
        return type(value)(parts) if hasattr(value, "n_sequence_fields") else tuple.__new__(type(value), parts)
    if isinstance(value, dict | list):
        mapped: Any = copy.copy(value)
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            mapped[k] = map_tensors(function, v)
        return mapped
    if is_dataclass(value) and not isinstance(value, type):
        mapped = copy.copy(value)
        for field in fields(value):
            object.__setattr__(mapped, field.name, map_tensors(function, getattr(value, field.name)))
        return mapped
    return value


def plain_parts(tensor: Any) -> list[Tensor]:
    """Return the plain tensors that a tensor wraps, if it says which; else itself."""
    if type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def attributes_of(tensor: Tensor) -> dict[str, Any]:
    """Return what somebody set on a tensor; those of a class that computes in its own way are its own business."""
    plain = type(tensor) is Tensor or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return vars(tensor) if plain else {}
