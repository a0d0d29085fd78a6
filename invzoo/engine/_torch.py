"""Every private PyTorch interface that the engine uses, each with a check and what happens where it is missing."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, stateless
from torch.utils import _python_dispatch

__all__ = [
    "Stamp",
    "any_autocast",
    "at_end_of_backward",
    "backward_id",
    "between_processes",
    "compiler_watches",
    "compiling_nothing",
    "cpu_generator",
    "default_device",
    "deny_data",
    "digest",
    "forward_ad_active",
    "functorch_active",
    "has_ended",
    "hooks_enabled",
    "is_capturing",
    "is_distributed",
    "is_fake",
    "is_hollow",
    "is_wrapped",
    "keeps_graph",
    "may_step",
    "needs_gradient",
    "plainly",
    "preserve_version",
    "records_below",
    "reparametrized",
    "same_state",
    "set_grad_enabled",
    "stamps",
    "storage_key",
    "storage_owners",
    "top_hook",
    "tracing",
    "transparent",
    "unwrapped",
    "version_of",
    "weights_cached",
    "whole",
    "with_tensors",
    "without_modes",
]


def _private(path: str, fallback: Any) -> Any:
    value: Any = torch._C
    for name in path.split("."):
        value = getattr(value, name, None)
    return fallback if value is None else value


# Missing: every backward is treated as one that keeps its graph. Right, but memory falls one layer later.
keeps_graph: Callable[[], bool] = _private("_autograd._get_current_graph_task_keep_graph", lambda: True)

# Missing: an unpack looks as if it came from outside a backward, so each one replays its call anew. Right, but slow.
backward_id: Callable[[], int] = _private("_current_graph_task_id", lambda: -1)

# Missing: the engine does not notice a torch.func transform; torch then refuses the hooks itself.
functorch_active: Callable[[], bool] = _private("_are_functorch_transforms_active", lambda: False)

# Missing: calls inside a transform step aside.
_levels: Callable[[], Any] = _private("_functorch.get_interpreter_stack", lambda: None)


def records_below() -> bool | None:
    """Whether gradients are recorded below the transform that is active, if that is one `grad` or `vjp` alone."""
    levels = _levels()
    if levels is None or len(levels) != 1 or levels[0].key() != torch._C._functorch.TransformType.Grad:
        return None
    return bool(torch._C._functorch.CGradInterpreterPtr(levels[0]).prevGradMode())


# Whether a tensor belongs to a `grad` or `vjp`, even if that has ended. Missing: no tensor does.
is_wrapped: Callable[[Tensor], bool] = _private("_functorch.is_gradtrackingtensor", lambda _: False)

# Whether that has ended. Missing: it has not.
has_ended: Callable[[Tensor], bool] = _private("_functorch.is_dead_tensor_wrapper", lambda _: False)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor below."""
    return torch._C._functorch.get_unwrapped(tensor) if is_wrapped(tensor) else tensor


_is_batched: Callable[[Tensor], bool] = _private("_functorch.is_batchedtensor", lambda _: False)


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a tensor needs a gradient, or what a `vmap` made a batch of does."""
    while _is_batched(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


# Missing: hooks count as allowed, and entering them raises torch's own error where they are not.
hooks_enabled: Callable[[], bool] = _private("_autograd._saved_tensors_hooks_is_enabled", lambda: True)

# The pack and unpack hooks that autograd would use now. Missing: None, as if there were none.
_top_hooks: Callable[[bool], Any] = _private("_autograd._top_saved_tensors_default_hooks", lambda _: None)
_top_hooks = _private(
    "_autograd._top_saved_tensors_default_hooks", _private("_top_saved_tensors_default_hooks", _top_hooks)
)

# Missing: torch.jit.trace is not noticed.
tracing: Callable[[], Any] = _private("_get_tracing_state", lambda: None)

# Missing: autocast counts as active, and its state is looked up for each call.
any_autocast: Callable[[], bool] = _private("_is_any_autocast_enabled", lambda: True)

# Missing: the default device is looked up for each call.
_function_modes: Callable[[], int] = _private("_len_torch_function_stack", lambda: 1)

# `torch.no_grad()` without the context manager, which costs more than a small layer. Missing: the public class.
set_grad_enabled: Callable[[bool], Any] = _private("_set_grad_enabled", torch.set_grad_enabled)


def default_device() -> torch.device:
    """Return where tensors are made that are given no device: a context or `torch.set_default_device` may say."""
    return torch.get_default_device() if _function_modes() else _CPU


_CPU = torch.device("cpu")


def forward_ad_active() -> bool:
    """Whether forward-mode derivatives are being computed. Missing: False."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` when the running backward ends. Missing: never, and a kept graph holds one layer more."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is not None:
        engine.queue_callback(callback)


