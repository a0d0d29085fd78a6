"""Accelerators, whichever they are: which of them a call uses, their generators, and the streams that they work on.

NOTE [Streams]

A device works through each of its streams in order, and through several at once, unless one waits for another. Autograd
runs a node's backward on the stream of its forward and orders gradients between streams, but what a replay reads
and writes is no gradient, and one call's node may rebuild other calls. So the engine sees to it itself:

1. A replay runs on the streams of its forward, as the nodes that it stands for do. Where another stream asks for it,
   that of a later or an earlier call, say, both wait: the replay for what was asked before, the asker for the replay.
2. A slot knows the stream on which it got its value. Whoever takes the value on another stream waits for that one, and
   records its own on the value (`Tensor.record_stream`), so that the allocator gives the memory to nobody too early.
3. Streams inside a function, and the events between them, are the function's own: a replay repeats them with it.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "accelerators",
    "elsewhere",
    "hand_over",
    "module_of",
    "on_streams",
    "read_later",
    "stream_of",
    "streams_of",
    "waits_to_be_read",
]


def accelerators(*groups: Iterable[Tensor]) -> set[torch.device]:
    """Collect the devices besides the CPU that tensors are on, if this machine has any at all."""
    if not torch.accelerator.is_available():
        return set()
    return {t.device for group in groups for t in group if t.device.type not in ("cpu", "meta")}


def module_of(device: torch.device) -> Any:
    """Return torch's module for a device; None for one that is not here, as behind some fake tensors."""
    module = getattr(torch, device.type, None)
    return module if module is not None and module.is_available() else None


def streams_of(devices: Iterable[torch.device]) -> list[Any]:
    """Return the streams that devices work on now; a device of another kind than the accelerator here has none."""
    here = torch.accelerator.current_accelerator()
    return [torch.accelerator.current_stream(d) for d in devices if here is not None and d.type == here.type]


def stream_of(tensor: Tensor) -> Any:
    """Return the stream that a tensor's device works on now; None on the CPU."""
    streams = [] if tensor.is_cpu else streams_of([tensor.device])
    return streams[0] if streams else None


def hand_over(tensor: Tensor, stream: Any) -> None:
    """Let the current stream have a tensor from ``stream``, if that is another."""
    now = stream_of(tensor)
    if now != stream:
        now.wait_stream(stream)
        tensor.record_stream(now)


def waits_to_be_read(tensor: Tensor) -> bool:
    """Whether who reads a tensor has to wait for its device."""
    return not tensor.is_cpu


def read_later(flag: Tensor) -> Callable[[], bool]:
    """Start to fetch a flag from its device, and return what reads it; that waits for no work begun later."""
    fetched, arrival = flag.to("cpu", non_blocking=True), torch.Event(flag.device)
    arrival.record()

    def read() -> bool:
        arrival.synchronize()
        return bool(fetched)

    return read


def elsewhere(streams: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pair those of ``streams`` that are not their device's current one with the current one."""
    return [(stream, now) for stream in streams if (now := torch.accelerator.current_stream(stream.device)) != stream]


def on_streams(streams: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Work on these streams, in order with the current ones."""
    others = elsewhere(streams)
    if not others:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for stream, now in others:
        stream.wait_stream(now)
        stack.callback(now.wait_stream, stream)
        stack.enter_context(stream)
    return stack
