"""DDP, FSDP2, the compiler with both, pipelines and checkpoints in several processes; every check in them is a test."""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest

from tests.composition import compile_checks, ddp_checks, fsdp_checks, load_checks, pipeline_checks
from tests.composition.processes import failures_of

ROOT = Path(__file__).parents[2]

once = cache(failures_of)


@pytest.mark.parametrize("check", ddp_checks.CHECKS)
def test_ddp(check: str):
    failures = once("ddp_checks")
    assert check not in failures, failures[check]


@pytest.mark.parametrize("check", fsdp_checks.CHECKS)
def test_fsdp2(check: str):
    failures = once("fsdp_checks")
    assert check not in failures, failures[check]


@pytest.mark.parametrize("check", compile_checks.CHECKS)
def test_compiled(check: str):
    failures = once("compile_checks")
    assert check not in failures, failures[check]


@pytest.mark.parametrize("check", pipeline_checks.CHECKS)
def test_pipeline(check: str):
    failures = once("pipeline_checks")
    assert check not in failures, failures[check]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What two processes saved."""
    folder = str(tmp_path_factory.mktemp("saved"))
    assert not failures_of("save_checks", 2, folder)
    return folder


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("check", load_checks.CHECKS)
def test_distributed_checkpoint(check: str, world: int, saved: str):
    failures = once("load_checks", world, saved)
    assert check not in failures, failures[check]


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
