"""Time and peak of a training step on an accelerator, at sizes that fill one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import contestants
from .measure import alternate
from .timing import compare, step_of
from .workloads import SMOKE, WORKLOADS, Workload

__all__ = ["available", "run"]

SIZES = {
    "linear": ((32, (16384, 2048)), torch.float32),
    "conv": ((32, (32, 128, 128, 128)), torch.float32),
    "transformer": ((48, (8, 2 * 1024, 1024)), torch.bfloat16),
    "overhead": ((64, (8, 32)), torch.float32),
}


def available() -> bool:
    """Whether there is an accelerator."""
    return torch.accelerator.is_available()


def run(*, smoke: bool) -> dict[str, Any]:
    """Time every contestant, and weigh what a step adds to the memory in use; with autocast, where it says bfloat16."""
    if not smoke and not available():
        raise RuntimeError("Expected an accelerator for the case accelerator; got none")
    device = torch.accelerator.current_accelerator() if available() else torch.device("cpu")
    rows = []
    for name, ((depth, shape), dtype) in SIZES.items():
        workload = SMOKE[name] if smoke else replace(WORKLOADS[name], depth=depth, shape=shape, rounds=7)
        rows += [
            {"workload": name, "dtype": str(dtype).removeprefix("torch."), **row}
            for row in _measure(workload, device, dtype)
        ]
    return {"device": _name_of(device), "rows": rows}


def _measure(workload: Workload, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    with device:
        subnets = [subnet.to(device) for subnet in workload.subnets()]
        x, grad = workload.inputs()
        nets = {name: contestants.build(name, subnets) for name in contestants.names()}
        few = workload.inputs(batch=2)
    subnets = nn.ModuleList(subnets)
    errors = compare(nets, subnets.double(), few[0].detach().double(), few[1].double(), 1e-9)
    subnets.float()

    peaks, failures, steps = {}, {}, {}
    for name, net in nets.items():
        net.forward = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)(net.forward)
        try:
            net(x).backward(grad)  # from now on the gradients exist
            peaks[name] = _peak(lambda net=net: net(x).backward(grad))
        except RuntimeError as error:  # a peer may know nothing of autocast, or want too much memory
            if name not in contestants.PEERS:
                raise
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[name] = step_of(net, x, grad)
    times = alternate(steps, workload.rounds, warm_up=2)
    rows = [{"contestant": name, "error": errors[name], "peak": peaks[name], **times[name]} for name in steps]
    return rows + [{"contestant": name, "failed": reason} for name, reason in failures.items()]


def _peak(step: Callable[[], object]) -> int | None:
    """Return the peak of the memory in use over its start, as the allocator counts it."""
    if not available():
        return None
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    step()
    return torch.accelerator.max_memory_allocated() - before


def _name_of(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return module.get_device_name() if hasattr(module, "get_device_name") else device.type