def storage_key(tensor: Tensor) -> int | None:
    """Identify a tensor's storage while it lives; None for tensors without one (sparse, opaque, lazy parameters)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):
        return None


_use_count: Callable[[int], int] | None = _private("_storage_Use_Count", None)


def storage_owners(tensor: Tensor) -> int | None:
    """Count the tensors that own this tensor's storage; None where torch cannot tell, and then nothing is freed."""
    if _use_count is None:
        return None
    storage = tensor.untyped_storage()  # this Python object owns it too
    return _use_count(storage._cdata) - 1


def between_processes(tensor: Tensor) -> bool:
    """Whether other processes may see a tensor's memory; on accelerators they hold it as owners do."""
    return tensor.is_cpu and tensor.is_shared()


_allow: Callable[[int], None] | None = _private("_clear_storage_data_ptr_access_error_msg", None)


def deny_data(tensor: Tensor, message: str) -> None:
    """Make C++ reads of this storage raise too, where that can be undone (CUDA builds); Python reads raise anyway."""
    deny = _private("_set_storage_data_ptr_access_error_msg", None)
    if deny is not None and _allow is not None:
        deny(tensor.untyped_storage()._cdata, message)


def allow_data(tensor: Tensor) -> None:
    """Undo :func:`deny_data`."""
    if _allow is not None:
        _allow(tensor.untyped_storage()._cdata)


