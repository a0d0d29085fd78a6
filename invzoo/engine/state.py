"""What one thread is doing: the calls that run, and where they stand."""

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks

from ._torch import (
    forward_ad_active,
    functorch_active,
    hooks_enabled,
    top_hook,
    tracing,
    weights_cached,
)

__all__ = [
    "Place",
    "inside_container",
    "note",
    "nothing_saved",
    "place",
    "state",
    "steps_aside",
    "transformed",
    "unrecorded",
]

P = ParamSpec("P")
R = TypeVar("R")
Place = tuple[Any, ...]  # what describes the innermost place, and the place around it


class _State(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.packing: list[Any] = []  # the pack hooks of the calls that run right now
        self.place: Place = ()  # where in its containers the running layer stands, for errors
        self.record: Any = None  # that of the chain that the compiler traces
        self.below = False  # whether a call runs below a transform


state = _State()


def transformed() -> bool:
    """Whether `torch.func` transforms what runs now."""
    return functorch_active() or state.below


def inside_container() -> bool:
    """Whether a container runs its layers right now."""
    return bool(state.place)


class place:  # noqa: N801 - reads as the word that it is, like torch.no_grad
    """Say where the layers that run inside stand: errors, those of their replays too, carry it as a note."""

    __slots__ = ("_before", "_describe", "_entered")

    def __init__(self, describe: Callable[[], str]):
        self._describe = describe

    def __enter__(self) -> None:
        self._entered = state.record is not None or not torch.compiler.is_compiling()  # a compiled backward may not
        if self._entered:
            self._before = state.place
            state.place = (self._describe, self._before)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not torch.compiler.is_compiling():
            note(error, state.place)
        if self._entered:
            state.place = self._before


def note(error: Exception, where: Place) -> None:
    """Say in an error where it comes from, once."""
    parts = []
    while where:
        describe, where = where
        parts.append(describe())
    place = " of ".join(parts)
    if place and not any(known.endswith(place) for known in getattr(error, "__notes__", ())):
        error.add_note(f"in {place}")


def unrecorded(search: Callable[P, R]) -> Callable[P, R]:
    """Run a function without gradients, and past the records of all calls.

    How many steps a search takes depends on values, and those of a replay are others. What its steps save, to take
    derivatives of their own, must therefore not be counted.
    """

    @functools.wraps(search)
    def run(*args: P.args, **options: P.kwargs) -> R:
        with torch.no_grad():
            if not (state.packing and hooks_enabled()):
                return search(*args, **options)
            with saved_tensors_hooks(_same, _same):
                return search(*args, **options)

    return run


def _same(value: Any) -> Any:
    return value


def steps_aside() -> bool:
    """Whether calls made now run as plain functions: nothing to save, or somebody else decides what is saved."""
    return nothing_saved() or functorch_active() or not hooks_enabled()  # the compiler traces the first alone


def nothing_saved() -> bool:
    """Whether they do so for another reason than that hooks are not allowed."""
    return (
        not torch.is_grad_enabled()
        or (bool(state.packing) and top_hook() == state.packing[-1])  # inside another call, and part of it
        or torch.compiler.is_compiling()
        or forward_ad_active()
        or weights_cached()  # what one call computes, others would miss in their replays
        or tracing() is not None
    )
