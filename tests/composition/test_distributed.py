"""DDP, FSDP2, the compiler with both, pipelines and checkpoints in several processes, all checks of a suite in one."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import invzoo as iz
from tests.composition.processes import failures_of
from tests.reference import assert_near

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def check(suite: str, world: int = 2, *args: str) -> None:
    failures = failures_of(suite, world, *args)
    assert not failures, "\n".join(f"{name}: {what}" for name, what in failures.items())


@pytest.mark.usual
def test_some_of_each():
    check("usual_checks")


@pytest.mark.usual
@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_fsdp2_of_subnets_in_one_process(mode: str):
    net, x = iz.InvertibleSequential(*(iz.AdditiveCoupling(nn.Linear(2, 2)) for _ in range(3))), torch.randn(3, 4)
    expected = torch.autograd.grad(net(x).square().sum(), [*net.parameters()])
    net.mode = mode
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*(layer.f for layer in net), net):
            fully_shard(module, mesh=mesh)
        net(x).square().sum().backward()
        assert_near([p.grad.full_tensor() for p in net.parameters()], [*expected])
        loss = net(x).square().sum()
        with torch.no_grad():
            net[1].f.weight.mul_(2)
        with pytest.raises(RuntimeError, match="got a change of 'weight'"):
            loss.backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("suite", ["ddp_checks", "fsdp_checks", "compile_checks", "pipeline_checks"])
def test_all_of(suite: str):
    check(suite)


def test_distributed_checkpoint(tmp_path: Path):
    """What two processes saved is loaded by one, and by four."""
    for does, world in (("save", 2), ("load", 1), ("load", 4)):
        check("saving_checks", world, does, str(tmp_path))


def test_a_script_runs_alone_and_under_torchrun():
    script = [str(ROOT / "notebooks" / "distributed.py"), "--device", "cpu", "--steps", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    processes = [start([sys.executable, *words]) for words in (script, torchrun + script)]
    try:
        said = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said):
        # Without its barrier the script, like any other of torch's, dies now and then after all is done ("terminate
        # called without an active exception"): DTensor's caches hold the process group, whose threads let go of the
        # last collective's tensors with Python's lock, while Python ends.
        assert process.returncode == 0, errors
    alone, together = ([float(line.split()[-1]) for line in out.splitlines()] for out, _ in said)
    assert len(alone) == 3
    assert alone[-1] < alone[0]
    assert together == pytest.approx(alone, rel=1e-4)
