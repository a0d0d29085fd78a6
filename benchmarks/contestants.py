"""The contestants: one stack of additive couplings over the same subnets, run in each of the ways to train it."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import invzoo as iz

__all__ = ["OURS", "PEERS", "build", "installed", "names"]

OURS = tuple(f"invzoo {mode}" for mode in iz.Mode)
PEERS = ("revlib", "revtorch", "memcnn", "invtorch")


class Plain(nn.Module):
    """The stack as plain PyTorch: it splits once, runs on two streams and merges once."""

    def __init__(self, subnets: Iterable[nn.Module]) -> None:
        super().__init__()
        self.subnets = nn.ModuleList(subnets)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        for f in self.subnets:
            x1, x2 = self.block(f, x1, x2)
        return torch.cat([x1, x2], dim=1)

    def block(self, f: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Apply one coupling and swap the streams."""
        return x2, x1 + f(x2)


class Checkpointed(Plain):
    """The plain stack with each coupling under PyTorch's checkpoint."""

    def block(self, f: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Apply one coupling that keeps its inputs only."""
        return checkpoint(super().block, f, x1, x2, use_reentrant=False)


class Copy(nn.Module):
    """Hand a copy on, since some peers free their input, and it is the caller's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


Subnets = Sequence[nn.Module]


def pairs(subnets: Subnets) -> zip:
    """Two couplings that swap the streams are one (f, g) block that does not."""
    return zip(subnets[::2], subnets[1::2], strict=True)


def invzoo(subnets: Subnets, mode: str) -> nn.Module:
    """Build the stack of InvZoo's layers."""
    net = iz.InvertibleSequential(*(iz.AdditiveCoupling(f, g, dim=1) for f, g in pairs(subnets)))
    net.mode = mode
    return net


def revlib(subnets: Subnets) -> nn.Module:
    """Build the stack of revlib."""
    from revlib import ReversibleSequential  # noqa: PLC0415 - a peer is imported if it takes part

    return ReversibleSequential(*subnets, split_dim=1)


def revtorch(subnets: Subnets) -> nn.Module:
    """Build the stack of RevTorch."""
    from revtorch import ReversibleBlock, ReversibleSequence  # noqa: PLC0415 - as above

    return ReversibleSequence(nn.ModuleList(ReversibleBlock(f, g, split_along_dim=1) for f, g in pairs(subnets)))


def memcnn(subnets: Subnets) -> nn.Module:
    """Build the stack of MemCNN."""
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper  # noqa: PLC0415 - as above

    return nn.Sequential(Copy(), *(InvertibleModuleWrapper(AdditiveCoupling(f, g)) for f, g in pairs(subnets)))


def invtorch(subnets: Subnets) -> nn.Module:
    """Build the stack on InvTorch's module, the way that its README tells to write a layer."""
    from invtorch.nn import Module  # noqa: PLC0415 - as above

    class AdditiveCoupling(Module):
        def __init__(self, f: nn.Module, g: nn.Module) -> None:
            super().__init__()
            self.f, self.g = f, g

        def function(self, x: Tensor) -> Tensor:
            x1, x2 = x.chunk(2, dim=1)
            y1 = x1 + self.f(x2)
            return torch.cat([y1, x2 + self.g(y1)], dim=1)

        def inverse(self, y: Tensor) -> Tensor:
            y1, y2 = y.chunk(2, dim=1)
            x2 = y2 - self.g(y1)
            return torch.cat([y1 - self.f(x2), x2], dim=1)

    return nn.Sequential(Copy(), *(AdditiveCoupling(f, g) for f, g in pairs(subnets)))


BUILDERS: dict[str, Callable[[Subnets], nn.Module]] = {
    "plain": Plain,
    "torch checkpoint": Checkpointed,
    **{f"invzoo {mode}": partial(invzoo, mode=mode) for mode in iz.Mode},
    **{builder.__name__: builder for builder in (revlib, revtorch, memcnn, invtorch)},
}


@cache
def installed(peer: str) -> bool:
    """Say whether a peer can be imported, and print once why it is left out if not."""
    try:
        import_module(peer)
    except Exception as error:  # noqa: BLE001 - a peer may be as broken as it likes
        print(f"{peer} is left out: {type(error).__name__}: {error}")
        return False
    return True


def names() -> list[str]:
    """Return the names of the contestants that can take part."""
    return [name for name in BUILDERS if name not in PEERS or installed(name)]


def build(name: str, subnets: Subnets) -> nn.Module:
    """Return a contestant over subnets whose weights and gradients it shares with the others."""
    return BUILDERS[name](subnets)
