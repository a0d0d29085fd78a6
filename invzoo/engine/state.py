"""What one thread is doing: the calls that run, where they stand, and what kept graphs hold for a while."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ._torch import (
    at_end_of_backward,
    backward_id,
    forward_ad_active,
    functorch_active,
    hooks_enabled,
    top_hook,
    tracing,
    weights_cached,
)
from .slots import Slot

if TYPE_CHECKING:
    from .call import Call

__all__ = ["note", "place", "state", "steps_aside"]


class _Kept:
    """What backwards through a kept graph rebuilt and have not dropped yet (rule 4)."""

    def __init__(self) -> None:
        self.task = -1
        self.last: Callable[[], Call | None] = lambda: None
        self.slots: list[Callable[[], Slot | None]] = []

    def begin(self, call: "Call") -> None:
        last, self.last = self.last(), weakref.ref(call)
        # Another thread that has the lock releases the call when it is done with it; waiting could wait for ever.
        if last is not None and last is not call and last.lock.acquire(blocking=False):
            last.release()
            last.lock.release()
        task = backward_id()
        if task not in (-1, self.task):
            self.task = task
            at_end_of_backward(self.end)

    def end(self) -> None:
        if (last := self.last()) is not None:
            with last.lock:
                last.release()
        for ref in self.slots:
            if (slot := ref()) is not None:
                with slot.lock:
                    slot.drop()
        self.slots.clear()


class _State(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.packing: list[Any] = []  # the pack hooks of the calls that run right now
        self.place: list[str] = []  # where in its containers the running layer stands, for errors
        self.kept = _Kept()


state = _State()


@contextlib.contextmanager
def place(name: str) -> Iterator[None]:
    """Say where the layers that run inside stand: errors, those of their replays too, carry it as a note."""
    state.place.append(name)
    try:
        yield
    except Exception as error:
        note(error, state.place)
        raise
    finally:
        state.place.pop()


def note(error: Exception, where: Sequence[str]) -> None:
    """Say in an error where it comes from, once."""
    place = " of ".join(reversed(where))
    if where and not any(known.endswith(place) for known in getattr(error, "__notes__", ())):
        error.add_note(f"in {place}")


def steps_aside() -> bool:
    """Whether calls made now run as plain functions: nothing to save, or somebody else decides what is saved."""
    return (
        not torch.is_grad_enabled()
        or (bool(state.packing) and top_hook() == state.packing[-1])  # inside another call, and part of it
        or torch.compiler.is_compiling()
        or functorch_active()
        or forward_ad_active()
        or not hooks_enabled()
        or weights_cached()  # what one call computes, others would miss in their replays
        or tracing() is not None
    )
