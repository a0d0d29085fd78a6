"""What one process, or four, load of what two have saved, and how they train on."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Adam

import invzoo as iz
from tests.composition.fsdp_checks import shard
from tests.composition.save_checks import NAMES, inputs, step
from tests.composition.workers import full
from tests.reference import MODES, assert_near, make

__all__ = ["CHECKS"]


def load(name: str, mode: str, rank: int, folder: str) -> None:
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


CHECKS = {f"load-{name}-{mode}": partial(load, name, mode) for name in NAMES for mode in MODES}
