"""Error against precision: what half precision costs, and what streams in float32 save of it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import invzoo as iz

__all__ = ["Setting", "measure", "run"]

PRECISIONS = ("float32", "autocast bfloat16, float32 streams", "bfloat16 subnets, float32 streams", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """Sizes of a stack of couplings; a subnet is Linear, GELU, Linear on half of the width, and starts small."""

    depth: int = 50
    batch: int = 64
    width: int = 64
    hidden: int = 64
    std: float = 0.05  # of the last weights: each coupling moves its stream by a few per cent

    def stack(self, kind: str) -> iz.InvertibleSequential:
        """Return a new stack in float64."""
        half = self.width // 2
        coupling, outputs = (iz.AdditiveCoupling, half) if kind == "additive" else (iz.AffineCoupling, 2 * half)
        layers = []
        for i in range(self.depth):
            net = nn.Sequential(nn.Linear(half, self.hidden), nn.GELU(), nn.Linear(self.hidden, outputs))
            nn.init.normal_(net[2].weight, std=self.std)
            layers.append(coupling(net, swap=i % 2 == 1))
        return iz.InvertibleSequential(*layers).double()


def run(*, smoke: bool) -> dict[str, Any]:
    """Measure additive and affine couplings."""
    setting = Setting(depth=4, batch=4, width=8) if smoke else Setting()
    rows = [row for kind in ("additive", "affine") for row in measure(kind, setting)]
    return {"setting": asdict(setting), "rows": rows}


def measure(kind: str, setting: Setting) -> list[dict[str, Any]]:
    """Return relative errors in norm against the same stack in float64, with the same weights to begin with.

    They are those of the output, of the input rebuilt from the output, and of all weights' gradients in the modes
    invert and store; the last says how much of the error is the forward's own.
    """
    torch.manual_seed(0)
    net, x = setting.stack(kind), torch.randn(setting.batch, setting.width, dtype=torch.float64)
    exact = _step(net, x, "store", autocast=False)
    rows = []
    for precision in PRECISIONS:  # each is a coarser copy of the one before
        if precision.startswith("bfloat16"):
            net.bfloat16()
        else:
            net.float()
        streams = torch.bfloat16 if precision == "bfloat16" else torch.float32
        for layer in net:
            layer.subnet_dtype = torch.bfloat16 if precision.startswith("bfloat16 subnets") else None
        step = {m: _step(net, x.to(streams), m, autocast="autocast" in precision) for m in ("store", "invert")}
        pairs = (("output", "invert", 0), ("input", "invert", 1), ("gradient", "invert", 2))
        errors = {name: _error(step[m][i], exact[i]) for name, m, i in (*pairs, ("gradient in store", "store", 2))}
        rows.append({"kind": kind, "precision": precision, **errors})
    return rows


def _step(net: iz.InvertibleSequential, x: Tensor, mode: str, *, autocast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the rebuilt input and the gradients."""
    net.zero_grad()
    with iz.mode(net, mode), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
        with torch.no_grad():
            rebuilt = net.inverse(y)
    y.square().mean().backward()
    return y.detach(), rebuilt, torch.cat([p.grad.flatten() for p in net.parameters()])


def _error(value: Tensor, exact: Tensor) -> float:
    return float(f"{((value.double() - exact).norm() / exact.norm()).item():.3g}")
