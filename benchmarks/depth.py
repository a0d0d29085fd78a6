"""Memory against depth: the bytes held after forward and at the peak of backward, counted exactly."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invzoo.engine.memory import track_memory

from .contestants import build

__all__ = ["FULL", "SMOKE", "Setting", "run"]


@dataclass(frozen=True)
class Setting:
    """Sizes of the stacks; a subnet is Linear, tanh, Linear on half of the width."""

    depths: tuple[int, ...]
    batch: int = 64
    width: int = 64

    def subnet(self) -> nn.Module:
        """Return a new subnet, small enough for a thousand of them to keep the activations bounded."""
        half = self.width // 2
        net = nn.Sequential(nn.Linear(half, half), nn.Tanh(), nn.Linear(half, half))
        nn.init.normal_(net[2].weight, std=0.01)
        return net


FULL = Setting(depths=(4, 16, 64, 256, 1000))
SMOKE = Setting(depths=(2, 4), batch=4, width=8)


def run(setting: Setting) -> dict[str, Any]:
    """Measure every contestant at every depth.

    Weights, their gradients (which exist before the step), the input and the output's gradient are not counted: they
    are there in every training, and what is left is what the way of training adds. The unit is the input's size.
    """
    torch.manual_seed(0)
    x, grad = torch.randn(2, setting.batch, setting.width)
    rows = []
    for depth in setting.depths:
        for name, net in build(depth, setting.subnet).items():
            held, peak = _step(net, x, grad)
            rows.append({"contestant": name, "depth": depth, "held": held, "peak": peak})
    return {"setting": asdict(setting), "activation": x.nbytes, "rows": rows}


def _step(net: nn.Module, x: Tensor, grad: Tensor) -> tuple[int, int]:
    net(x).backward(grad)  # from now on the gradients exist
    with track_memory() as memory:
        y = net(x)
        held = memory.current
        memory.reset_peak()
        y.backward(grad)
    return held, memory.peak
