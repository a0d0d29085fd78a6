"""What a call sees besides its inputs, and how a replay is made to see it again."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from .ambient import Ambient
from .buffers import Buffers, generators_of, holds_loose, is_known
from .devices import accelerators
from .generators import Generators
from .observers import Observers
from .parameters import Parameters
from .structure import Structure, walk

__all__ = ["Surroundings"]


class Surroundings:
    """Everything but the inputs that decides what a function computes, as it was when the call began.

    That is the modules inside with their train and eval flags, their parameters, the buffers that the call changes,
    hooks, the random number generators that it draws from, autocast, the default device and the devices' streams. Each
    part is closed after the call, and then keeps no more than a replay needs. Before a replay it is checked, and all
    is put back as it was for as long as that takes, if it is not intact anyway.
    """

    __slots__ = ("ambient", "buffers", "generators", "observers", "parameters", "replayable", "structure")

    def __init__(
        self,
        roots: Sequence[nn.Module],
        tensors: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        *,
        foreign: bool,
    ):
        modules = walk(roots)
        # Scripts have no tables, and save other tensors as they warm up.
        self.replayable = not any(isinstance(m, ScriptModule) for m in modules)
        if not self.replayable:
            return
        self.structure, self.parameters = Structure(modules), Parameters(modules)
        self.replayable = not self.parameters.lazy  # whose first call decides their shapes
        self.observers = Observers(modules)
        keepers = [m for m in modules if m._buffers or holds_loose(m)]
        known = bool(keepers) and not (foreign or self.observers.present()) and is_known(modules)
        self.buffers = Buffers(modules, keepers, known=known)
        devices = accelerators(tensors, self.parameters.tensors, self.buffers.tensors)
        self.generators = Generators(devices, [*generators, *generators_of(keepers)])
        self.ambient = Ambient(devices)

    def close(self, *, seed: bool) -> bool:
        """After the call: forget what it left alone, and learn what to put back before a replay.

        Returns:
            whether the call can be replayed: not if it changed what kept still until now.
        """
        self.generators.close(seed=seed)
        still, complete = self.buffers.close()
        self.parameters.close(still)
        return complete

    def rewind(self) -> None:
        """Bring generators, buffers and hooks to where they were when the call began; a replay moves them again."""
        self.generators.rewind()
        self.buffers.rewind()
        self.observers.arm()

    def as_they_were(self) -> contextlib.AbstractContextManager[None]:
        """Put everything back as it was, for as long as the context lasts."""
        return _NOTHING if self._intact() else self._restored()

    def _intact(self) -> bool:
        """Whether all is as it was already, and a replay will move nothing: so it is in most replays."""
        if self.generators.states or self.observers.active or self.observers.present():
            return False
        return self.parameters.intact() and self.structure.intact() and self.buffers.intact() and self.ambient.intact()

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        self.buffers.check()
        self.structure.check()
        self.parameters.check()
        parts = (self.ambient, self.structure, self.parameters, self.buffers, self.generators)
        with self.observers.silenced(), contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.restored())
            self.rewind()
            yield


_NOTHING = contextlib.nullcontext()
