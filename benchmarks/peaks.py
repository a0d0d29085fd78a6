"""Peak memory of a training step over its start: the resident set in a fresh process, and exact bytes of tensors."""

from typing import Any

import torch

from . import contestants
from .measure import GIVE_BACK, in_fresh_process, peak_of_process, peak_of_tensors
from .workloads import SMOKE, WORKLOADS

__all__ = ["run"]


def run(*, smoke: bool) -> dict[str, Any]:
    """Measure every contestant on every workload, each in a process of its own."""
    cases = ("linear",) if smoke else ("linear", "conv", "transformer")
    names = ("plain", "invzoo invert") if smoke else contestants.names()
    return {"rows": [in_fresh_process(GIVE_BACK, measure, case, name, smoke) for case in cases for name in names]}


def measure(case: str, name: str, smoke: bool) -> dict[str, Any]:
    """Return the peaks of one contestant's step after a small one, which warms up and makes the gradients exist."""
    torch.manual_seed(0)
    workload = (SMOKE if smoke else WORKLOADS)[case]
    net = contestants.build(name, workload.subnets())
    x, grad = workload.inputs(batch=1)
    net(x).backward(grad)
    x, grad = workload.inputs()
    resident = peak_of_process(lambda: net(x).backward(grad))
    return {
        "workload": case,
        "contestant": name,
        "threads": torch.get_num_threads(),
        "activation": x.nbytes,
        "resident": resident,
        **peak_of_tensors(lambda: net(x), grad),
    }
