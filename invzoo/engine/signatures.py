"""What can be read off a callable: the modules behind it, and the keyword arguments that it takes."""

import contextlib
import functools
import gc
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["SideNames", "modules_of", "unregistered"]


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
        owner = value.__self__
        return [owner, value.__func__, *(() if isinstance(owner, nn.Module) else _attributes(owner))]
    if inspect.isfunction(value):
        if value.__module__ == "torch.nn.functional":
            return []
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*_enclosed(value), *defaults, *_globals(value)]
    if isinstance(value, list | tuple | dict):
        return [*value.values()] if isinstance(value, dict) else [*value]
    return _attributes(value) if callable(value) else []


def _enclosed(function: FunctionType) -> Iterator[Any]:
    """Yield what a function closes over."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that nothing was put into
            yield cell.cell_contents


def _globals(function: FunctionType) -> list[Any]:
    """Return the global modules that a function names, and the functions beside it, which may name others."""
    names: list[str] = []
    codes = [function.__code__]
    for code in codes:
        names += code.co_names
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    found = [function.__globals__.get(name) for name in names]
    return [v for v in found if isinstance(v, nn.Module) or _is_beside(v, function)]


def _is_beside(value: Any, function: FunctionType) -> bool:
    """Whether it is a function of the same file."""
    return isinstance(value, FunctionType) and value.__globals__ is function.__globals__


def _attributes(value: Any) -> list[Any]:
    """Return the modules, and the lists and dicts of them perhaps, that a plain object has."""
    attributes = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    return [v for v in attributes.values() if isinstance(v, nn.Module | list | tuple | dict)]


def unregistered(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those with weights to train that no optimizer would find.

    Who holds a module cannot be asked; but those that hold a layer, and are called, stand on the stack above it, or
    behind its functions. Where none of them holds it, all objects are looked through, once.
    """
    holders: dict[int, nn.Module] = {}
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        # Of these alone, which do not outlast their call: to look at its variables makes a frame keep what they are.
        ours = code.co_varnames[:1] == ("self",) and frame.f_globals.get("__name__", "").startswith(_PACKAGE)
        if ours or code is _CALL:
            holder = frame.f_locals.get("self")
            if isinstance(holder, nn.Module):
                holders[id(holder)] = holder
        frame = frame.f_back
    modules = [*modules]
    above = [module for module in modules if any(id(m) in holders for m in module.modules())]
    held = {id(p) for holder in (*holders.values(), *above) for p in holder.parameters()}
    strangers = [m for m in modules if any(p.requires_grad and id(p) not in held for p in m.parameters())]
    return _without_owner(strangers) if strangers else []


def _without_owner(modules: list[nn.Module]) -> list[nn.Module]:
    """Return those that no other module has registered, and whose parameters no optimizer has."""
    everything = gc.get_objects()
    registered = {id(m) for o in everything if _is_a(o, nn.Module) for m in vars(o).get("_modules", {}).values()}
    groups = [g for o in everything if _is_a(o, torch.optim.Optimizer) for g in vars(o).get("param_groups", ())]
    optimized = {id(p) for group in groups for p in group["params"]}
    modules = [m for m in modules if id(m) not in registered]
    return [m for m in modules if any(p.requires_grad and id(p) not in optimized for p in m.parameters())]


def _is_a(value: Any, kind: type) -> bool:
    return issubclass(type(value), kind)  # unlike isinstance, asks no proxy what it pretends to be


_CALL = nn.Module._call_impl.__code__
_PACKAGE = __name__.split(".")[0] + "."


class SideNames(NamedTuple):
    """The side inputs that a layer takes: their names, and whether it takes any other as well.

    What is first by position is no side input. ``inputs`` is how many a function takes by position, at most.
    """

    names: frozenset[str]
    any: bool
    inputs: float = math.inf

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "SideNames":
        """Read them from the signature of a function or of a module's ``forward``."""
        function = function.forward if isinstance(function, nn.Module) else function
        method = getattr(function, "__func__", None)
        function, bound = (function, 0) if method is None else (method, 1)
        if torch.compiler.is_compiling():  # and reads along, once
            return _side_names(function, bound)
        try:
            known = _known.get(function) or _known.setdefault(function, _side_names(function, bound))
        except TypeError:  # it cannot be referred to weakly
            known = _side_names(function, bound)
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
            plain = any(type(m).forward is nn.Sequential.forward for m in owner.modules())
            hint = ". An nn.Sequential passes none on: write a module whose forward takes them" if plain else ""
            raise TypeError(
                f"{type(owner).__name__}: Expected side inputs among {sorted(self.names)}; got {sorted(unknown)}{hint}"
            )


_known: weakref.WeakKeyDictionary[Callable[..., Any], SideNames] = weakref.WeakKeyDictionary()


def _side_names(function: Callable[..., Any], bound: int) -> SideNames:
    """Read a signature; ``bound`` is 1 for a method, which gets its object first."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return SideNames(frozenset(), True)
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][bound:]
    named = [p for p in by_position[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    named += [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return SideNames(
        frozenset(p.name for p in named),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
        math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(by_position),
    )
