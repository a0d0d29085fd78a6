"""DDP and FSDP2 in two processes, spawned once for each; every check of `workers` is a test."""

import os
import queue
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import pytest
from torch import multiprocessing

from tests.composition.workers import DDP_CHECKS, FSDP_CHECKS, WORLD, serve

SECONDS = 150


@cache
def failures_of(suite: str) -> dict[str, str]:
    """Run a suite in two processes; return the failures by check, or raise if a process died or hung."""
    context, before = multiprocessing.get_context("spawn"), os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    answers, failures = context.Queue(), {}
    with TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        processes = [context.Process(target=serve, args=(r, store, suite, answers), daemon=True) for r in range(WORLD)]
        try:
            for process in processes:
                process.start()
            received, end = 0, monotonic() + SECONDS
            while received < WORLD:
                try:
                    rank, found = answers.get(timeout=1)
                except queue.Empty:
                    if monotonic() > end:
                        raise TimeoutError(f"the processes of {suite} hung for {SECONDS} s") from None
                    if any(p.exitcode not in (None, 0) for p in processes):
                        codes = [p.exitcode for p in processes]
                        raise RuntimeError(f"a process of {suite} died: exit codes {codes}") from None
                    continue
                received += 1
                for name, text in found.items():
                    failures[name] = failures.get(name, "") + f"\nin process {rank}:\n{text}"
            for process in processes:
                process.join(20)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
            if before is None:
                del os.environ["GLOO_SOCKET_IFNAME"]
            else:
                os.environ["GLOO_SOCKET_IFNAME"] = before
    return failures


@pytest.mark.parametrize("check", DDP_CHECKS)
def test_ddp(check: str):
    failures = failures_of("ddp")
    assert check not in failures, failures[check]


@pytest.mark.parametrize("check", FSDP_CHECKS)
def test_fsdp2(check: str):
    failures = failures_of("fsdp")
    assert check not in failures, failures[check]
