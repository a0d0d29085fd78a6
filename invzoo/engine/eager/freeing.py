"""Freeing the memory of a tensor that the caller still holds, guarded: reading it says who freed it.

The storage is resized to zero, and the tensor's class becomes `FreedTensor`, whose `__torch_function__` refuses
everything but metadata; torch swaps classes likewise for `UninitializedParameter`. The rebuilt value is copied back
into the same storage, so the caller's tensor is the same object as before, with the same version.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import allow_data, between_processes, deny_data, preserve_version, storage_owners
from ..state import steps_aside
from .slots import Slot, key_of, slot_of

__all__ = ["FreedTensor", "freeing"]

_METADATA = frozenset(  # what tells of a tensor without reading its memory
    """_base _is_view _version __hash__ __len__ device dim dtype element_size get_device grad grad_fn is_complex is_conj
    is_contiguous is_cpu is_cuda is_floating_point is_inference is_leaf is_meta is_neg is_sparse itemsize layout names
    nbytes ndim ndimension nelement numel output_nr register_hook requires_grad retain_grad retains_grad shape size
    storage storage_offset stride untyped_storage""".split()  # noqa: SIM905 - a list of words reads best as words
)


class FreedTensor(Tensor):
    """A tensor whose memory an invertible call freed, until backward rebuilds it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        name = getattr(func.__self__, "__name__", name) if name == "__get__" else name
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(_message(args, kwargs or {}))

    _freed: str  # what to say
    _slot: Slot  # that gets its value again


def _message(*values: Any) -> str:
    """Return what the first freed tensor among the arguments of an operator has to say."""
    todo = [*values]
    while todo:
        value = todo.pop()
        if isinstance(value, FreedTensor):
            return value._freed
        if isinstance(value, tuple | list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
    return "Expected a tensor with memory; got one that an invertible call freed"


class Freed:
    """The caller's tensor behind a slot: freed, and given back when the slot gets its value."""

    __slots__ = ("nbytes", "promised", "tensor", "type")

    def __init__(self, tensor: Tensor):
        self.tensor = weakref.ref(tensor)
        self.type: type[Tensor] | None = None  # that the tensor had before it was freed
        self.promised = False  # a backward will restore it
        self.nbytes = tensor.untyped_storage().nbytes()

    def free(self, name: str, slot: Slot) -> None:
        """Free the tensor, and let it hold the slot that it waits for."""
        tensor = self.tensor()
        if tensor is None:
            return
        message = (
            f"Expected the input of {name} not to be read before backward; it was freed, since free_input=True. "
            "Backward rebuilds it; pass a clone to read it earlier"
        )
        tensor.untyped_storage().resize_(0)
        deny_data(tensor, message)
        self.type, tensor.__class__ = type(tensor), FreedTensor
        tensor._freed, tensor._slot = message, slot  # type: ignore[attr-defined]

    def restore(self, value: Tensor) -> Tensor:
        """Give the caller's tensor its value back, and return what holds the value now."""
        tensor = self.tensor()
        if tensor is None or self.type is None:
            return value
        tensor.__class__, self.type = self.type, None
        del tensor._freed, tensor._slot  # type: ignore[attr-defined]
        allow_data(tensor)
        tensor.untyped_storage().resize_(self.nbytes)
        with torch.no_grad(), preserve_version(tensor):
            tensor.copy_(value)
        return tensor.detach()


def _refusal(tensor: Tensor) -> str | None:
    """Say why this tensor cannot be freed safely, if so."""
    if torch.compiler.is_compiling():
        return "a compiled call"
    if tensor.requires_grad and tensor.is_leaf:
        return "a leaf that needs its gradient"
    if tensor._is_view():
        return "a view"
    if tensor.layout is not torch.strided or type(tensor) is not Tensor:
        return f"a {type(tensor).__name__} with layout {tensor.layout}"
    if not tensor.untyped_storage().resizable() or between_processes(tensor):
        return "memory that is numpy's, say, or other processes' too"
    return None


@contextlib.contextmanager
def freeing(name: str, inputs: Sequence[Any]) -> Iterator[None]:
    """Free the inputs of the calls made inside, if one of them consumed them and can rebuild them.

    Raises:
        ValueError: for an input that cannot be freed safely: a leaf that needs its gradient, a view, or a tensor whose
            memory others use too (views of it, or what autograd saved of it).
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if not torch.compiler.is_compiling() and steps_aside():
        yield
        return
    for x in tensors:
        if isinstance(x, FreedTensor):
            raise RuntimeError(x._freed)  # noqa: TRY004 - as from every other read
        if reason := _refusal(x):
            raise ValueError(f"{name}: Expected free_input=True for a tensor that can be freed; got {reason}")
    heads = []
    for x in tensors:
        key = key_of(x)
        slot = slot_of(x, key) or Slot(x, key, threading.RLock())
        slot.freed = freed = Freed(x)
        slot.head = weakref.ref(slot)
        heads.append((x, slot, freed))
    yield
    promised = [head for head in heads if head[2].promised]
    for x, _, _ in promised:
        if storage_owners(x) != 1:
            raise ValueError(
                f"{name}: Expected free_input=True for a tensor that can be freed; got one whose memory is in use "
                "elsewhere (a view of it, or autograd saved it for backward). Pass a clone"
            )
    for _, slot, freed in promised:
        freed.free(name, slot)
