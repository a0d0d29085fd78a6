"""Runs checks in several processes, all checks of a suite in the same ones, and brings back what went wrong."""

import datetime as dt
import faulthandler
import os
import queue
import traceback
from importlib import import_module
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

__all__ = ["failures_of"]

SECONDS = 300


def failures_of(suite: str, world: int = 2, *args: Any) -> dict[str, str]:
    """Run ``CHECKS`` of a module beside this one, each on ``(rank, *args)``; return the failures by check.

    Raises:
        RuntimeError: a process died.
        TimeoutError: they hung.
    """
    context, failures = _context(), {}
    answers = context.Queue()
    with TemporaryDirectory() as folder:
        serving = [(rank, world, str(Path(folder, "store")), suite, args, answers) for rank in range(world)]
        processes = [context.Process(target=serve, args=each, daemon=True) for each in serving]
        try:
            for process in processes:
                process.start()
            received, end = 0, monotonic() + SECONDS
            while received < world:
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
    return failures


def _context() -> BaseContext:
    """Return a way to start processes: forks of one that has imported torch and all checks, where there are forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    suites = ("usual_checks", "compile_checks", "saving_checks")  # and what these import
    context.set_forkserver_preload([f"tests.composition.{suite}" for suite in suites])
    return context


def serve(rank: int, world: int, store: str, suite: str, args: tuple[Any, ...], answers: Any) -> None:
    """Run all checks of a suite in one of the processes, and send what went wrong to the parent."""
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    failures: dict[str, str] = {}
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=dt.timedelta(seconds=30)
        )
    for name, check in import_module(f"tests.composition.{suite}").CHECKS.items():
        torch.manual_seed(0)
        try:
            check(rank, *args)
        except Exception:  # noqa: BLE001 - whatever it is, the parent raises it
            failures[name] = traceback.format_exc()
        if world == 1:
            continue
        # A check that fails in one process may leave the other waiting: both agree to go on, or both stop.
        failed = torch.tensor(float(name in failures))
        try:
            dist.all_reduce(failed)
        except RuntimeError:
            failures.setdefault(name, traceback.format_exc())
            break
    else:
        if world > 1:
            dist.barrier()  # as in notebooks/distributed.py
    answers.put((rank, failures))
    answers.close()
    answers.join_thread()  # whatever happens to the process while it takes leave of the others
    if world > 1:
        dist.destroy_process_group()
