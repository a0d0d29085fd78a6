"""Backward under the compiler: each call rebuilds what it took, and passes gradients on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..nested import tuple_of
from .operators import again, fingerprints, verified
from .record import Record, Step, is_float
from .tracer import find_used, used_tensors

__all__ = ["Replay"]


class Replay:
    """A backward through a record: what is known of its values, and the gradients so far."""

    def __init__(self, record: Record, saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        gradients[0].stride()  # a compiler that learns in a backward of strides starts anew, and cannot inside a vjp
        n, m = len(record.held), len(record.side_names)
        self.record = record
        if record.checked:
            self.prints, *saved = saved
        self.held = saved[:n]
        copies = [again(t, gradients[0]) for t in saved[n:]]
        self.side = dict(zip(record.side_names, copies[:m], strict=True))
        self.values = dict(zip(record.saved, copies[m:], strict=True))
        self.log_det = gradients[-1] if record.has_log_det else None
        self.gradients: dict[tuple[str, Any], Tensor] = {}
        for i, gradient in zip(record.outputs, gradients, strict=False):
            self._add(("value", i), gradient)

    def _add(self, key: tuple[str, Any], gradient: Tensor) -> None:
        """Add to the gradient of a value, side input or weight."""
        known = self.gradients.get(key)
        self.gradients[key] = gradient if known is None else known + gradient

    def undo(self, step: Step) -> None:
        """Rebuild a call's inputs, and pass the gradients of its outputs on to them (rule 3)."""
        side = {name: self.side[name] for name in step.side}
        tape = _Tape(step, self.held, side)
        if step.keeps:
            inputs = [tape.input(j, self.values[i]) for j, i in enumerate(step.inputs)]
            outputs = tape.run(step.operation.function, *inputs, **side, **step.constants)
        else:
            known = [self.values[i] for i in step.outputs[: len(step.outputs) - step.operation.log_det]]
            outputs = step.with_held(self.held, lambda: tape.replay(known))
            self.values.update(zip(step.inputs, tape.inputs, strict=True))
        if step.floats:
            results = tuple_of(outputs)
            tape.pull({results[j]: self._gradient(step, j, results[j]) for j in step.floats}, self._add)

    def _gradient(self, step: Step, j: int, output: Tensor) -> Tensor:
        """Take the gradient of a call's j-th output."""
        if step.operation.log_det and j == len(step.outputs) - 1:
            return torch.zeros_like(output) if self.log_det is None else self.log_det.to(output.dtype)
        gradient = self.gradients.pop(("value", step.outputs[j]), None)
        return torch.zeros_like(output) if gradient is None else gradient

    def results(self) -> list[Tensor | None]:
        """Return the gradients of parameters, inputs and side inputs."""
        record = self.record
        keys: list[tuple[str, Any]] = [("weight", k) for k in range(record.weights)]
        keys += [("value", i) for i in record.inputs] + [("side", name) for name in record.side_names]
        gradients = [self.gradients.get(key) for key in keys]
        return self._verified(gradients) if record.checked else gradients

    def _verified(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Check what was rebuilt, where the compiler cannot leave it out: a weight's gradient waits for it."""
        record = self.record
        now = fingerprints([self.values[i] for i in record.checked], record.number)
        found = [i for i, gradient in enumerate(gradients) if gradient is not None]
        weights = [i for i in found if i < record.weights]
        for i in weights[-1:] or found:
            gradients[i] = verified(gradients[i], self.prints, now, record.allowed, record.number, record.name)
        return gradients


class _Tape:
    """What a replay writes on while the compiler traces it: each piece that it runs is a function with a gradient."""

    def __init__(self, step: Step, held: Sequence[Tensor], side: dict[str, Tensor]) -> None:
        self.step, self.held, self.side = step, held, side
        self.inputs: list[Any] = [None] * len(step.inputs)
        self.keys: dict[Tensor, tuple[str, Any]] = {s: ("side", name) for name, s in side.items()}  # of gradients
        self.weights = [*{k: None for _, _, k in step.held if k < step.weights}]
        self.pieces: list[_Piece] = []

    def replay(self, outputs: list[Tensor]) -> Any:
        """Run the operation's replay, or its inverse and then its function; return the outputs."""
        operation, side = self.step.operation, {**self.side, **self.step.constants}
        if operation.in_pieces:
            return operation.replay(self, *outputs, **side)
        inputs = tuple_of(operation.inverse(*outputs, **side))
        return self.run(operation.function, *[self.input(j, x) for j, x in enumerate(inputs)], **side)

    def input(self, position: int, value: Any) -> Any:
        """Take ``value`` as the input at ``position``, and return it as :meth:`run` must get it."""
        step = self.step
        value = value.to(step.dtypes[position])
        if value in self.keys:  # what passes is told apart by what it is
            value = value.view_as(value)
        self.keys[value] = ("value", step.inputs[position])
        self.inputs[position] = value
        return value

    def owns(self, output: Tensor) -> bool:
        """Whether the memory of an output may take the input: the compiler sees to it."""
        return False

    def run(self, function: Callable[..., Any], *args: Any, **side: Any) -> Any:
        """Evaluate a piece of the function."""
        leaves, structure = tree_flatten((args, side))
        at = [j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and is_float(leaf)]
        n, parts = len(self.weights), _Parts()

        def piece(*tensors: Tensor) -> tuple[Tensor, ...]:
            """Evaluate ``function`` as one of weights and arguments."""
            now = dict(zip(self.weights, tensors[:n], strict=True))
            held = [now.get(k, t) for k, t in enumerate(self.held)]
            new = dict(zip(at, tensors[n:], strict=True))
            args, side = tree_unflatten([new.get(j, leaf) for j, leaf in enumerate(leaves)], structure)
            outputs = parts.split(self.step.with_held(held, lambda: function(*args, **side)))
            find_used(tensors, outputs)
            return outputs or (tensors[0].new_zeros(()),)  # there must be one

        primals = [self.held[k] for k in self.weights] + [leaves[j] for j in at]
        if not primals or not self.step.floats:  # nothing to differentiate, or by
            return function(*args, **side)
        outputs, pull = torch.func.vjp(piece, *primals)  # type: ignore[misc]
        outputs = outputs[: len(parts.at)]
        keys: list[Any] = [("weight", k) for k in self.weights] + [self.keys.get(leaves[j]) for j in at]
        used = [(i, keys[i]) for i in used_tensors() if keys[i] is not None]
        k = len(self.pieces)
        self.pieces.append(_Piece(outputs, pull, used))
        for j, output in enumerate(outputs):
            self.keys[output] = ("piece", (k, j))
        return parts.join(outputs)

    run_until_saved = run

    def pull(self, gradients: dict[Tensor, Tensor], add: Callable[[tuple[str, Any], Tensor], None]) -> None:
        """Go back through the pieces with the gradients of the outputs; add those of all that they came from."""
        inner: dict[Any, Tensor] = {}

        def give(key: tuple[str, Any], gradient: Tensor) -> None:
            kind, name = key
            if kind != "piece":
                add(key, gradient)
            else:
                inner[name] = inner[name] + gradient if name in inner else gradient

        for output, gradient in gradients.items():
            if output in self.keys:
                give(self.keys[output], gradient)
        for k in range(len(self.pieces) - 1, -1, -1):
            piece = self.pieces[k]
            given = [inner.get((k, j)) for j in range(len(piece.outputs))]
            if all(g is None for g in given):
                continue
            filled = [torch.zeros_like(y) if g is None else g for y, g in zip(piece.outputs, given, strict=True)]
            found = piece.pull(tuple(filled))
            for i, key in piece.used:
                give(key, found[i])


@dataclass(slots=True)
class _Piece:
    """A part of a function, with its gradient."""

    outputs: tuple[Tensor, ...]
    pull: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    used: list[tuple[int, tuple[str, Any]]]  # positions of what has a gradient, and whose that is


class _Parts:
    """What a piece returns: the tensors that have gradients, and the rest."""

    leaves: list[Any]
    structure: Any
    at: list[int]

    def split(self, value: Any) -> tuple[Tensor, ...]:
        """Return the tensors, and remember the rest."""
        self.leaves, self.structure = tree_flatten(value)
        self.at = [j for j, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and is_float(leaf)]
        return tuple([self.leaves[j] for j in self.at])

    def join(self, tensors: tuple[Tensor, ...]) -> Any:
        """Put others in place of the tensors."""
        new = dict(zip(self.at, tensors, strict=True))
        return tree_unflatten([new.get(j, leaf) for j, leaf in enumerate(self.leaves)], self.structure)
