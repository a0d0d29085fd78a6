"""Activations between calls: where they are, and who can rebuild them."""

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .._torch import storage_key, version_of
from ..nested import attributes_of, map_tensors
from ..surroundings.devices import hand_over, stream_of

__all__ = ["Slot", "key_of", "slot_of"]


def key_of(tensor: Tensor) -> tuple[Any, ...]:
    """Identify the memory that a tensor shows, and how it shows it."""
    storage = storage_key(tensor)
    if storage is None:
        return (None,)
    key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    return (*key, tensor.is_conj(), tensor.is_neg()) if tensor.is_complex() else (*key, tensor.is_neg())


class Consumer(Protocol):
    """A call that takes a value, and can rebuild it."""

    @property
    def awaited(self) -> bool:
        """Whether a graph waits for a replay."""

    def bring_back(self) -> None:
        """Rebuild the inputs."""


class Restorable(Protocol):
    """A tensor of the caller that was freed."""

    promised: bool  # a backward will restore it

    @property
    def tensor(self) -> Callable[[], Tensor | None]: ...

    def restore(self, value: Tensor) -> Tensor:
        """Give it its value back, and return what holds the value now."""


class Slot:
    """One activation: its value, until a call consumes it and can rebuild it; then that call.

    A rebuilt value stands beside the consumer for a while, so that the next call need not rebuild it.
    """

    __slots__ = (
        "__weakref__",
        "attributes",
        "consumer",
        "dtypes",
        "freed",
        "head",
        "key",
        "lock",
        "origin",
        "passers",
        "stream",
        "value",
        "version",
    )

    def __init__(self, tensor: Tensor, key: tuple[Any, ...], lock: threading.RLock):
        self.key, self.lock = key, lock
        self.consumer: Consumer | None = None
        self.origin = weakref.ref(tensor)  # that of the caller
        self.passers: list[weakref.ref[Consumer]] = []  # calls whose output it is, too, since they pass it on
        self.freed: Restorable | None = None  # the caller's tensor, where this value is to come back to it too
        self.head: Callable[[], Slot | None] = _none  # the freed input of the chain, for slots that lead back to it
        self.attributes: dict[str, Any] = {}  # for an inverse that reads what the function set
        if attributes := attributes_of(tensor):
            self.attributes = {name: map_tensors(Tensor.detach, value) for name, value in attributes.items()}
        self.put(tensor)
        if key[0] is not None:
            _live.slots[key] = self

    def put(self, value: Tensor, dtypes: set[torch.dtype] | frozenset[torch.dtype] = frozenset()) -> None:
        """Hold ``value``, not to be changed in place from here on, and the dtypes that it went through when rebuilt."""
        held = self._bare(value if self.freed is None else self.freed.restore(value))
        self.value: Tensor | None = held
        self.version, self.dtypes, self.stream = version_of(held), dtypes, stream_of(held)

    def _bare(self, value: Tensor) -> Tensor:
        """Return a tensor without its graph, with what the function had set on the original."""
        bare = value.detach()
        if self.attributes:
            vars(bare).update(self.attributes)
        return bare

    def take(self) -> Tensor | None:
        """Return the value for use on the current stream (NOTE [Streams])."""
        if self.stream is not None and self.value is not None:
            hand_over(self.value, self.stream)
        return self.value

    def consume(self, call: Consumer) -> None:
        """Let ``call`` rebuild the value from now on."""
        self.consumer, self.value = call, None
        if _live.slots.get(self.key) is self:
            del _live.slots[self.key]

    def drop(self) -> None:
        """Forget a rebuilt value; one that nobody can rebuild stays."""
        if self.consumer is not None:
            self.value = None

    def recall(self) -> bool:
        """Take the value from the caller's tensor, if that lives on as it was; it is nearer than a rebuilt one."""
        tensor = self.origin()
        if tensor is None or self.freed is not None or version_of(tensor) != self.version or key_of(tensor) != self.key:
            return False
        self.value, self.dtypes = self._bare(tensor), frozenset()
        return True

    @property
    def gone(self) -> bool:
        """Whether the value is to be rebuilt before it can be used."""
        return self.value is None

    @property
    def awaited(self) -> bool:
        """Whether a call that passes the value on is still to be replayed with it."""
        return any((call := ref()) is not None and call.awaited for ref in self.passers)

    @property
    def changed(self) -> bool:
        """Whether the value was changed in place since it was put here."""
        return self.value is not None and version_of(self.value) != self.version


def _none() -> None:
    return None


class _Live(threading.local):
    def __init__(self) -> None:
        self.slots: weakref.WeakValueDictionary[tuple[Any, ...], Slot] = weakref.WeakValueDictionary()


_live = _Live()


def slot_of(tensor: Any, key: tuple[Any, ...]) -> Slot | None:
    """Find the slot that holds this very tensor, unchanged; by its memory, since views and hooks make new objects."""
    slot = _live.slots.get(key)
    return slot if slot is not None and slot.version == version_of(tensor) else None
