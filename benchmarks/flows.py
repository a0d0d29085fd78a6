"""Normalizing flows against the flow libraries: bytes held after the log-likelihood, peak, and time of a step."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from . import flow_contestants
from .flow_contestants import KINDS, Sizes
from .measure import alternate, peak_of_tensors, seconds_of

__all__ = ["run"]

DEPTHS = (4, 8, 16, 32)


def run(*, smoke: bool) -> dict[str, Any]:
    """Measure every library that has the layers, at equal sizes though not with the same weights."""
    sizes = Sizes(batch=8, features=4, hidden=4) if smoke else Sizes()
    depths, rounds = ((2,), 2) if smoke else (DEPTHS, 9)
    rows, times = [], []
    for kind in KINDS:
        rows += [row for name in flow_contestants.names(kind) for row in _memory(name, kind, depths, sizes)]
        times += _times(kind, depths[-1], sizes, rounds)
    return {"sizes": asdict(sizes), "activation": sizes.batch * sizes.features * 4, "rows": rows, "times": times}


def _memory(name: str, kind: str, depths: tuple[int, ...], sizes: Sizes) -> list[dict[str, Any]]:
    x = torch.randn(sizes.batch, sizes.features)
    rows = []
    for depth in depths:
        net = flow_contestants.build(name, kind, depth, sizes)
        net(x).backward()  # from now on the gradients exist
        rows.append({"kind": kind, "contestant": name, "depth": depth, **peak_of_tensors(lambda net=net: net(x))})
    return rows


def _times(kind: str, depth: int, sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    x = torch.randn(sizes.batch, sizes.features)
    nets = {name: flow_contestants.build(name, kind, depth, sizes) for name in flow_contestants.names(kind)}
    times = alternate({k: lambda net=net: _step(net, x) for k, net in nets.items()}, rounds, warm_up=2)
    return [{"kind": kind, "contestant": name, "depth": depth, **times[name]} for name in nets]


def _step(net: nn.Module, x: Tensor) -> float:
    net.zero_grad()
    return seconds_of(lambda: net(x))
