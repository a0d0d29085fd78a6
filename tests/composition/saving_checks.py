"""A sharded net and its optimizer, which two processes save with `torch.distributed.checkpoint`, and others load."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Adam

import invzoo as iz
from tests.composition.fsdp_checks import shard
from tests.composition.workers import full
from tests.reference import FEATURES, MODES, assert_near, make

__all__ = ["CHECKS"]


def inputs() -> Tensor:
    return torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(7))


def step(net: nn.Module, optimizer: Adam, rank: int, world: int) -> None:
    optimizer.zero_grad()
    net(inputs().chunk(world)[rank].sigmoid()).sin().square().mean().backward()
    optimizer.step()


def save(name: str, rank: int, folder: str) -> None:
    net = shard(make(name).net, "layers")
    optimizer, world = Adam(net.parameters(), 0.1), dist.get_world_size()
    step(net, optimizer, rank, world)
    parameters, state = get_state_dict(net, optimizer)
    dcp.save({"net": parameters, "optimizer": state}, checkpoint_id=Path(folder, name))
    with torch.no_grad():
        y = net(inputs())
    step(net, optimizer, rank, world)
    after = [full(p.detach()) for p in net.parameters()]
    if rank == 0:
        torch.save((y, after), Path(folder, f"{name}.pt"))


def load(name: str, rank: int, folder: str, mode: str) -> None:
    torch.manual_seed(1)  # other parameters than those that were saved
    net, world = make(name).net, dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        shard(net, "layers")
    optimizer = Adam(net.parameters(), 0.1)
    parameters, state = get_state_dict(net, optimizer)
    dcp.load({"net": parameters, "optimizer": state}, checkpoint_id=Path(folder, name))
    set_state_dict(net, optimizer, model_state_dict=parameters, optim_state_dict=state)
    expected, after = torch.load(Path(folder, f"{name}.pt"), weights_only=True)
    with iz.mode(net, mode):
        with torch.no_grad():
            assert_near([net(inputs())], [expected])
        step(net, optimizer, rank, world)
    assert_near([full(p.detach()) for p in net.parameters()], after)


def run(name: str, rank: int, does: str, folder: str) -> None:
    if does == "save":
        save(name, rank, folder)
        return
    for mode in MODES:
        load(name, rank, folder, mode)


CHECKS = {name: partial(run, name) for name in ("affine", "stack", "streams")}
