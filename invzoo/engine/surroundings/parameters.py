"""Parameters, and the buffers that a call leaves alone: a replay must find the very tensors, unchanged."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._torch import Stamp, is_distributed, stamps, version_of, whole
from .buffers import Location, without_graph
from .structure import Table, check_removals, put

__all__ = ["Parameters"]


class _Entry(NamedTuple):
    """A tensor where a module keeps it, as it was before the call and must be found again."""

    table: dict[str, Any]
    name: str
    tensor: Tensor
    stamp: Stamp


class Parameters:
    """The parameters that a call sees, and where their modules keep them; later the buffers that kept still, too."""

    __slots__ = ("_shards", "_stamps", "_tables", "_unusual", "known", "tensors")

    def __init__(self, modules: Iterable[nn.Module]):
        tables: list[dict[str, Any]] = [m._parameters for m in modules if m._parameters]
        self._tables: list[Table] = [(table, table.copy()) for table in tables]
        self._shards: list[tuple[str, Tensor, int]] = []  # and their versions: others put them in place
        self._stamp()
        # Parameters of a functional_call, sharded ones, and those without a shape.
        self._unusual = any(type(x) is not nn.Parameter for x in self.tensors)
        self.known = set() if self._unusual else {*map(id, self.tensors)}  # those that are checked here

    def _stamp(self) -> None:
        self.tensors: list[Tensor] = [x for _, was in self._tables for x in was.values() if x is not None]
        self._stamps = stamps(self.tensors)

    def _entries(self) -> list[_Entry]:
        places = [(table, name, x) for table, was in self._tables for name, x in was.items() if x is not None]
        return [_Entry(*place, stamp) for place, stamp in zip(places, self._stamps, strict=True)]

    def _changed(self) -> list[str]:
        """Name those that are not what they were, or hold other data."""
        now = stamps(self.tensors)
        if now == self._stamps:
            return []
        return [e.name for e, stamp in zip(self._entries(), now, strict=True) if stamp[:2] != e.stamp[:2]]

    @property
    def lazy(self) -> bool:
        """Whether some have no shape yet."""
        return self._unusual and any(map(is_lazy, self.tensors))

    def close(self, still: Sequence[Location]) -> None:
        """After the call: refuse changes, let go of graphs, and take the buffers that kept still along."""
        if changed := self._changed():
            raise RuntimeError(
                f"Expected function not to change parameters in place; got a change of {changed[0]!r}. "
                "Change it outside the call, or use mode 'store'; for a start that depends on data run it once "
                "under torch.no_grad() before, or use iz.ActNorm"
            )
        if self._unusual:
            self._shards = [
                (name, x, version_of(x)) for _, was in self._tables for name, x in was.items() if is_distributed(x)
            ]
            self._tables = [(table, _without_graphs(was)) for table, was in self._tables]
        if self._unusual or still:
            self._tables += [(table, {name: x}) for table, name, x in still]
            self._stamp()

    def check(self) -> None:
        """Before a replay: refuse changes in place, and what is gone."""
        check_removals(self._tables)
        if stale := [name for name, x, version in self._shards if version_of(x) != version] + self._changed():
            raise RuntimeError(
                f"Expected parameters and buffers to stay as they were between forward and backward; got a change "
                f"of {stale[0]!r}. Call backward before optimizer.step() or load_state_dict()"
            )

    def intact(self) -> bool:
        """Whether all is as it was."""
        if self._shards or stamps(self.tensors) != self._stamps:
            return False
        return all(all(map(is_, map(table.get, was), was.values())) for table, was in self._tables)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put the tensors in place, each asking for a gradient if it did."""
        entries = self._entries()
        sharded = [e for e in entries if e.table[e.name] is not e.tensor and is_distributed(e.table[e.name])]
        kept = [(table, name, x) for table, was in self._tables for name, x in was.items()]
        moved = [(t, name, x) for t, name, x in kept if t[name] is not x and not is_distributed(t[name])]
        toggled = [(e.tensor, e.stamp[2]) for e in entries if e.tensor.requires_grad != e.stamp[2]]
        with _gathered(sharded), put(moved):
            try:
                for tensor, was in toggled:
                    tensor.requires_grad_(was)
                yield
            finally:
                for tensor, was in toggled:
                    tensor.requires_grad_(not was)


def _without_graphs(table: dict[str, Any]) -> dict[str, Any]:
    """Return what stays of parameters: those of a functional_call may lead back to the call, shards are put in place
    by whoever shards them.
    """
    return {name: without_graph(x) for name, x in table.items() if x is not None and not is_distributed(x)}


@contextlib.contextmanager
def _gathered(sharded: Sequence[_Entry]) -> Iterator[None]:
    """Put whole parameters in place that FSDP2 sharded since the call, and gathers only where a gradient comes by."""
    shards = [e.table[e.name] for e in sharded]
    wholes = [whole(s).to(e.tensor.dtype).requires_grad_(e.stamp[2]) for s, e in zip(shards, sharded, strict=True)]
    for entry, tensor in zip(sharded, wholes, strict=True):
        entry.table[entry.name] = tensor
    try:
        yield
    finally:
        for entry, shard, tensor in zip(sharded, shards, wholes, strict=True):
            if entry.table[entry.name] is tensor:  # else FSDP2 gathered it after all
                entry.table[entry.name] = shard
