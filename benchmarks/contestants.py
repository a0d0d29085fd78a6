"""The contestants: one stack of additive couplings over the same subnets, run in each of the ways to train it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import invzoo as iz

__all__ = ["Contestants", "build"]

Contestants = dict[str, nn.Module]


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


def invertible(subnets: Iterable[nn.Module], mode: str) -> iz.InvertibleSequential:
    """Build the stack of InvZoo's layers."""
    net = iz.InvertibleSequential(*(layer for f in subnets for layer in (iz.AdditiveCoupling(f), iz.Swap())))
    net.mode = mode
    return net


def build(depth: int, subnet: Callable[[], nn.Module]) -> Contestants:
    """Return every contestant over the same `depth` subnets, whose weights and gradients they share."""
    subnets = [subnet() for _ in range(depth)]
    return {
        "plain": Plain(subnets),
        "torch checkpoint": Checkpointed(subnets),
        **{f"invzoo {mode}": invertible(subnets, mode) for mode in iz.Mode},
    }
