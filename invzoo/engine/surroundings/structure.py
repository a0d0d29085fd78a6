"""The modules of a call: which there are, where they are, and whether they train."""

import contextlib
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

from torch import Tensor, nn

__all__ = ["Structure", "Table", "check_removals", "put", "walk"]

Table = tuple[dict[str, Any], dict[str, Any]]  # where a module keeps something, and what it kept there before the call


def walk(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """List the modules below ``roots``, each once."""
    modules = [*roots]
    seen = {*modules}
    for module in modules:
        if module._modules:
            for child in module._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    modules.append(child)
    return modules


def check_removals(tables: Iterable[Table]) -> None:
    """Refuse a replay where something that a module kept is gone."""
    for table, was in tables:
        if gone := was.keys() - table.keys():
            views = any(type(was[name]) is Tensor for name in gone)
            advice = "Use fully_shard for FullyShardedDataParallel" if views else "Call backward first"
            raise RuntimeError(
                "Expected modules to keep their parameters, buffers and modules between forward and backward; "
                f"got a removal of {min(gone)!r}. {advice}"
            )


@contextlib.contextmanager
def put(places: Iterable[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Put values where modules keep them, for as long as the context lasts."""
    old = [(table, name, table.get(name)) for table, name, _ in places]
    try:
        for table, name, value in places:
            table[name] = value
        yield
    finally:
        for table, name, value in old:
            table[name] = value


class Structure:
    """The modules that a call sees, as they were when it began."""

    __slots__ = ("_children", "_flags", "modules")

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self._flags = [m.training for m in modules]
        self._children: list[Table] = [(m._modules, m._modules.copy()) for m in modules if m._modules]

    def check(self) -> None:
        """Before a replay: refuse modules that came or went."""
        check_removals(self._children)
        for table, was in self._children:
            if new := table.keys() - was.keys():
                raise RuntimeError(
                    "Expected modules to have no new modules inside between forward and backward; "
                    f"got an addition of {min(new)!r}. Call backward first; run what makes its modules in its first "
                    "forward once under torch.no_grad() before"
                )

    def intact(self) -> bool:
        """Whether all is as it was."""
        if [m.training for m in self.modules] != self._flags:
            return False
        for table, was in self._children:
            if len(table) != len(was) or not all(map(is_, map(table.get, was), was.values())):
                return False
        return True

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put the modules in place, and their flags back."""
        moved = [(table, name, m) for table, was in self._children for name, m in was.items() if table[name] is not m]
        flags = [(m, was, m.training) for m, was in zip(self.modules, self._flags, strict=True) if m.training != was]
        with put(moved):
            try:
                for module, was, _ in flags:
                    module.training = was
                yield
            finally:
                for module, _, now in flags:
                    module.training = now
