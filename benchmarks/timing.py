"""Time of a training step, as a ratio to the plain stack's in the same round."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .contestants import Contestants, build

__all__ = ["FULL", "SMOKE", "Workload", "run"]


@dataclass(frozen=True)
class Workload:
    """A stack of `depth` couplings on inputs of `shape`, and how often it is timed."""

    depth: int
    shape: tuple[int, ...]
    subnet: Callable[[int], nn.Module]
    rounds: int
    warm_up: int = 2


def linear(features: int) -> nn.Module:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, features))


def conv(channels: int) -> nn.Module:
    """Two 3x3 convolutions with a ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )


FULL = {
    "linear": Workload(32, (2048, 512), linear, rounds=9),
    "conv": Workload(32, (4, 32, 128, 128), conv, rounds=9),
    "overhead": Workload(64, (8, 32), linear, rounds=51),
}
SMOKE = {
    "linear": Workload(2, (4, 8), linear, rounds=2, warm_up=1),
    "conv": Workload(2, (1, 4, 8, 8), conv, rounds=2, warm_up=1),
}


def run(workloads: dict[str, Workload]) -> dict[str, Any]:
    """Time every contestant on every workload; the contestants take turns, so that all see the same machine."""
    return {"rows": [row for name, workload in workloads.items() for row in _time(name, workload)]}


def _time(name: str, workload: Workload) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    contestants = build(workload.depth, lambda: workload.subnet(workload.shape[1] // 2))
    x, grad = torch.randn(2, *workload.shape)
    errors = _compare(contestants, x, grad)
    for _ in range(workload.warm_up):
        for net in contestants.values():
            _seconds(net, x, grad)
    seconds = np.array([[_seconds(net, x, grad) for net in contestants.values()] for _ in range(workload.rounds)])
    ratios = seconds / seconds[:, :1]
    return [
        {
            "workload": name,
            "contestant": contestant,
            "seconds": _quartiles(seconds[:, i]),
            "ratio to plain": _quartiles(ratios[:, i]),
            "error": errors[contestant],
        }
        for i, contestant in enumerate(contestants)
    ]


def _compare(contestants: Contestants, x: Tensor, grad: Tensor) -> dict[str, float]:
    """Return the largest relative error of the output and the gradients against the plain stack's, in float64.

    In float32, one ReLU whose input a rounding takes to the other side of 0 is an error of a thousandth.
    """
    results = {name: _results(net.double(), x.double(), grad.double()) for name, net in contestants.items()}
    for net in contestants.values():
        net.zero_grad()
        net.float()
    errors = {}
    for name, result in results.items():
        pairs = zip(result, results["plain"], strict=True)
        errors[name] = max(float((actual - expected).norm() / expected.norm()) for actual, expected in pairs)
        if not errors[name] < 1e-9:
            raise ArithmeticError(f"Expected {name} to agree with the plain stack; got error {errors[name]:.1e}")
    return errors


def _results(net: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    net.zero_grad()
    y = net(x)
    y.backward(grad)
    return [y.detach(), *(p.grad.clone() for p in net.parameters())]


def _seconds(net: nn.Module, x: Tensor, grad: Tensor) -> float:
    net.zero_grad()
    start = time.perf_counter()
    net(x).backward(grad)
    return time.perf_counter() - start


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(f"{q:.4g}") for q in np.quantile(values, (0.25, 0.5, 0.75))]
