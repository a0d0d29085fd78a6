"""The stacks of couplings that are timed: their sizes and their subnets."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SMOKE", "WORKLOADS", "Workload", "attention", "mlp", "transformer"]


@dataclass(frozen=True)
class Workload:
    """A stack of `depth` couplings on inputs of `shape`, split along dim 1, and how often it is timed."""

    depth: int
    shape: tuple[int, ...]
    subnet: Callable[[tuple[int, ...], int], nn.Module]  # of the shape and the coupling's index
    rounds: int = 7

    def subnets(self) -> list[nn.Module]:
        """Make the subnets, one for each coupling."""
        return [self.subnet(self.shape, i) for i in range(self.depth)]

    def inputs(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Return an input that requires a gradient and the output's gradient, of another batch size if asked."""
        x, grad = torch.randn(2, batch or self.shape[0], *self.shape[1:])
        return x.requires_grad_(), grad


def linear(shape: tuple[int, ...], _: int) -> nn.Module:
    """Linear, GELU, Linear."""
    half, width = shape[1] // 2, shape[1]
    return nn.Sequential(nn.Linear(half, width), nn.GELU(), nn.Linear(width, half))


def small(shape: tuple[int, ...], _: int) -> nn.Module:
    """Linear, GELU, Linear without a wider middle: what it computes takes no time."""
    half = shape[1] // 2
    return nn.Sequential(nn.Linear(half, half), nn.GELU(), nn.Linear(half, half))


def conv(shape: tuple[int, ...], _: int) -> nn.Module:
    """Two 3x3 convolutions with a ReLU between them."""
    half = shape[1] // 2
    return nn.Sequential(nn.Conv2d(half, half, 3, padding=1), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1))


class Attention(nn.Module):
    """Causal self-attention over (batch, tokens, width)."""

    def __init__(self, width: int, heads: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, dtype=dtype), nn.Linear(width, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (n h c) -> n b h t c", n=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h t c -> b t (h c)"))


def attention(width: int, head: int = 64, dtype: torch.dtype | None = None) -> nn.Module:
    """Layer norm and self-attention."""
    return nn.Sequential(nn.LayerNorm(width, dtype=dtype), Attention(width, max(1, width // head), dtype))


def mlp(width: int, dtype: torch.dtype | None = None) -> nn.Module:
    """Layer norm, Linear, GELU, Linear."""
    first, last = nn.Linear(width, 4 * width, dtype=dtype), nn.Linear(4 * width, width, dtype=dtype)
    return nn.Sequential(nn.LayerNorm(width, dtype=dtype), first, nn.GELU(), last)


def transformer(shape: tuple[int, ...], index: int) -> nn.Module:
    """Attention and MLP in turn; a block is two couplings."""
    return (mlp if index % 2 else attention)(shape[-1])


WORKLOADS = {
    "linear": Workload(32, (2048, 512), linear),
    "conv": Workload(32, (4, 32, 128, 128), conv),
    "transformer": Workload(32, (4, 2 * 256, 256), transformer),  # both streams have 256 tokens
    "overhead": Workload(64, (8, 32), small, rounds=101),
}
SMOKE = {
    "linear": Workload(2, (4, 8), linear, rounds=2),
    "conv": Workload(2, (2, 4, 8, 8), conv, rounds=2),
    "transformer": Workload(2, (2, 8, 8), transformer, rounds=2),
    "overhead": Workload(4, (8, 8), small, rounds=2),
}
