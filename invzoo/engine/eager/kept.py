"""What backwards through a kept graph rebuilt, and hold for a while."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

from .._torch import at_end_of_backward, backward_id
from .saved import Saved
from .slots import Slot

__all__ = ["kept"]


class Rebuilt(Protocol):
    """A call whose handles hold what its replay made."""

    saved: Saved

    @property
    def lock(self) -> threading.RLock: ...


class Kept:
    """What backwards through a kept graph rebuilt and have not dropped yet (rule 4)."""

    def __init__(self) -> None:
        self.task = -1
        self.inside = False  # whether backwards run inside one that ends later, as those of calls below a transform
        self.last: Callable[[], Rebuilt | None] = lambda: None
        self.slots: list[Callable[[], Slot | None]] = []

    def begin(self, call: Rebuilt) -> None:
        """Let go of what the call before this one rebuilt, and see to it that the end of this backward does so too."""
        last, self.last = self.last(), weakref.ref(call)
        # Another thread that has the lock releases the call when it is done with it; waiting could wait for ever.
        if last is not None and last is not call and last.lock.acquire(blocking=False):
            last.saved.release()
            last.lock.release()
        if not self.inside:
            self._join()

    @contextlib.contextmanager
    def one_backward(self) -> Iterator[None]:
        """Count the backwards that run inside as parts of the one that runs now."""
        self._join()
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def _join(self) -> None:
        """Wait for the end of the backward that runs now, if nobody does yet."""
        task = backward_id()
        if task not in (-1, self.task):
            self.task = task
            at_end_of_backward(self.end)

    def end(self) -> None:
        """Let go of everything."""
        if (last := self.last()) is not None:
            with last.lock:
                last.saved.release()
        for ref in self.slots:
            if (slot := ref()) is not None:
                with slot.lock:
                    slot.drop()
        self.slots.clear()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.kept = Kept()


_thread = _Thread()


def kept() -> Kept:
    """Return that of the thread that runs a backward; another one, of another device say, may end it."""
    return _thread.kept
