"""The slots between which a call stands: it takes the values of some, and fills others."""

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._torch import at_end_of_backward, keeps_graph
from ..nested import map_tensors
from .kept import kept
from .slots import Consumer, Slot, key_of, slot_of

__all__ = ["Links", "waits_to_be_freed"]


class Links:
    """The slots of a call's outputs, which it holds, and of its inputs, which hold it (rules 2 and 5)."""

    __slots__ = ("_outputs", "_produced", "_sources", "inherits", "lock", "passed", "slots")

    def __init__(self) -> None:
        self.lock = threading.RLock()  # shared along a chain: several threads may run one graph
        self.inherits = False  # whether calls before it need its inputs
        self.passed: dict[int, int] = {}  # input position -> position of the output that is this input
        self.slots: list[Slot] = []  # those among the outputs
        self._outputs: list[Any] = []  # values and slots
        self._produced: list[Slot] = []
        self._sources: list[Callable[[], Slot | None]] = []  # weakly, the slots that this call rebuilds

    def join(self, call: Consumer, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Put the outputs into slots, and let ``call`` be the one who rebuilds those of the inputs."""
        keys_in = [key_of(x) if isinstance(x, Tensor) else None for x in inputs]
        known = dict(zip(map(id, inputs), keys_in, strict=True))  # most outputs that are inputs are the same
        keys_out = [(known.get(id(y)) or key_of(y)) if isinstance(y, Tensor) else None for y in outputs]
        slots_in = [None if k is None else slot_of(x, k) for x, k in zip(inputs, keys_in, strict=True)]
        if known_slots := [slot for slot in slots_in if slot is not None]:
            self.lock = known_slots[0].lock
        # A slot that is there is held by a call that a backward may replay: others are gone by now.
        self.inherits = bool(known_slots)
        self.passed = {i: keys_out.index(k) for i, k in enumerate(keys_in) if k and k[0] and k in keys_out}
        for i, slot in enumerate(slots_in):
            if slot is None or i in self.passed:
                self._sources.append(_none)
                if slot is not None:
                    slot.passers.append(weakref.ref(call))
            else:
                slot.consume(call)
                self._sources.append(weakref.ref(slot))
        for y, key in zip(outputs, keys_out, strict=True):
            if key is None:
                self._outputs.append(map_tensors(Tensor.detach, y))
                continue
            slot = slot_of(y, key)
            if slot is None:
                self._produced.append(slot := Slot(y, key, self.lock))
            self._outputs.append(slot)
            self.slots.append(slot)
        for head in _heads([slot for i, slot in enumerate(slots_in) if i not in self.passed]):
            _give_back(head, outputs, self._produced)

    def missing(self) -> Slot | None:
        """Return an output's slot whose value is not there, and nowhere else either."""
        for slot in self.slots:
            if slot.value is None and not slot.recall():
                return slot
        return None

    def loses(self) -> bool:
        """Whether an input's slot waits for its value."""
        return any(slot.gone for slot in self.sources())

    def sources(self) -> list[Slot]:
        """Return the slots of inputs that still live."""
        return [slot for ref in self._sources if (slot := ref()) is not None]

    @property
    def consumed(self) -> bool:
        """Whether a later call is to rebuild an output."""
        return any(slot.consumer is not None for slot in self.slots)

    def shares(self, output: Tensor) -> bool:
        """Whether a later call is still to be replayed with an output of this one."""
        return any(slot.value is output and slot.awaited for slot in self.slots)

    def values(self, name: str) -> tuple[Any, ...]:
        """Return the outputs, unless somebody changed one; errors call the call ``name``."""
        for slot in self.slots:
            if slot.changed:
                raise RuntimeError(
                    f"Expected the outputs of {name} to stay as they are until backward; got one that was changed in "
                    "place. Use an out-of-place operation on it"
                )
        return tuple([y.take() if isinstance(y, Slot) else y for y in self._outputs])

    def put(self, inputs: Iterable[Any], dtypes: set[torch.dtype], *, done: bool) -> None:
        """Fill the slots of the inputs; if the call is done with, they have to keep what they get (rule 4)."""
        for ref, value in zip(self._sources, inputs, strict=False):
            if (slot := ref()) is not None:
                slot.put(value, dtypes)
                if done:
                    slot.consumer = None
                elif keeps_graph():
                    kept().slots.append(ref)

    def dtypes(self, own: set[torch.dtype]) -> set[torch.dtype]:
        """Return those that a rebuilt input has gone through, in this call and in those behind it."""
        return own.union(*[slot.dtypes for slot in self.slots])

    def drop(self) -> None:
        """Forget the outputs that were rebuilt."""
        for slot in self._produced:
            slot.drop()

    def forget(self) -> None:
        """After the last replay: hold nothing any more."""
        self._outputs, self.slots, self._produced = [], [], []


def _give_back(head: Slot, outputs: Sequence[Any], produced: Sequence[Slot]) -> None:
    """See to it that a backward through a call restores the freed input of its chain, even if nothing asks."""
    found = weakref.ref(head)  # the caller's tensor holds it as long as there is something to restore

    def restore(head: Slot) -> None:
        if head.gone:
            head.consumer.bring_back()  # type: ignore[union-attr]  # it is gone
        head.take()

    def remind(_: Any) -> None:
        if (head := found()) is not None and head.freed is not None and head.freed.tensor() is not None:
            at_end_of_backward(partial(restore, head))

    nodes = [y.grad_fn for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None]
    for node in nodes:
        node.register_prehook(remind)
    if nodes and head.freed is not None:
        head.freed.promised = True
    else:  # nothing needs a gradient yet: the next call sees to it
        for slot in produced:
            slot.head = weakref.ref(head)


def _heads(slots: Sequence[Slot | None]) -> list[Slot]:
    """Find the inputs to be freed behind these slots."""
    return list({id(head): head for s in slots if s is not None and (head := s.head()) is not None}.values())


def waits_to_be_freed(inputs: Sequence[Any]) -> bool:
    """Whether some of these inputs are to be freed, so that a call must be able to rebuild them though nothing asks."""
    return bool(_heads([slot_of(x, key_of(x)) for x in inputs if isinstance(x, Tensor)]))


def _none() -> None:
    return None
