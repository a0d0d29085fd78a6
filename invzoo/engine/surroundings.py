"""What a call sees besides its inputs, and how a replay is made to see it again."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ._torch import cpu_generator, digest, is_distributed, same_state, storage_key, version_of, whole
from .devices import accelerators, module_of, on_streams, streams_of
from .observers import Observers

__all__ = ["Surroundings", "map_tensors", "walk"]


def walk(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """List the modules below ``roots``; a shared one comes as often as it is shared (cheaper than finding out)."""
    modules = list(roots)
    for module in modules:
        modules.extend(child for child in module._modules.values() if child is not None)
    return modules


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((k, map_tensors(function, v)) for k, v in value.items())
    if isinstance(value, tuple | list):
        items = [map_tensors(function, v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class _Entry(NamedTuple):
    """A parameter or buffer where a module keeps it, as it was before the call and must be found again."""

    table: dict[str, Any]
    name: str
    tensor: Tensor
    version: int
    storage: int | None
    requires_grad: bool


class _Buffer(NamedTuple):
    """A buffer that the call may change."""

    entry: _Entry
    copy: Tensor
    counted: bool  # whether every change of it moves its version


class _State(NamedTuple):
    """One random number generator, and its state before the call."""

    get: Callable[[], Tensor]
    set: Callable[[Tensor], Any]
    state: Tensor
    end: int = 0  # a digest of its state after the call


def _generator_states(devices: Iterable[torch.device], generators: Iterable[torch.Generator]) -> list[_State]:
    states = [_State(g.get_state, g.set_state, g.get_state()) for g in (cpu_generator, *generators)]
    for device in devices:
        module = module_of(device)
        if hasattr(module, "get_rng_state"):
            states.append(
                _State(
                    partial(module.get_rng_state, device),
                    partial(module.set_rng_state, device=device),
                    module.get_rng_state(device),
                )
            )
    return states


def _autocast_state(types: Iterable[str]) -> list[tuple[str, bool, torch.dtype]]:
    available = (t for t in types if torch.amp.is_autocast_available(t))
    return [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in available]


class Surroundings:
    """Everything but the inputs that decides what a function computes, as it was when the call began.

    That is the state of the random number generators (kept if the call consumed any, or if ``seed``), autocast, the
    devices' streams, the train and eval flags, the parameters, and the buffers that the call changed.
    """

    __slots__ = ("autocast", "buffers", "entries", "generators", "observers", "replaced", "streams", "training")

    def __init__(self, roots: Sequence[nn.Module], tensors: Sequence[Tensor], generators: Sequence[torch.Generator]):
        modules = walk(roots)
        self.training = [(m, m.training) for m in modules]
        self.observers = Observers(modules)
        self.entries: list[_Entry] = []
        self.buffers: list[_Buffer] = []
        for m in modules:
            for name, parameter in m._parameters.items():
                if parameter is not None:
                    self.entries.append(_entry(m._parameters, name, parameter))
            for name, buffer in m._buffers.items():
                if buffer is not None:
                    # F.batch_norm moves the running statistics without counting.
                    counted = not (m.training and isinstance(m, _NormBase))
                    self.buffers.append(_Buffer(_entry(m._buffers, name, buffer), buffer.detach().clone(), counted))
        devices = accelerators((*tensors, *(e.tensor for e in self.entries), *(b.copy for b in self.buffers)))
        self.generators = _generator_states(devices, generators)
        self.streams = streams_of(devices) if devices else []
        self.autocast = _autocast_state({"cpu", *(d.type for d in devices)})
        self.replaced: list[tuple[dict[str, Any], str, Tensor]] = []

    @property
    def lazy(self) -> bool:
        """Whether a parameter has no shape yet; its first call decides that, and is no call to replay."""
        return any(is_lazy(e.tensor) for e in self.entries)

    def close(self, seed: bool) -> None:
        """After the call: forget what it left alone, and learn what to put back before a replay."""
        if not seed:
            self.generators = [g for g in self.generators if not same_state(g.state, g.get())]
        self.generators = [g._replace(end=digest(g.get())) for g in self.generators]
        for entry in self.entries:
            if version_of(entry.tensor) != entry.version:
                raise RuntimeError(
                    f"Expected function not to change parameters in place; got a change of {entry.name!r}. "
                    "Change it outside the call, or use mode 'store'"
                )
        for entry, copy, counted in self.buffers:
            moved = version_of(entry.tensor) != entry.version or entry.table.get(entry.name) is not entry.tensor
            if moved or not counted:
                self.replaced.append((entry.table, entry.name, copy))
            else:
                self.entries.append(entry)
        self.entries = [_held(entry) for entry in self.entries if not is_distributed(entry.tensor)]
        self.buffers = []

    def _check(self) -> None:
        for entry in self.entries:
            if version_of(entry.tensor) != entry.version or storage_key(entry.tensor) != entry.storage:
                raise RuntimeError(
                    f"Expected parameters and buffers to stay as they were between forward and backward; got a change "
                    f"of {entry.name!r}. Call backward before optimizer.step() or load_state_dict()"
                )

    def check_generators(self) -> None:
        """After a replay: see that it drew what the call drew, and nobody else did meanwhile."""
        ends = [(g, g.get()) for g in self.generators]
        if any(digest(now) != g.end and not same_state(now, g.state) for g, now in ends):
            raise RuntimeError(
                "Expected a replay to draw the random numbers that its forward drew; got others. Another thread may "
                "have drawn some at the same time: use mode 'store' there, or a generator of its own for each"
            )

    def rewind(self) -> None:
        """Bring generators, buffers and hooks to where they were when the call began; a replay moves them again."""
        for generator in self.generators:
            generator.set(generator.state)
        for table, name, was in self.replaced:
            table[name] = was.clone()
        self.observers.arm()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put everything back as it was, for as long as the context lasts."""
        self._check()
        moved = [e for e in self.entries if e.table[e.name] is not e.tensor]
        sharded = [e for e in moved if is_distributed(e.table[e.name])]
        put = [e for e in moved if not is_distributed(e.table[e.name])]
        toggled = [e for e in self.entries if e.tensor.requires_grad != e.requires_grad]
        flags = [(m, was, m.training) for m, was in self.training if m.training != was]
        states = [(g.set, g.get()) for g in self.generators]
        old = [(e.table, e.name, e.table.get(e.name)) for e in put] + [(t, n, t.get(n)) for t, n, _ in self.replaced]
        with on_streams(self.streams), self._autocast(), self.observers.silenced(), _gathered(sharded):
            try:
                for entry in put:
                    entry.table[entry.name] = entry.tensor
                for entry in toggled:
                    entry.tensor.requires_grad_(entry.requires_grad)
                for module, was, _ in flags:
                    module.training = was
                self.rewind()
                yield
            finally:
                for set_state, state in states:
                    set_state(state)
                for module, _, now in flags:
                    module.training = now
                for entry in toggled:
                    entry.tensor.requires_grad_(not entry.requires_grad)
                for table, name, now in reversed(old):
                    table[name] = now

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Set autocast as it was, on every device type."""
        changes = [state for state in self.autocast if state[1] or torch.is_autocast_enabled(state[0])]
        if not changes:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        for device, enabled, dtype in changes:
            # Weights cast without gradients, by an inverse, must not be found by the function's run.
            stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
        return stack


@contextlib.contextmanager
def _gathered(sharded: Sequence[_Entry]) -> Iterator[None]:
    """Put whole parameters in place that FSDP2 sharded since the call, and gathers only where a gradient comes by."""
    shards = [entry.table[entry.name] for entry in sharded]
    wholes = [whole(s).to(e.tensor.dtype).requires_grad_(e.requires_grad) for s, e in zip(shards, sharded, strict=True)]
    for entry, tensor in zip(sharded, wholes, strict=True):
        entry.table[entry.name] = tensor
    try:
        yield
    finally:
        for entry, shard, tensor in zip(sharded, shards, wholes, strict=True):
            if entry.table[entry.name] is tensor:  # else FSDP2 gathered it after all
                entry.table[entry.name] = shard


def _entry(table: dict[str, Any], name: str, tensor: Tensor) -> _Entry:
    return _Entry(table, name, tensor, version_of(tensor), storage_key(tensor), tensor.requires_grad)


def _held(entry: _Entry) -> _Entry:
    """Return the entry without a graph: that of a functional_call's parameter may lead back to the call."""
    if entry.tensor.is_leaf:
        return entry
    return entry._replace(tensor=entry.tensor.detach().requires_grad_())
