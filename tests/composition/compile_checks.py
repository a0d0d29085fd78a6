"""Checks of DDP and FSDP2 with compiled nets, which two processes run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from tests.composition.fsdp_checks import shard
from tests.composition.workers import check_training
from tests.reference import FEATURES, make

__all__ = ["CHECKS"]

EAGER = {"backend": "aot_eager"}


def in_place(net: Any) -> nn.Module:
    net.compile(fullgraph=True, **EAGER)
    return net


def layers_in_place(net: Any) -> nn.Module:
    for layer in net:
        layer.compile(**EAGER)  # a graph cannot hold the hooks that FSDP2 has on subnets
    return net


WAYS: dict[str, tuple[Callable[[nn.Module], Any], int]] = {  # and how many activations are saved
    "ddp_of_a_compiled_container": (lambda net: DistributedDataParallel(in_place(net)), 1),
    "ddp_of_compiled_layers": (lambda net: DistributedDataParallel(layers_in_place(net)), 0),
    "compiled_ddp": (lambda net: torch.compile(DistributedDataParallel(net), **EAGER), 1),
    "fsdp_of_a_compiled_container": (lambda net: shard(in_place(net), "root"), 1),
    "fsdp_of_compiled_layers": (lambda net: shard(layers_in_place(net), "layers"), 0),
    "fsdp_of_compiled_subnets": (lambda net: shard(layers_in_place(net), "subnets"), 0),
    "compiled_fsdp": (lambda net: torch.compile(shard(net, "root"), **EAGER), 1),
}


def check(name: str, rank: int) -> None:
    """Train as one process would, and hold what is expected, which no depth changes."""
    wrap, held = WAYS[name]
    case = make("stack")
    wrapped, x = wrap(case.net), torch.randn(64, FEATURES)
    check_training(case, wrapped, rank)
    packed: list[Tensor] = []
    wrapped(x)  # compiles
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        wrapped(x)
    assert sum(t.shape[:1] == (64,) for t in packed) == held


CHECKS: dict[str, Callable[[int], None]] = {name: (lambda rank, n=name: check(n, rank)) for name in WAYS}
