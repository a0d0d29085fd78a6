"""What a replay writes on: the inputs that it rebuilds, and what autograd saves of the function's pieces."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._torch import (
    between_processes,
    is_distributed,
    is_fake,
    keeps_graph,
    set_grad_enabled,
    storage_owners,
    transparent,
    version_of,
)
from ..nested import tuple_of
from ..operation import Operation
from ..state import state
from .links import Links
from .saved import Meta, Saved

__all__ = ["Input", "Tape"]


@dataclass(slots=True)
class Input:
    """What a rebuilt input has to look like; and the version of the original."""

    version: int
    requires_grad: bool
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    attributes: dict[str, Any]  # that the caller set on the original

    @classmethod
    def of(cls, tensor: Tensor, attributes: dict[str, Any]) -> "Input":
        stride = tensor.stride() if tensor.layout is torch.strided else ()
        return cls(version_of(tensor), tensor.requires_grad, tensor.dtype, tensor.shape, stride, attributes)

    def accept(self, value: Any, name: str, position: int) -> Tensor:
        """Return ``value`` in this dtype, if it can be the input at all."""
        if not isinstance(value, Tensor) or value.shape != self.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RuntimeError(
                f"Expected the inverse of {name} to return a tensor of shape {tuple(self.shape)} for input {position}; "
                f"got {got}"
            )
        return value if value.dtype == self.dtype else value.detach().to(self.dtype)

    def leaf(self, value: Tensor) -> Tensor:
        """Return ``value`` as a function must get it: in the memory format that it had, for its views and copies."""
        dense = value.layout is torch.strided and not is_distributed(value)  # shards keep a format of their own
        if dense and value.stride() != self.stride and _is_disjoint(self.shape, self.stride):
            value = torch.empty_strided(value.shape, self.stride, dtype=value.dtype, device=value.device).copy_(value)
        leaf = value.detach().requires_grad_(self.requires_grad)
        if self.attributes:
            vars(leaf).update(self.attributes)
        return leaf


def _is_disjoint(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether no two entries share memory."""
    extent = 1
    for step, size in sorted((st, n) for st, n in zip(stride, shape, strict=True) if n != 1):
        if step < extent:
            return False
        extent = step * (size - 1) + extent
    return True


class Replayed(Protocol):
    """The call that is replayed, as far as its tape has to know it."""

    operation: Operation
    inputs: list[Any]
    saved: Saved
    links: Links
    surroundings: Any
    side: dict[str, Any]


def inverted(call: Replayed, outputs: tuple[Any, ...]) -> list[Any]:
    """Compute the inputs of a call from its outputs."""
    inverse: Callable[..., Any] = call.operation.inverse  # type: ignore[assignment]  # mode invert has one
    passed = call.links.passed
    known = {i for i, x in enumerate(call.inputs) if not isinstance(x, Input)} | passed.keys()
    values = [None] * len(call.inputs)
    if len(known) < len(values):
        saved = {"saved": known} if call.operation.takes_saved else {}
        values = list(tuple_of(inverse(*outputs, **call.side, **saved)))
        if len(values) != len(call.inputs):
            raise RuntimeError(
                f"Expected the inverse of {call.operation.name} to return {len(call.inputs)} values; got {len(values)}"
            )
    for i in known:
        values[i] = outputs[passed[i]] if i in passed else call.inputs[i]
    return values


class _AllSaved(BaseException):
    """The replay has saved all that its forward saved; a function cannot take it for an error of its own."""