def preserve_version(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Write into a tensor without moving its version counter. Missing: the version moves, and torch may complain."""
    preserve = getattr(torch.autograd, "_unsafe_preserve_version_counter", None)
    return contextlib.nullcontext() if preserve is None else preserve(tensor)


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place changes so far; inference tensors and lazy parameters do not count them."""
    try:
        return tensor._version
    except (RuntimeError, ValueError):
        return -1


Stamp = tuple[int, int | None, bool]  # of a tensor: its version, its storage, and whether it requires a gradient


def stamps(tensors: Iterable[Tensor]) -> list[Stamp]:
    """Return what shows that tensors were changed or given other data."""
    try:
        return [(x._version, x.untyped_storage()._cdata, x.requires_grad) for x in tensors]
    except (NotImplementedError, RuntimeError, ValueError):  # one of them has no version, or no storage
        return [(version_of(x), storage_key(x), x.requires_grad) for x in tensors]


def may_step(parameters: Iterable[Tensor]) -> bool:
    """Whether parameters have hooks that their gradients call, which may step an optimizer. Missing: they have none."""
    for p in parameters:  # noqa: SIM110 - a generator takes longer
        if getattr(p, "_post_accumulate_grad_hooks", None) or p._backward_hooks:
            return True
    return False


def weights_cached() -> bool:
    """Whether `parametrize.cached()` shares computed weights between calls. Missing: False."""
    return bool(getattr(parametrize, "_cache_enabled", 0))


# Lets a module have other parameters and buffers for a while. Missing: chains are compiled in pieces, and store.
with_tensors: Callable[..., Any] | None = getattr(stateless, "_reparametrize_module", None)


def reparametrized(modules: Sequence[Any], tensors: Sequence[dict[str, Tensor]], function: Callable[[], Any]) -> Any:
    """Call a function while modules have other parameters and buffers."""
    if not modules:
        return function()
    with with_tensors(modules[0], tensors[0]):  # type: ignore[misc]  # who comes here has looked for it
        return reparametrized(modules[1:], tensors[1:], function)


def top_hook() -> Any:
    """Return the pack hook that autograd would use now."""
    hooks = _top_hooks(True)
    return hooks[0] if hooks else None


@functools.cache
def _uncompiled_call() -> Any:
    return torch.compiler.disable(lambda function, *args: function(*args))


def transparent(pack: Callable[[Any], Any]) -> Any:
    """Return a pack hook that selective checkpoints and the compiler look past.

    What checkpoints cache is not the engine's to forget. From torch 2.14 on they hand it to the hook on top, or warn
    that they are going to. Missing: no attribute is read.

    The compiler would compile the hook when a compiled subnet saves something, and take versions for constants.
    """
    if torch.compiler.is_compiling():
        return pack
    call = _uncompiled_call() if "torch._dynamo" in sys.modules else None
    hook: Any = functools.partial(call, pack) if call else functools.partial(pack)
    hook._checkpoint_internal, hook._user_hooks = True, _top_hooks(True)
    return hook


# What the compiler does with functions that are called. Missing: nothing.
_frame_callback: Callable[[], Any] = _private("_dynamo.eval_frame.get_eval_frame_callback", lambda: None)


def compiler_watches() -> bool:
    """Whether the compiler would compile functions called now, as in what it left to Python."""
    return _frame_callback() not in (None, False)


def compiling_nothing() -> contextlib.AbstractContextManager[Any]:
    """Run compiled functions as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """Run operators past the dispatch modes of others, who would record or cache them. Missing: they see them."""
    disable = getattr(_python_dispatch, "_disable_current_modes", None)
    return contextlib.nullcontext() if disable is None else disable()


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no data to look at."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return tensor.is_meta or isinstance(tensor, getattr(module, "FakeTensor", ()))


def is_capturing(tensor: Tensor) -> bool:
    """Whether what runs on a tensor's device goes into a graph, so that nothing can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_hollow(tensor: Tensor) -> bool:
    """Whether a plain tensor's memory was taken away, as FSDP1 does between calls; who reads it crashes."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided  # what wraps others has no memory of its own
    return plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def same_state(a: Tensor, b: Tensor) -> bool:
    """Compare two states of a generator, which are real tensors even where others are fake."""
    with torch._C._DisableTorchDispatch():
        return torch.equal(_words(a), _words(b))


def digest(state: Tensor) -> int:
    """Sum up the state of a generator in one number."""
    with torch._C._DisableTorchDispatch():
        return hash(tuple(_words(state).tolist()))


def _words(state: Tensor) -> Tensor:
    """View the bytes of a state eight at a time, since operators take as long for one of each."""
    return state.view(torch.int64) if len(state) % 8 == 0 else state


def plainly() -> contextlib.AbstractContextManager[Any]:
    """Run operators as if no `vmap` were active and hooks were allowed: a graph made without them may be run inside."""
    if torch.compiler.is_compiling():  # a compiler that traces this would count one way alone
        return _NOTHING
    level = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    if level == 1 and hooks_enabled() and not functorch_active():
        return _NOTHING
    return _cleared(level - 1)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _cleared(level: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if functorch_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # noqa: PLC0415 - is private

            stack.enter_context(temporarily_clear_interpreter_stack())
        if not hooks_enabled():
            message: Any = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
            torch._C._autograd._saved_tensors_hooks_enable()
            stack.callback(torch._C._autograd._saved_tensors_hooks_disable, message)
        for _ in range(level):
            torch._C._vmapmode_decrement_nesting()
            stack.callback(torch._C._vmapmode_increment_nesting)
        yield


def is_distributed(tensor: Tensor) -> bool:
    """Whether a parameter is sharded, so that whoever shards it puts it in place (FSDP2)."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported, or not yet: then there is none
    return isinstance(tensor, getattr(module, "DTensor", ()))


def whole(tensor: Any) -> Tensor:
    """Gather a sharded parameter from all processes, which have to ask for it in the same order."""
    return tensor.full_tensor()


cpu_generator: torch.Generator = torch.default_generator
