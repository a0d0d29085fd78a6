"""What can be read off a callable: the modules behind it, and the keyword arguments that it takes."""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["SideNames", "modules_of"]


def modules_of(*callables: Callable[..., Any] | None) -> list[nn.Module]:
    """Find the modules that functions are, are bound to, or close over; lists and dicts of modules count too."""
    if len(callables) == 1 and isinstance(callables[0], nn.Module):
        return [callables[0]]
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
        else:
            todo += _behind(value)
    return list(found.values())


def _behind(value: Any) -> list[Any]:
    """Return what a function or a collection leads to."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__, *_attributes(value.__self__)]
    if inspect.isfunction(value):
        around = inspect.getclosurevars(value)
        globals_ = [v for v in around.globals.values() if isinstance(v, nn.Module)]
        return [*around.nonlocals.values(), *(value.__defaults__ or ()), *globals_]
    if isinstance(value, list | tuple | dict):
        return [*value.values()] if isinstance(value, dict) else [*value]
    return _attributes(value) if callable(value) else []


def _attributes(value: Any) -> list[Any]:
    """Return the modules, and the lists and dicts of them perhaps, that a plain object has."""
    attributes = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    return [v for v in attributes.values() if isinstance(v, nn.Module | list | tuple | dict)]


class SideNames(NamedTuple):
    """The side inputs that a layer takes: their names, and whether it takes any other as well."""

    names: frozenset[str]
    any: bool

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "SideNames":
        """Read them from the signature of a function or of a module's ``forward``."""
        function = function.forward if isinstance(function, nn.Module) else function
        function = getattr(function, "__func__", function)
        if torch.compiler.is_compiling():  # and reads along, once
            return _side_names(function)
        try:
            known = _known.get(function) or _known.setdefault(function, _side_names(function))
        except TypeError:  # it cannot be referred to weakly
            known = _side_names(function)
        return known

    @classmethod
    def union(cls, parts: Iterable["SideNames"]) -> "SideNames":
        parts = [*parts]
        return cls(frozenset().union(*(p.names for p in parts)), any(p.any for p in parts))

    def choose(self, side: dict[str, Any]) -> dict[str, Any]:
        """Return the side inputs among ``side``."""
        return side if self.any else {k: v for k, v in side.items() if k in self.names}

    def check(self, owner: nn.Module, side: dict[str, Any]) -> None:
        """Raise if one of ``side`` is none that ``owner`` takes."""
        if side and not self.any and (unknown := side.keys() - self.names):
            raise TypeError(
                f"{type(owner).__name__}: Expected side inputs among {sorted(self.names)}; got {sorted(unknown)}"
            )


_known: weakref.WeakKeyDictionary[Callable[..., Any], SideNames] = weakref.WeakKeyDictionary()


def _side_names(function: Callable[..., Any]) -> SideNames:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return SideNames(frozenset(), True)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return SideNames(frozenset(named - {"self"}), any(p.kind is p.VAR_KEYWORD for p in parameters))