class Tape:
    """What a replay writes on.

    A replay calls :meth:`input` for every input position and :meth:`run` for pieces that together are the function,
    in the function's order. It runs without gradients; only :meth:`run` records.
    """

    __slots__ = ("_call", "_captured", "_metas", "_short", "_started", "inputs")

    def __init__(self, call: Replayed):
        self._call = call
        self._captured: list[tuple[Tensor, int] | None] = []  # with their versions
        self._metas: list[Meta] = []
        self._short = self._started = False
        self.inputs: list[Any] = [None if isinstance(i, Input) else i for i in call.inputs]

    def input(self, position: int, value: Any) -> Any:
        """Take ``value`` as the input at ``position``, and return it as :meth:`run` must get it."""
        spec = self._call.inputs[position]
        if isinstance(spec, Input):
            self.inputs[position] = spec.leaf(spec.accept(value, self._call.operation.name, position))
        return self.inputs[position]

    def invert(self, *outputs: Any) -> list[Any]:
        """Rebuild all inputs with the inverse."""
        return [self.input(i, v) for i, v in enumerate(inverted(self._call, outputs))]

    def owns(self, output: Tensor) -> bool:
        """Whether nobody else can see an output, nor needs it again: its memory may take the input then."""
        if torch.compiler.is_compiling():  # who traces a backward cannot count
            return False
        if type(output) is not Tensor and not is_fake(output):
            return False  # a wrapper (DTensor, say) shares tensors that its own storage knows nothing of
        nbytes = output.numel() * output.element_size()
        alone = storage_owners(output) == 1 and output.untyped_storage().nbytes() == nbytes
        return alone and not keeps_graph() and not self._call.links.shares(output) and not between_processes(output)

    def run(self, function: Callable[..., Any], *args: Any, **side: Any) -> Any:
        """Evaluate a piece of the function; what autograd saves meanwhile goes to the graph of the forward."""
        if not self._started:
            self._call.surroundings.rewind()  # the inverse may have moved what the function finds
            self._started = True
        set_grad_enabled(True)
        state.packing.append(capture := transparent(self._capture))
        try:
            with saved_tensors_hooks(capture, _same):
                return function(*args, **side)
        finally:
            state.packing.pop()
            set_grad_enabled(False)

    def run_until_saved(self, function: Callable[..., Any], *args: Any, **side: Any) -> None:
        """Evaluate the function as far as autograd saved anything of it; what comes behind that, nobody needs."""
        if self._call.surroundings.generators.states:  # of which all numbers are counted
            self.run(function, *args, **side)
            return
        if self._metas == self._call.saved.metas:
            return
        self._short = True
        with contextlib.suppress(_AllSaved):
            self.run(function, *args, **side)

    def _capture(self, tensor: Tensor) -> Tensor:
        """Take what autograd saves, as the pack hook of a piece."""
        value, saved = tensor.detach(), self._call.saved
        index = len(self._metas)
        self._metas.append((tensor.shape, tensor.dtype))
        awaited = index < len(saved.handles) and saved.handles[index]() is not None
        self._captured.append((value, version_of(value)) if awaited else None)
        if self._short and self._metas == saved.metas:
            raise _AllSaved
        return value

    def forget(self) -> None:
        """Let go of all: a tensor that the function left somewhere holds the hooks that saw it, and so the tape."""
        self._captured.clear()
        self.inputs.clear()

    def saved(self) -> list[Tensor | None]:
        """Return what autograd saved again, in order; None for what nobody awaits any more."""
        if self._metas != self._call.saved.metas:
            raise RuntimeError(
                f"Expected the replay of {self._call.operation.name} to save the tensors that its forward saved; got "
                f"{_summary(self._metas)} where forward saved {_summary(self._call.saved.metas)}. Is it deterministic, "
                "and does it depend on its inputs, parameters and buffers alone?"
            )
        return [None if saved is None else saved[0] for saved in self._captured]

    def fill(self) -> None:
        """Give the forward's graph what it saved."""
        self.saved()
        for ref, captured in zip(self._call.saved.handles, self._captured, strict=True):
            if captured is not None and (handle := ref()) is not None:
                handle.value, handle.version = captured


def _same(value: Any) -> Any:
    return value


def _summary(metas: Sequence[Meta]) -> str:
    return f"{len(metas)} tensors ({', '.join(str(tuple(shape)) for shape, _ in metas[:8])}...)"
