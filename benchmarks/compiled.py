"""The stack under `torch.compile`, as one graph: time of a step and of the first one, what is held, and the peak."""

from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from . import contestants
from .measure import GIVE_BACK, alternate, bytes_of_process, in_fresh_process, peak_of_process, seconds_of
from .timing import compare, step_of
from .workloads import SMOKE, WORKLOADS, Workload

__all__ = ["run"]

NAMES = ("plain", "plain, compiled", "invzoo invert", "invzoo invert, compiled")
LIMIT = 1e-4  # of errors in float32: what is compared is what is timed, and another dtype would be compiled anew


def run(*, smoke: bool) -> dict[str, Any]:
    """Time and weigh every contestant, in processes of their own, so that the compiler starts without a cache."""
    with TemporaryDirectory() as cache:
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
        times = in_fresh_process(environment, measure_times, smoke)
        sizes = in_fresh_process(environment | GIVE_BACK, measure_sizes, smoke)
    return {
        "depth": _workload(smoke).depth,
        "rows": [{"contestant": name, **times[name], **sizes[name]} for name in NAMES],
    }


def measure_times(smoke: bool) -> dict[str, dict[str, Any]]:
    """Return the contestants' errors, the seconds of their first step, and those of later ones."""
    workload, subnets, nets = _build(smoke)
    x, grad = workload.inputs()
    first = {name: seconds_of(lambda net=net: net(x), grad) for name, net in nets.items()}
    errors = compare(nets, subnets, x, grad, LIMIT)
    times = alternate({name: step_of(net, x, grad) for name, net in nets.items()}, workload.rounds, warm_up=2)
    return {name: {"first": first[name], "error": errors[name], **times[name]} for name in nets}


def measure_sizes(smoke: bool) -> dict[str, dict[str, Any]]:
    """Return the bytes that the process holds after the contestants' forward, and at the peak of their step."""
    workload, _, nets = _build(smoke)
    x, grad = workload.inputs()
    return {name: _sizes(net, x, grad) for name, net in nets.items()}


def _sizes(net: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, int | None]:
    net(x).backward(grad)  # compiles, and makes the gradients exist
    held = bytes_of_process(lambda: net(x))
    return {"held": held, "peak": peak_of_process(lambda: net(x).backward(grad))}


def _workload(smoke: bool) -> Workload:
    return SMOKE["linear"] if smoke else replace(WORKLOADS["linear"], depth=16)  # compiled in half the time


def _build(smoke: bool) -> tuple[Workload, nn.ModuleList, dict[str, nn.Module]]:
    """Make the workload, its subnets and the contestants over them."""
    torch.manual_seed(0)
    workload = _workload(smoke)
    subnets = workload.subnets()
    nets = {name: contestants.build(name.removesuffix(", compiled"), subnets) for name in NAMES}
    for name, net in nets.items():
        if name.endswith("compiled"):
            net.compile(fullgraph=True, backend="aot_eager" if smoke else "inductor")
    return workload, nn.ModuleList(subnets), nets
