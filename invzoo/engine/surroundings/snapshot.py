"""What a call sees besides its inputs, and how a replay is made to see it again."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from .._torch import (
    Stamp,
    any_autocast,
    cpu_generator,
    default_device,
    digest,
    is_distributed,
    same_state,
    stamps,
    version_of,
    whole,
)
from .buffers import Suspect, attributes_of, buffers_of, copy_of, holds_loose, is_known, loose_tensors, without_graph
from .devices import accelerators, elsewhere, module_of, on_streams, streams_of
from .observers import Observers

__all__ = ["Surroundings", "walk"]


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


Table = tuple[dict[str, Any], dict[str, Any]]  # where a module keeps something, and what it kept there before the call


class _Entry(NamedTuple):
    """A parameter or buffer where a module keeps it, as it was before the call and must be found again."""

    table: dict[str, Any]
    name: str
    tensor: Tensor
    stamp: Stamp


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
    default device, the devices' streams, the train and eval flags, the modules inside, parameters, and the buffers
    that the call changed.
    """

    __slots__ = (
        "autocast",
        "buffers",
        "cast",
        "children",
        "device",
        "flags",
        "generators",
        "known",
        "modules",
        "observers",
        "replaced",
        "scripted",
        "shards",
        "stamps",
        "streams",
        "suspects",
        "tables",
        "tensors",
        "unusual",
    )

    def __init__(
        self,
        roots: Sequence[nn.Module],
        tensors: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        *,
        foreign: bool,
    ):
        self.modules = modules = walk(roots)
        self.scripted = any(isinstance(m, ScriptModule) for m in modules)
        if self.scripted:
            return
        self.flags = [m.training for m in modules]
        self.observers = Observers(modules)
        self.children: list[Table] = [(m._modules, m._modules.copy()) for m in modules if m._modules]
        # Where parameters are, and which; later the buffers that the call left alone, too.
        parameters: list[dict[str, Any]] = [m._parameters for m in modules if m._parameters]
        self.tables = [(table, table.copy()) for table in parameters]
        self._stamp()
        # Parameters of a functional_call, sharded ones, and those without a shape.
        self.unusual = any(type(x) is not nn.Parameter for x in self.tensors)
        self.known = set() if self.unusual else {*map(id, self.tensors)}  # the parameters that are checked here
        self.buffers, self.suspects = [], list[Suspect]()
        keepers = [m for m in modules if m._buffers or holds_loose(m)]
        if keepers:
            known = not (foreign or self.observers.present()) and is_known(modules)
            attributes, owned = attributes_of(keepers, known=known)
            self.buffers = buffers_of(keepers, known=known) + attributes
            generators = [*generators, *owned]
        devices = accelerators(tensors, self.tensors, (b.tensor for b in self.buffers))
        self.generators = _generator_states(devices, generators)
        self.streams = streams_of(devices) if devices else []
        self.device = default_device()
        self.cast = any_autocast()
        self.autocast = _autocast_state({"cpu", *(d.type for d in devices)}) if self.cast or devices else _NO_AUTOCAST
        self.replaced: list[tuple[dict[str, Any], str, Tensor]] = []
        self.shards: list[
            tuple[str, Tensor, int]
        ] = []  # sharded parameters and their versions: others put them in place

    def _stamp(self) -> None:
        self.tensors: list[Tensor] = [x for _, was in self.tables for x in was.values() if x is not None]
        self.stamps = stamps(self.tensors)

    def _entries(self) -> list[_Entry]:
        places = [(table, name, x) for table, was in self.tables for name, x in was.items() if x is not None]
        return [_Entry(*place, stamp) for place, stamp in zip(places, self.stamps, strict=True)]

    @property
    def replayable(self) -> bool:
        """Whether there can be a replay: not of scripts, which have no tables and save other tensors as they warm up.

        Nor of a first call that decides the shapes of parameters.
        """
        return not self.scripted and not (self.unusual and any(map(is_lazy, self.tensors)))

    def close(self, seed: bool) -> bool:
        """After the call: forget what it left alone, and learn what to put back before a replay.

        Returns:
            whether the call can be replayed: not if it changed what kept still until now.
        """
        ends = [(g, g.get()) for g in self.generators]
        self.generators = [g._replace(end=digest(end)) for g, end in ends if seed or not same_state(g.state, end)]
        if (now := stamps(self.tensors)) != self.stamps:
            for (_, name, _, was), stamp in zip(self._entries(), now, strict=True):
                if stamp[:2] != was[:2]:
                    raise RuntimeError(
                        f"Expected function not to change parameters in place; got a change of {name!r}. "
                        "Change it outside the call, or use mode 'store'; for a start that depends on data run it once "
                        "under torch.no_grad() before, or use iz.ActNorm"
                    )
        return not (self.buffers or self.unusual) or self._hold()

    def _hold(self) -> bool:
        """Keep parameters without their graphs, and the buffers that the call left alone."""
        if self.unusual:
            self.shards = [
                (name, x, version_of(x)) for _, was in self.tables for name, x in was.items() if is_distributed(x)
            ]
            self.tables = [(table, _without_graphs(was)) for table, was in self.tables]
        fates = [(buffer, buffer.fate(self.suspects)) for buffer in self.buffers]
        for buffer, fate in fates:
            if fate == "lost":
                return False
            was = buffer.copy if fate == "moved" else without_graph(buffer.tensor)
            if fate == "moved" or buffer.table.get(buffer.name) is not buffer.tensor:
                self.replaced.append((buffer.table, buffer.name, was))  # type: ignore[arg-type]  # it has a copy
            else:
                self.tables.append((buffer.table, {buffer.name: was}))
        self.buffers = []
        self._stamp()
        return True

    def _check(self) -> None:
        if moved := [suspect.name for suspect in self.suspects if suspect.moved()]:
            raise RuntimeError(
                f"Expected a call to move buffers and attributes such that their versions tell; got a change of "
                f"{moved[0]!r} through .data or the like. The next call will be right; or change it in place, under "
                "torch.no_grad()"
            )
        for table, was in (*self.tables, *self.children):
            if gone := was.keys() - table.keys():
                views = any(type(was[name]) is Tensor for name in gone)
                advice = "Use fully_shard for FullyShardedDataParallel" if views else "Call backward first"
                raise RuntimeError(
                    "Expected modules to keep their parameters, buffers and modules between forward and backward; "
                    f"got a removal of {min(gone)!r}. {advice}"
                )
        for table, was in self.children:
            if new := table.keys() - was.keys():
                raise RuntimeError(
                    "Expected modules to have no new modules inside between forward and backward; "
                    f"got an addition of {min(new)!r}. Call backward first; run what makes its modules in its first "
                    "forward once under torch.no_grad() before"
                )
        stale = [name for name, x, version in self.shards if version_of(x) != version]
        now = stamps(self.tensors)
        stale += [e.name for e, stamp in zip(self._entries(), now, strict=True) if stamp[:2] != e.stamp[:2]]
        if stale:
            raise RuntimeError(
                f"Expected parameters and buffers to stay as they were between forward and backward; got a change "
                f"of {stale[0]!r}. Call backward before optimizer.step() or load_state_dict()"
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
            table[name] = copy_of(was)
        self.observers.arm()

    def intact(self) -> bool:
        """Whether all is as it was already, and a replay will move nothing: so it is in most replays."""
        if any((self.generators, self.replaced, self.shards, self.suspects, self.cast, self.observers.active)):
            return False
        if stamps(self.tensors) != self.stamps or [m.training for m in self.modules] != self.flags:
            return False
        for table, was in (*self.tables, *self.children):
            if not all(map(is_, map(table.get, was), was.values())):
                return False
        if any(len(table) != len(was) for table, was in self.children) or any(map(holds_loose, self.modules)):
            return False
        if any_autocast() or self.device != default_device() or torch.is_inference_mode_enabled():
            return False
        return not self.observers.present() and not elsewhere(self.streams)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put everything back as it was, for as long as the context lasts."""
        self._check()
        entries = self._entries()
        moved = [e for e in entries if e.table[e.name] is not e.tensor]
        sharded = [e for e in moved if is_distributed(e.table[e.name])]
        put: list[tuple[dict[str, Any], str, Any]] = [
            (e.table, e.name, e.tensor) for e in moved if not is_distributed(e.table[e.name])
        ]
        put += [(t, name, m) for t, was in self.children for name, m in was.items() if t[name] is not m]
        put += [(t, name, x) for t, was in self.tables for name, x in was.items() if x is None and t[name] is not None]
        toggled = [(e.tensor, e.stamp[2]) for e in entries if e.tensor.requires_grad != e.stamp[2]]
        flags = [(m, was, m.training) for m, was in zip(self.modules, self.flags, strict=True) if m.training != was]
        states = [(g.set, g.get()) for g in self.generators]
        old = [(table, name, table.get(name)) for table, name, _ in (*put, *self.replaced)]
        # What the function leaves in its modules is that of the forward; that of a replay leads back to the replay.
        old += [(vars(m), name, x) for m in self.modules for name, x in loose_tensors(m).items()]
        with on_streams(self.streams), self._making(), self._autocast(), self.observers.silenced(), _gathered(sharded):
            try:
                for table, name, tensor in put:
                    table[name] = tensor
                for tensor, was in toggled:
                    tensor.requires_grad_(was)
                for module, was, _ in flags:
                    module.training = was
                self.rewind()
                yield
            finally:
                for set_state, state in states:
                    set_state(state)
                for module, _, now in flags:
                    module.training = now
                for tensor, was in toggled:
                    tensor.requires_grad_(not was)
                for table, name, value in old:
                    table[name] = value

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        """Make tensors where the call made them, and such that a replay can record them."""
        with contextlib.ExitStack() as stack:
            if self.device != default_device():
                stack.enter_context(self.device)
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())  # which the above has ended
            yield

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Set autocast as it was, on every device type."""
        stack = contextlib.ExitStack()
        for device, enabled, dtype in self.autocast:
            if enabled or torch.is_autocast_enabled(device):
                # A cache would hold the cast weights for as long as autocast around backward lasts.
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
        return stack


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


_NO_AUTOCAST = [("cpu", False, torch.bfloat16)]
