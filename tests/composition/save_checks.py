"""What two processes save with `torch.distributed.checkpoint`: a sharded net and its optimizer, and what it returns."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import Adam

from tests.composition.fsdp_checks import shard
from tests.composition.workers import full
from tests.reference import FEATURES, make

__all__ = ["CHECKS", "NAMES", "inputs", "step"]

NAMES = ("affine", "stack", "streams")


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


CHECKS = {f"save-{name}": partial(save, name) for name in NAMES}
