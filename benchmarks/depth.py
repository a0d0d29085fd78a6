"""Memory against depth: the bytes held after forward and at the peak of backward, counted exactly."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import contestants
from .measure import PYTHON_IN_MALLOC, bytes_of_process, in_fresh_process, one_thread, peak_of_tensors

__all__ = ["run"]


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


def run(*, smoke: bool) -> dict[str, Any]:
    """Measure every contestant at every depth, each in a process of its own.

    Weights, their gradients (which exist before the step), the input and the output's gradient are not counted: they
    are there in every training, and what is left is what the way of training adds. The unit is the input's size.
    """
    setting = SMOKE if smoke else FULL
    if smoke:
        results = [measure(name, setting) for name in contestants.names()]
    else:
        results = [in_fresh_process(PYTHON_IN_MALLOC, measure, name, setting) for name in contestants.names()]
    activation = setting.batch * setting.width * 4
    return {"setting": asdict(setting), "activation": activation, "rows": [row for rows in results for row in rows]}


@one_thread()
def measure(name: str, setting: Setting) -> list[dict[str, Any]]:
    """Return a contestant's memory at every depth; `process` is all that the process holds, not tensors alone."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, setting.batch, setting.width)
    x.requires_grad_()
    rows, common = [], {"contestant": name, "threads": torch.get_num_threads()}
    for depth in setting.depths:
        net = contestants.build(name, [setting.subnet() for _ in range(depth)])
        for _ in range(2):
            net(x).backward(grad)  # from now on the gradients exist
        process = bytes_of_process(lambda net=net: net(x))
        memory = peak_of_tensors(lambda net=net: net(x), grad)
        rows.append({**common, "depth": depth, "process": process, **memory})
    return rows
