"""How time and memory are read: alternating steps, exact counts of bytes, and resident sets of fresh processes."""

import ctypes
import gc
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from invzoo.testing import track_memory

__all__ = [
    "GIVE_BACK",
    "PYTHON_IN_MALLOC",
    "alternate",
    "bytes_of_process",
    "in_fresh_process",
    "one_thread",
    "peak_of_process",
    "peak_of_tensors",
    "seconds_of",
]


def alternate(steps: Mapping[str, Callable[[], float]], rounds: int, warm_up: int) -> dict[str, dict[str, Any]]:
    """Let the contestants take turns, and return quartiles of their seconds and of their ratios to each round's first,
    with the number of threads that they had.

    A step returns the seconds that count. In a round all contestants see the same machine, whatever else runs on it.
    """
    for _ in range(warm_up):
        for step in steps.values():
            step()
    seconds = np.array([[step() for step in steps.values()] for _ in range(rounds)])
    ratios = seconds / seconds[:, :1]
    times, ratios = (np.quantile(values, (0.25, 0.5, 0.75), axis=0).T.tolist() for values in (seconds, ratios))
    threads = torch.get_num_threads()
    return {n: {"seconds": s, "ratio": r, "threads": threads} for n, s, r in zip(steps, times, ratios, strict=True)}


def seconds_of(forward: Callable[[], Tensor], grad: Tensor | None = None) -> float:
    """Return the time of one forward and backward."""
    _synchronize()
    start = time.perf_counter()
    forward().backward(grad)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_of_tensors(forward: Callable[[], Tensor], grad: Tensor | None = None) -> dict[str, int]:
    """Return the exact bytes of tensors held after forward, and at the peak of forward and backward.

    What was there before is not counted: weights, gradients, the input.
    """
    with track_memory() as memory:
        y = forward()
        held = memory.current
        y.backward(grad)
    return {"held": held, "peak": memory.peak}


def bytes_of_process(forward: Callable[[], Tensor]) -> int | None:
    """Return the bytes that the process holds after forward: tensors, graphs, random states and, in a process
    that runs with `PYTHON_IN_MALLOC`, Python's objects; None without glibc.
    """
    before = _allocated()
    y = forward()
    after = _allocated()
    del y
    return None if before is None or after is None else after - before


class _MallInfo(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _allocated() -> int | None:
    gc.collect()
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def peak_of_process(step: Callable[[], object]) -> int | None:
    """Return the peak of the resident set in `step` over its size before; None without Linux's /proc."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    gc.collect()
    clear.write_text("5")  # sets the high-water mark to what is resident now
    start = _status("VmRSS")
    step()
    return _status("VmHWM") - start


def _status(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# With these, glibc gives every larger block back to the system when it is freed.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
PYTHON_IN_MALLOC = {"PYTHONMALLOC": "malloc"}  # so that Python's objects are counted where tensors are


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work with one thread: on small tensors several wait for each other, and for other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_fresh_process(environment: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, called in a new process with these variables added to its environment."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        return pool.submit(function, *arguments).result()
