"""Tensors that a module keeps and its calls may change: buffers, and mere attributes.

NOTE [Habits]

A replay must find such a tensor as it was before the call, so a call that changes it needs a copy. Most change none,
and copies of all masks and tables would cost more than small layers do. So a module's first call copies and looks what
it does, and later ones do what it was seen to do. One that changes in place what kept still until then cannot be
replayed, so it stores, once. Kernels that change tensors without moving their versions are found by comparing the
first copy.
"""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ._torch import is_hollow, version_of, without_modes

__all__ = ["Buffer", "attributes_of", "buffers_of", "copy_of", "holds_loose", "loose_tensors", "without_graph"]


class Buffer(NamedTuple):
    """A buffer, or a tensor that is a mere attribute, as it was before the call, which may change it."""

    module: nn.Module
    table: dict[str, Any]
    name: str
    tensor: Tensor
    version: int
    habit: str | None  # None until it is known, after a call
    copy: Tensor | None  # None of what keeps still

    @classmethod
    def of(cls, module: nn.Module, table: dict[str, Any], name: str, tensor: Tensor) -> "Buffer":
        habit = _habit(module, name)
        copy = None if habit == "still" else copy_of(tensor)
        return cls(module, table, name, tensor, version_of(tensor), habit, copy)

    def learn(self) -> str:
        """After the call: return what it does, and remember that for the next ones."""
        moved = version_of(self.tensor) != self.version
        if self.habit in ("moves", "silent") or (self.habit == "still" and not moved):
            return self.habit
        silent = not moved and self.copy is not None and _differ(self.tensor, self.copy)
        habit = "moves" if moved else "silent" if silent else "still"
        _habits.setdefault(self.module, {})[self.name, self.module.training] = habit
        return habit


# What the calls of a module do to a tensor of it, by its name and whether the module trains: it is "still", it "moves",
# or it moves and is "silent", so that no version tells.
_habits: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, bool], str]]" = weakref.WeakKeyDictionary()


def _habit(module: nn.Module, name: str) -> str | None:
    if (module.training and isinstance(module, _NormBase)) or type(module).__module__.startswith("torch.ao."):
        return "silent"  # the kernels of batch norms, and of observers that are switched on later
    return _habits.get(module, {}).get((name, module.training))


def copy_of(tensor: Tensor) -> Tensor:
    """Copy a tensor without its graph."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether plain tensors differ; nobody else's (fake, sharded or sparse ones, say) are looked into."""
    if type(a) is not Tensor or a.layout is not torch.strided or a.is_meta or a.is_nested or is_hollow(a):
        return False
    with without_modes():
        return not torch.equal(a.detach(), b.detach())


_LOOSE = frozenset((Tensor, torch.Generator))


def holds_loose(module: nn.Module) -> bool:
    """Whether some mere attribute of a module is a tensor or a generator."""
    return not _LOOSE.isdisjoint(map(type, module.__dict__.values()))


def loose_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are mere attributes of a module."""
    return {name: x for name, x in module.__dict__.items() if type(x) is Tensor}


def buffers_of(modules: list[nn.Module]) -> list[Buffer]:
    """Return the buffers of modules, as they are now."""
    return _found((m, m._buffers, name, x) for m in modules if m._buffers for name, x in m._buffers.items())


def attributes_of(modules: list[nn.Module]) -> tuple[list[Buffer], list[torch.Generator]]:
    """Return the tensors that are mere attributes of modules, as they are now, and the generators."""
    tensors = _found((m, vars(m), name, x) for m in modules for name, x in loose_tensors(m).items())
    return tensors, [x for m in modules for x in vars(m).values() if type(x) is torch.Generator]


def _found(places: Iterable[tuple[nn.Module, dict[str, Any], str, Tensor | None]]) -> list[Buffer]:
    return [Buffer.of(m, table, name, x) for m, table, name, x in places if x is not None and not is_hollow(x)]


def without_graph(tensor: Tensor) -> Tensor:
    """Return a tensor that holds no graph, and asks for a gradient if the given one does."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()
