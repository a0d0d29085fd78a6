"""Tensors that a module keeps and its calls may change: buffers, and mere attributes.

NOTE [Tensors that a call may move]

A replay must find such a tensor as it was before the call, so one that the call changes needs a copy from before it.
Its version does not tell of every change: not of those through `.data` or numpy, and not of those by some kernels.

1. A call copies, and compares when it is over. What kept still needs its copy no longer, so masks and tables take no
   memory. Any call may be the first that moves something, so every call looks.
2. What torch's own layers and this library's do is known: they move nothing in silence but batch norms their statistics
   in training. A call that runs no other code, of functions or hooks, looks at the versions alone, of tensors that it
   was seen to leave alone. If one moves nonetheless, the call cannot be replayed and stores, once.
3. On an accelerator, comparing would wait for the device. There the first call waits; later ones drop their copies, and
   their replays read the answer: one that moved a tensor in silence is refused. The next call knows, and keeps copies.
"""

import contextlib
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .._torch import is_capturing, is_hollow, version_of, without_modes
from .devices import read_later, waits_to_be_read
from .structure import put

__all__ = [
    "Buffers",
    "Location",
    "copy_of",
    "differ",
    "generators_of",
    "holds_loose",
    "is_known",
    "loose_tensors",
    "without_graph",
]


class Suspect:
    """A tensor that a call on an accelerator may have moved in silence; the answer is on its way (rule 3)."""

    __slots__ = ("_buffer", "_differs", "name")

    def __init__(self, buffer: "Buffer", copy: Tensor):
        self.name, self._buffer = buffer.name, buffer._replace(copy=None)
        with without_modes(), torch.no_grad():
            self._differs = read_later(_differences(buffer.tensor, copy).any())

    def moved(self) -> bool:
        """Wait for the answer, and remember it for the next calls."""
        moved = self._differs()
        if moved:
            self._buffer.remember("moves")
        return moved


class Buffer(NamedTuple):
    """A buffer, or a tensor that is a mere attribute, as it was before the call, which may change it."""

    module: nn.Module
    table: dict[str, Any]
    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None  # None where the version is trusted (rule 2)

    @classmethod
    def of(cls, module: nn.Module, table: dict[str, Any], name: str, tensor: Tensor, *, known: bool) -> "Buffer":
        """Look at a tensor before a call; ``known`` if the call runs no other code than this library's and torch's."""
        buffer = cls(module, table, name, tensor, version_of(tensor), None)
        trusted = known and not _moves_silently(module) and buffer._seen() == "still"
        return buffer if trusted else buffer._replace(copy=copy_of(tensor))

    def fate(self, suspects: list[Suspect]) -> Literal["still", "moved", "lost"]:
        """After the call: whether it kept still, was moved, or was moved and nobody knows from where."""
        moved = version_of(self.tensor) != self.version
        if self.copy is not None:
            moved = moved or _moves_silently(self.module) or self._differs(self.copy, suspects)
            self.remember("moves" if moved else "still")
            return "moved" if moved else "still"
        if moved:
            self.remember("moves")
        return "lost" if moved else "still"

    def _differs(self, copy: Tensor, suspects: list[Suspect]) -> bool:
        """Whether the call moved it in silence; on an accelerator, whether calls before did (rule 3)."""
        if not _is_plain(self.tensor) or is_capturing(self.tensor):
            return False
        if self._seen() is None or not waits_to_be_read(self.tensor):
            return differ(self.tensor, copy)
        if self._seen() == "still":
            suspects.append(Suspect(self, copy))
        return self._seen() == "moves"

    def remember(self, seen: Literal["still", "moves"]) -> None:
        """Note what a call of the module did to the tensor, for its next calls."""
        _seen.setdefault(self.module, {})[self.name, self.module.training] = seen

    def _seen(self) -> Literal["still", "moves"] | None:
        return _seen.get(self.module, {}).get((self.name, self.module.training))


# What the latest call of a module did to a tensor of it, by the tensor's name and whether the module trains.
_seen: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, bool], Literal['still', 'moves']]]"
_seen = weakref.WeakKeyDictionary()


def is_known(modules: Sequence[nn.Module]) -> bool:
    """Whether calls of these modules run torch's own code and this library's alone (rule 2)."""
    return all(
        type(m).__module__.startswith(("torch.nn.modules.", _PACKAGE)) and not any(map(_is_given, vars(m).values()))
        for m in modules
    )


