"""Random number generators that a call may draw from."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import cpu_generator, digest, same_state
from .devices import module_of

__all__ = ["Generators"]


class _State(NamedTuple):
    """One generator, and its state before the call."""

    get: Callable[[], Tensor]
    set: Callable[[Tensor], Any]
    state: Tensor
    end: int = 0  # a digest of its state after the call


class Generators:
    """The generators that a call draws from; until it is over, all that it may draw from."""

    __slots__ = ("states",)

    def __init__(self, devices: Iterable[torch.device], own: Iterable[torch.Generator]):
        self.states = [_State(g.get_state, g.set_state, g.get_state()) for g in (cpu_generator, *own)]
        for device in devices:
            module = module_of(device)
            if hasattr(module, "get_rng_state"):
                get, put = partial(module.get_rng_state, device), partial(module.set_rng_state, device=device)
                self.states.append(_State(get, put, get()))

    def close(self, *, seed: bool) -> None:
        """After the call: forget those that it left alone, unless ``seed``."""
        ends = [(g, g.get()) for g in self.states]
        self.states = [g._replace(end=digest(end)) for g, end in ends if seed or not same_state(g.state, end)]

    def check(self) -> None:
        """After a replay: see that it drew what the call drew, and nobody else did meanwhile."""
        ends = [(g, g.get()) for g in self.states]
        if any(digest(now) != g.end and not same_state(now, g.state) for g, now in ends):
            raise RuntimeError(
                "Expected a replay to draw the random numbers that its forward drew; got others. Another thread may "
                "have drawn some at the same time: use mode 'store' there, or a generator of its own for each"
            )

    def rewind(self) -> None:
        """Begin where the call began."""
        for generator in self.states:
            generator.set(generator.state)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Let them go on afterwards from where they are now."""
        states = [(g.set, g.get()) for g in self.states]
        try:
            yield
        finally:
            for put, state in states:
                put(state)
