"""Nets in the manner of timm, whose blocks are couplings of its parts, in the loop that its recipes share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import invzoo as iz
from tests.tools.nets import assert_learns_and_saves

WIDTH, CLASSES, SIZE = 32, 4, 16


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of some samples."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype) >= self.rate
        return x * kept / (1 - self.rate)


class LayerScale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full(shape, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))


class VisionTransformer(nn.Module):
    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (SIZE // 4) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(self.block(WIDTH // 2) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    @staticmethod
    def block(dim: int) -> nn.Module:
        f, g = (
            nn.Sequential(nn.LayerNorm(dim), part, LayerScale(dim), DropPath(0.1))
            for part in (Attention(dim), mlp(dim))
        )
        return iz.AdditiveCoupling(f, g, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNeXt(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        stages, widths = [], (WIDTH // 2, WIDTH)
        for before, width in zip((3, *widths), widths):
            stages += [nn.Conv2d(before, width, 2, 2), *(self.block(width // 2) for _ in range(depth))]
        self.stages = nn.Sequential(*stages)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    @staticmethod
    def block(dim: int) -> nn.Module:
        def part() -> nn.Module:
            conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
            wide = nn.Sequential(
                nn.GroupNorm(1, dim), nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1)
            )
            return nn.Sequential(conv, *wide, LayerScale(dim, 1, 1), DropPath(0.1))

        return iz.AdditiveCoupling(part(), part())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(x).mean((2, 3))))


def train(net: nn.Module, channels_last: bool = False) -> list[float]:
    """Train as timm does: weight decay on matrices alone, a schedule, smoothed labels, clipping, averaged weights."""
    labels = torch.arange(32) % CLASSES
    x = torch.randn(32, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x + 3 * F.one_hot(labels, CLASSES).to(x)[:, :3, None, None]
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    decayed, others = ([p for p in net.parameters() if (p.ndim > 1) is big] for big in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(net)
        losses.append(loss.item())
    with torch.no_grad():
        assert F.cross_entropy(averaged.eval()(x), labels) < losses[0]
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("make", [VisionTransformer, ConvNeXt])
def test_a_recipe(make: Callable[[], nn.Module]):
    assert_learns_and_saves(lambda: make().double(), train, less=2)


@pytest.mark.slow
def test_channels_last():
    assert_learns_and_saves(
        lambda: ConvNeXt(2).double().to(memory_format=torch.channels_last), lambda net: train(net, True), less=1
    )
