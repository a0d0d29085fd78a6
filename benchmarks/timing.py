"""Time of a training step, as a ratio to the plain stack's in the same round."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import contestants
from .measure import alternate, one_thread, seconds_of
from .workloads import SMOKE, WORKLOADS, Workload

__all__ = ["compare", "run", "run_overhead", "step_of"]

CASES = ("linear", "conv", "transformer")


def run(*, smoke: bool) -> dict[str, Any]:
    """Time every contestant on every workload."""
    return _run(CASES, smoke=smoke)


def run_overhead(*, smoke: bool) -> dict[str, Any]:
    """Time every contestant on couplings so small that the machinery itself is what counts."""
    with one_thread():
        return _run(("overhead",), smoke=smoke)


def _run(cases: tuple[str, ...], *, smoke: bool) -> dict[str, Any]:
    workloads = SMOKE if smoke else WORKLOADS
    return {"rows": [row for name in cases for row in _time(name, workloads[name])]}


def _time(name: str, workload: Workload) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    subnets = workload.subnets()
    nets = {contestant: contestants.build(contestant, subnets) for contestant in contestants.names()}
    errors = _compare_in_float64(nets, nn.ModuleList(subnets), *workload.inputs(batch=max(2, workload.shape[0] // 16)))
    x, grad = workload.inputs()
    times = alternate({k: step_of(net, x, grad) for k, net in nets.items()}, workload.rounds, warm_up=2)
    return [{"workload": name, "contestant": k, "error": errors[k], **times[k]} for k in nets]


def step_of(net: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], float]:
    """Return a step that starts without gradients and returns its seconds."""

    def step() -> float:
        net.zero_grad()
        x.grad = None
        return seconds_of(lambda: net(x), grad)

    return step


def _compare_in_float64(nets: dict[str, nn.Module], subnets: nn.Module, x: Tensor, grad: Tensor) -> dict[str, float]:
    """In float32, one ReLU whose input a rounding takes to the other side of 0 is an error of a thousandth."""
    subnets.double()
    errors = compare(nets, subnets, x.detach().double(), grad.double(), 1e-9)
    subnets.float()
    return errors


def compare(nets: dict[str, nn.Module], subnets: nn.Module, x: Tensor, grad: Tensor, limit: float) -> dict[str, float]:
    """Return the largest relative error of the output and the gradients against the plain stack's."""
    results = {name: _results(net, subnets, x.detach().clone(), grad) for name, net in nets.items()}
    subnets.zero_grad()
    errors = {}
    for name, result in results.items():
        pairs = zip(result, results["plain"], strict=True)
        errors[name] = max(float((actual - expected).norm() / expected.norm()) for actual, expected in pairs)
        if not errors[name] < limit:
            raise ArithmeticError(f"Expected {name} to agree with the plain stack; got error {errors[name]:.1e}")
    return errors


def _results(net: nn.Module, subnets: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    subnets.zero_grad()
    y = net(x.requires_grad_())
    output = y.detach().clone()  # some peers take the output apart in backward
    y.backward(grad)
    return [output, x.grad, *(p.grad.clone() for p in subnets.parameters())]
