"""The modules behind a callable, so that a replay can find their parameters, buffers and flags as they were."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["modules_of"]


def modules_of(*callables: Callable[..., Any] | None) -> list[nn.Module]:
    """Find the modules that functions are, are bound to, or close over; lists and dicts of modules count too."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    todo: list[Any] = [*callables]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            todo += [value.__self__, value.__func__]
        elif inspect.isfunction(value):
            todo += [*inspect.getclosurevars(value).nonlocals.values(), *(value.__defaults__ or ())]
            todo += [v for v in inspect.getclosurevars(value).globals.values() if isinstance(v, nn.Module)]
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
    return list(found.values())
