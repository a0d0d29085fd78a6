"""The stack under `torch.compile`, as one graph or layer by layer: time of a step, what is held, and the peak."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from . import contestants
from .measure import (
    GIVE_BACK,
    PYTHON_IN_MALLOC,
    alternate,
    bytes_of_process,
    in_fresh_process,
    one_thread,
    peak_of_process,
    seconds_of,
)
from .timing import compare, step_of
from .workloads import SMOKE, WORKLOADS, Workload

__all__ = ["run"]

CASES = ("linear", "overhead")
NAMES = ("plain", "plain, compiled", "invzoo invert", "invzoo invert, layers compiled", "invzoo invert, compiled")
LIMIT = 1e-4  # of errors in float32: what is compared is what is timed, and another dtype would be compiled anew


def run(*, smoke: bool) -> dict[str, Any]:
    """Time and weigh every contestant, in processes of their own, so that the compiler starts without a cache."""
    return {"rows": [row for name in CASES for row in _measure(name, smoke)]}


def _measure(name: str, smoke: bool) -> list[dict[str, Any]]:
    with TemporaryDirectory() as cache:
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
        times = in_fresh_process(environment, measure_times, name, smoke)
        sizes = in_fresh_process(environment | GIVE_BACK | PYTHON_IN_MALLOC, measure_sizes, name, smoke)
    depth = _workload(name, smoke).depth
    return [{"workload": name, "depth": depth, "contestant": n, **times[n], **sizes[n]} for n in NAMES]


def measure_times(name: str, smoke: bool) -> dict[str, dict[str, Any]]:
    """Return the contestants' errors, the seconds of their first step, and those of later ones."""
    with one_thread() if name == "overhead" else nullcontext():
        workload, subnets, nets = _build(name, smoke)
        x, grad = workload.inputs()
        first = {n: seconds_of(lambda net=net: net(x), grad) for n, net in nets.items()}
        errors = compare(nets, subnets, x, grad, LIMIT)
        times = alternate({n: step_of(net, x, grad) for n, net in nets.items()}, workload.rounds, warm_up=2)
    return {n: {"first": first[n], "error": errors[n], **times[n]} for n in nets}


def measure_sizes(name: str, smoke: bool) -> dict[str, dict[str, Any]]:
    """Return the bytes that the process holds after the contestants' forward, and at the peak of their step."""
    workload, _, nets = _build(name, smoke)
    x, grad = workload.inputs()
    return {n: _sizes(net, x, grad) for n, net in nets.items()}


def _sizes(net: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, int | None]:
    net(x).backward(grad)  # compiles, and makes the gradients exist
    held = bytes_of_process(lambda: net(x))
    return {"held": held, "peak": peak_of_process(lambda: net(x).backward(grad))}


def _workload(name: str, smoke: bool) -> Workload:
    if smoke:
        return SMOKE[name]
    return replace(WORKLOADS[name], depth=16) if name == "linear" else WORKLOADS[name]  # compiled in half the time


def _build(name: str, smoke: bool) -> tuple[Workload, nn.ModuleList, dict[str, nn.Module]]:
    """Make the workload, its subnets and the contestants over them."""
    torch.manual_seed(0)
    workload = _workload(name, smoke)
    subnets = workload.subnets()
    nets = {n: _contestant(n, subnets, "aot_eager" if smoke else "inductor") for n in NAMES}
    return workload, nn.ModuleList(subnets), nets


def _contestant(name: str, subnets: contestants.Subnets, backend: str) -> nn.Module:
    kind, _, how = name.partition(", ")
    if not how:
        return contestants.build(kind, subnets)
    weights = {id(p): p for net in subnets for p in net.parameters()}
    net = contestants.build(kind, copy.deepcopy(subnets, weights))  # compile() changes the modules, not the weights
    for module in net if how == "layers compiled" else (net,):
        module.compile(fullgraph=True, backend=backend)
    return net
