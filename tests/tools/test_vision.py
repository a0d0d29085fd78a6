"""A net in the manner of timm, whose blocks are couplings of its parts, in the loop that its recipes share."""

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


def train(net: nn.Module, layout: torch.memory_format) -> list[float]:
    """Train as timm does: weight decay on matrices alone, a schedule, smoothed labels, clipping, averaged weights."""
    labels = torch.arange(32) % CLASSES
    x = torch.randn(32, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x + 3 * F.one_hot(labels, CLASSES).to(x)[:, :3, None, None]
    x = x.to(memory_format=layout)
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
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_recipe(layout: torch.memory_format):
    assert_learns_and_saves(
        lambda: ConvNeXt().double().to(memory_format=layout), lambda net: train(net, layout), less=2
    )
