"""Memory counted exactly: the bytes of the tensor storages that are alive, now and at the peak."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

__all__ = ["track_memory"]

# NOTE [How storages are counted]
# 1. Every operator, in forward and in backward, passes through `__torch_dispatch__`. An output whose storage is not
#    that of an input is a new storage, and gets one entry; views and in-place results add none.
# 2. torch keeps one Python object per storage for as long as the storage lives, so the callback of a weak reference
#    to it runs at the very moment when the last tensor dies.
# 3. `UntypedStorage.resize_` is no operator and goes unseen. A storage that grew is seen by the operator that fills
#    it. One that shrank leaves the count too high, which matters only to a reading and to a new peak: both recount.


class track_memory(TorchDispatchMode):  # noqa: N801 - reads as the verb that it is, like torch.no_grad
    """Counts the bytes of the tensor storages that are created inside the context, exactly and on any device.

    A storage counts once however many views it has, from the operator that returns it until its last tensor dies; one
    freed by `untyped_storage().resize_(0)` counts nothing. Nothing depends on a clock, on the allocator or on the
    garbage collector, so a test can ask for equality. Backward is followed too: by the calling thread and, for other
    devices, by the threads of autograd. Another Python thread enters the same tracker to have its tensors counted.

    Not seen: buffers that a kernel allocates for itself and never returns, what an allocator rounds up, sparse tensors,
    and what torch makes below its dispatcher (`torch.get_rng_state()`, `torch.UntypedStorage(n)`). Compiled functions
    run eagerly inside the context, and one whose first call is inside stays eager. `FakeTensorMode` goes with it, and
    then the bytes are those that real tensors would take.

    Args:
        device: count the storages of this device only; `"cuda"` stands for every CUDA device.
        include: tensors and modules (parameters and buffers) that exist already and are to be counted as well.

    Raises:
        TypeError: `include` holds something else.

    Example:
        >>> with track_memory() as memory:
        ...     x = torch.zeros(256)
        ...     y = x.view(16, 16) + 1
        ...     del x
        >>> memory.current, memory.peak
        (1024, 2048)
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        include: Tensor | nn.Module | Iterable[Tensor | nn.Module] = (),
    ) -> None:
        import_module("torch._dynamo")  # else the first operator does, and keeps the caller's frames until a collection
        super().__init__()
        included = [include] if isinstance(include, Tensor | nn.Module) else [*include]
        for item in included:
            if not isinstance(item, Tensor | nn.Module):
                got = type(item).__name__
                raise TypeError(f"track_memory: Expected include to hold tensors and modules; got {got}")
        self._device = None if device is None else torch.device(device)
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.RLock()  # reentrant: counting can be what drops the last reference to a storage
        self._current = 0
        for storage in self._storages(included):
            self._count(storage)
        self._peak = self._current

    @property
    def current(self) -> int:
        """Bytes alive now. After the context they still fall as tensors die."""
        for entry in list(self._entries.values()):
            if (storage := entry()) is not None:
                self._settle(entry, storage.nbytes())
        return self._current

    @property
    def peak(self) -> int:
        """The largest number of bytes that were alive at once, since the start or the last `reset_peak`."""
        return self._peak

    def reset_peak(self) -> None:
        """Lets the peak start again from what is alive now."""
        self._peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(storage): storage for storage in self._storages((args, kwargs))}
        outputs = func(*args, **(kwargs or {}))
        # what `torch.tensor` allocates is announced as the input of `lift_fresh`; other unknown inputs are from outside
        fresh = func is torch.ops.aten.lift_fresh.default
        for key, storage in inputs.items():
            if fresh or key in self._entries:
                self._count(storage)
        for storage in self._storages(outputs):
            if id(storage) not in inputs:
                self._count(storage)
        if self._current > self._peak:
            self._peak = max(self._peak, self.current)
        return outputs

    def _storages(self, value: Any) -> Iterator[UntypedStorage]:
        if isinstance(value, Tensor):
            if is_traceable_wrapper_subclass(value):
                yield from self._storages([getattr(value, name) for name in value.__tensor_flatten__()[0]])
            elif value.layout is torch.strided and self._counts(value.device):
                yield value.untyped_storage()
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from self._storages(item)
        elif isinstance(value, nn.Module):
            yield from self._storages([*value.parameters(), *value.buffers()])

    def _counts(self, device: torch.device) -> bool:
        wanted = self._device or device
        return wanted.type == device.type and wanted.index in (None, device.index)

    def _count(self, storage: UntypedStorage) -> None:
        with self._lock:
            entry = self._entries.get(id(storage))
            if entry is None:
                entry = _Entry(storage, _forget)
                entry.key, entry.nbytes, entry.tracker = id(storage), 0, weakref.ref(self)
                self._entries[entry.key] = entry  # where other threads look, so when it is whole
            self._settle(entry, storage.nbytes())

    def _settle(self, entry: "_Entry", nbytes: int) -> None:
        with self._lock:
            self._current += nbytes - entry.nbytes
            entry.nbytes = nbytes


class _Entry(weakref.ref[UntypedStorage]):
    """A weak reference to a storage, with the bytes that it counts for in a tracker."""

    __slots__ = ("key", "nbytes", "tracker")
    key: int
    nbytes: int
    tracker: weakref.ref[track_memory]


def _forget(entry: _Entry) -> None:
    tracker = entry.tracker()
    if tracker is not None:
        del tracker._entries[entry.key]
        tracker._settle(entry, 0)