def _is_given(value: Any) -> bool:
    """Whether somebody else's function stands where a module keeps an activation, say, or its ``forward``."""
    ours = isinstance(value, FunctionType) and value.__module__.startswith(("torch.", _PACKAGE))
    return isinstance(value, FunctionType | MethodType | partial) and not ours


_PACKAGE = __name__.split(".")[0] + "."


def _moves_silently(module: nn.Module) -> bool:
    """Whether a module's kernels move its buffers but not their versions, as those of batch norms and observers do."""
    return (module.training and isinstance(module, _NormBase)) or type(module).__module__.startswith("torch.ao.")


def copy_of(tensor: Tensor) -> Tensor:
    """Copy a tensor without its graph."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is nobody else's (fake, sharded or sparse, say), which are not looked into."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return plain and not (tensor.is_meta or tensor.is_nested or is_hollow(tensor))


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether values differ; of tensors that are not looked into, none do."""
    if not _is_plain(a):
        return False
    with without_modes():
        a, b = a.detach(), b.detach()
        return not torch.equal(a, b) and bool(_differences(a, b).any())


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """Return where values differ; NaN is the same as NaN."""
    return (a != b) & ~((a != a) & (b != b))  # noqa: PLR0124 - true of NaN


_LOOSE = frozenset((Tensor, torch.Generator))


def holds_loose(module: nn.Module) -> bool:
    """Whether some mere attribute of a module is a tensor or a generator."""
    return not _LOOSE.isdisjoint(map(type, module.__dict__.values()))


def loose_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are mere attributes of a module."""
    return {name: x for name, x in module.__dict__.items() if type(x) is Tensor}


def generators_of(modules: Iterable[nn.Module]) -> list[torch.Generator]:
    """Return the generators that are mere attributes of modules."""
    return [x for m in modules for x in vars(m).values() if type(x) is torch.Generator]


def without_graph(tensor: Tensor) -> Tensor:
    """Return a tensor that holds no graph, and asks for a gradient if the given one does."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()


Location = tuple[dict[str, Any], str, Tensor]  # where a module keeps a tensor, and which


class Buffers:
    """The buffers and mere attributes that a call moves; until it is over, all that it may move."""

    __slots__ = ("_modules", "_moved", "_suspects", "_watched")

    def __init__(self, modules: Sequence[nn.Module], keepers: Sequence[nn.Module], *, known: bool):
        self._modules = modules
        self._moved: list[Location] = []  # with copies from before the call
        self._suspects: list[Suspect] = []
        self._watched = [
            Buffer.of(module, table, name, x, known=known)
            for module in keepers
            for table in (module._buffers, vars(module))
            for name, x in (table.items() if table is module._buffers else loose_tensors(module).items())
            if x is not None and not is_hollow(x)
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """Return those that the call may move, until it is over."""
        return [b.tensor for b in self._watched]

    def close(self) -> tuple[list[Location], bool]:
        """After the call: keep copies of what it moved.

        Returns:
            what it left alone, and whether there is a copy of all that it moved.
        """
        still: list[Location] = []
        complete = True
        for buffer in self._watched:
            fate, table, name, tensor = buffer.fate(self._suspects), buffer.table, buffer.name, buffer.tensor
            complete &= fate != "lost"
            if fate == "still" and table.get(name) is tensor:
                still.append((table, name, without_graph(tensor)))
            else:
                self._moved.append((table, name, buffer.copy if fate == "moved" else without_graph(tensor)))  # type: ignore[arg-type]  # it has a copy
        self._watched = []
        return still, complete

    def check(self) -> None:
        """Before a replay: refuse what moved in silence."""
        if moved := [suspect.name for suspect in self._suspects if suspect.moved()]:
            raise RuntimeError(
                f"Expected a call to move buffers and attributes such that their versions tell; got a change of "
                f"{moved[0]!r} through .data or the like. The next call will be right; or change it in place, under "
                "torch.no_grad()"
            )

    def intact(self) -> bool:
        """Whether a replay finds all as it was, and leaves nothing behind."""
        return not (self._moved or self._suspects or any(map(holds_loose, self._modules)))

    def rewind(self) -> None:
        """Put copies of what moved in place."""
        for table, name, was in self._moved:
            table[name] = copy_of(was)

    def restored(self) -> contextlib.AbstractContextManager[None]:
        """Put back afterwards what is there now.

        What the function leaves in its modules is that of the forward; that of a replay leads back to the replay.
        """
        now = [(table, name, table.get(name)) for table, name, _ in self._moved]
        return put(now + [(vars(m), name, x) for m in self._modules for name, x in loose_tensors(m).items()])
