"""A second device, simulated: "elsewhere" computes on the CPU, and torch takes it for an accelerator.

Its backward runs in a thread of autograd's own, as on a GPU, and its random numbers come from a generator of its own.
Its streams are objects that note who waits for whom: what an operator reads has to be in order with what wrote it, and
what was read on another stream than its own must not be freed before that is recorded. Importing it registers the
device for the whole process, so only `second_device_checks.py` does.
"""

import contextlib
import weakref
from collections import Counter
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = [
    "CALLS",
    "DEVICE",
    "Elsewhere",
    "Race",
    "Stream",
    "Streams",
    "back",
    "calls",
    "move",
    "streams_checked",
    "there",
]

CALLS: Counter[str] = Counter()


class _Module:
    """What torch wants of `torch.elsewhere`."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> Tensor:
        CALLS["get_rng_state"] += 1
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        CALLS["set_rng_state"] += 1
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


MODULE = _Module()
_setup_privateuseone_for_python_backend("elsewhere", MODULE)
DEVICE = torch.device("elsewhere:0")


class Race(AssertionError):
    """Two streams used one tensor in no order."""


class Stream:
    """A stream with a clock for each stream that it is in order with."""

    device = DEVICE

    def __init__(self, name: str) -> None:
        self.name, self.clock = name, Counter({name: 0})

    def tick(self) -> tuple["Stream", int]:
        self.clock[self.name] += 1
        return self, self.clock[self.name]

    def wait_stream(self, other: "Stream") -> None:
        for name, time in other.clock.items():
            self.clock[name] = max(self.clock[name], time)

    def is_behind(self, event: tuple["Stream", int]) -> bool:
        stream, time = event
        return self.clock[stream.name] >= time

    def __enter__(self) -> None:
        self.before = Stream.current
        Stream.current = self

    def __exit__(self, *error: object) -> None:
        Stream.current = self.before

    def __repr__(self) -> str:
        return f"Stream({self.name})"

    current: "Stream"


MAIN = Stream.current = Stream("main")
torch.accelerator.current_stream = lambda device=None: Stream.current  # every stream of torch's simulation is the same


class _Memory:
    """Who wrote a tensor's memory, who read it, and who else the allocator knows of."""

    def __init__(self) -> None:
        self.home = Stream.current
        self.written: tuple[Stream, int] | None = None
        self.read: list[tuple[Stream, int]] = []
        self.recorded = {self.home.name}

    def use(self, event: tuple[Stream, int], what: str, writes: bool) -> None:
        for other in [self.written, *(self.read if writes else ())]:
            if other is not None and not event[0].is_behind(other):
                raise Race(f"{what} on {event[0]} is not in order with what {other[0]} did")
        if writes:
            self.written, self.read = event, []
        elif Streams.replaying:
            self.read.append(event)

    def free(self) -> None:
        late = [s for s, t in self.read if s.name not in self.recorded and not self.home.is_behind((s, t))]
        if late and Streams.checked:
            Streams.freed_early.append(f"memory of {self.home} was freed while {late[0]} read it")


class Streams:
    """Whether uses are checked, and what was freed too early (a finalizer cannot raise)."""

    checked = False
    replaying = 0  # what autograd and the user read, they record themselves
    freed_early: ClassVar[list[str]] = []


@contextlib.contextmanager
def streams_checked() -> Any:
    """Raise for a race inside."""
    Streams.checked, Streams.freed_early = True, []
    try:
        yield
    finally:
        Streams.checked = False
    if Streams.freed_early:
        raise Race(Streams.freed_early[0])


_MEMORIES: "weakref.WeakKeyDictionary[torch.UntypedStorage, _Memory]" = weakref.WeakKeyDictionary()


def _memory(data: Tensor) -> _Memory:
    storage = data.untyped_storage()
    if storage not in _MEMORIES:
        _MEMORIES[storage] = memory = _Memory()
        weakref.finalize(storage, memory.free)
    return _MEMORIES[storage]


class Elsewhere(Tensor):
    """A tensor on the device; the values are in a tensor on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, *, requires_grad: bool = False) -> Self:
        form = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        self = Tensor._make_wrapper_subclass(cls, values.shape, device=DEVICE, requires_grad=requires_grad, **form)
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> list[Any]:
        return self.values.tolist()

    def record_stream(self, stream: Stream) -> None:
        CALLS["record_stream"] += 1
        _memory(self.values).recorded.add(stream.name)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU with the device's generator, and return results on the device."""
    goes_back = "device" in kwargs and torch.device(kwargs["device"] or DEVICE).type == "cpu"
    mutated = {i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write}
    if any(type(x) is Tensor and x.ndim for x in [*args, *kwargs.values()]) and "copy" not in str(func):
        raise RuntimeError(f"Expected all tensors to be on the same device; got some on the CPU for {func}")
    given, named = tree_map_only(Elsewhere, lambda x: x.values, (args, {**kwargs}))
    if "device" in named:
        named["device"] = "cpu"
    before = torch.get_rng_state() if torch.Tag.nondeterministic_seeded in func.tags else None
    if before is not None:
        torch.set_rng_state(MODULE.generator.get_state())
    try:
        result = func(*given, **named)
    finally:
        if before is not None:
            MODULE.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)
    views = any(a.alias_info is not None for a in func._schema.arguments) and not mutated
    if Streams.checked and not views:
        event = Stream.current.tick()
        writes = [args[i] for i in mutated if i < len(args)]
        for x in [x for x in [*args, *kwargs.values()] if isinstance(x, Elsewhere)]:
            _memory(x.values).use(event, str(func), any(x is w for w in writes))
        fresh: list[Tensor] = []
        tree_map_only(Tensor, fresh.append, result)
        for x in fresh:
            if not mutated and not goes_back:
                _memory(x).use(event, str(func), True)
    if mutated:
        written = args[min(mutated)] if min(mutated) < len(args) else kwargs["out"]
        return written if isinstance(result, Tensor) else result
    return result if goes_back else tree_map_only(Tensor, Elsewhere, result)


def _factory(func: Any, *args: Any, **kwargs: Any) -> Any:
    return run(func, args, kwargs)


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_factory, "PrivateUse1")  # of what takes no tensor: `torch.empty(..., device="elsewhere")`

_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # of what autocast leaves alone


def _autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = torch.get_autocast_dtype("elsewhere")
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return nn.functional.linear(*(t if t is None else t.to(dtype) for t in (x, weight, bias)))


_ATEN = torch.library.Library("aten", "IMPL")
for _name in ("default", "start", "start_step"):  # torch's own resizes a tensor on the device, which this one cannot
    _op = getattr(torch.ops.aten.arange, _name)
    _ATEN.impl(_op.name().removeprefix("aten::"), partial(_factory, _op), "PrivateUse1")
_ATEN.impl("linear", _autocast_linear, "AutocastPrivateUse1")


def there(x: Tensor, *, requires_grad: bool = False) -> Elsewhere:
    """Move a tensor to the device."""
    return Elsewhere(x.detach().clone(), requires_grad=requires_grad)


def back(x: Tensor) -> Tensor:
    """Move a tensor to the CPU."""
    return x.detach().values.clone() if isinstance(x, Elsewhere) else x.detach()


def move(net: nn.Module) -> nn.Module:
    """Move a net to the device."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(there(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = there(buffer)
    return net


@contextlib.contextmanager
def calls() -> Any:
    """Count the calls of the device's module."""
    CALLS.clear()
    yield CALLS
