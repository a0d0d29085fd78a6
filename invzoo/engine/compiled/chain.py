"""The engine under `torch.compile`: a chain is one `torch.autograd.Function` whose backward inverts layer by layer.

NOTE [How a compiled chain forgets and remembers]

1. Hooks on saved tensors cannot be traced, so the compiler would store what the eager engine forgets. Instead the
   outermost container runs as one function of its inputs, side inputs and parameters. It saves what no call in it can
   rebuild: the outputs, and the inputs of calls that keep them.
2. Its forward runs the layers as ever. Their calls arrive at the `Record`, which notes which values each took and gave.
   Values are told apart by identity: nothing may happen to them between two calls.
3. Its backward goes through the record in reverse: a call's replay rebuilds its inputs and runs its function again, as
   in the eager engine, so that both share one evaluation of a subnet. `torch.func.vjp` of each piece that it runs gives
   the gradients of inputs, side inputs and parameters.
4. The compiler may move whatever does not depend on a gradient into the forward, and merge it with what is computed
   there: of side inputs alone, or around a batch norm, it would save something for each layer. So backward begins with
   an opaque copy of what was saved that has to wait for a gradient.
5. A replay must be what the forward was. Both are traced together, so flags and modules are the same; autocast is set
   again. Parameters and buffers are saved, and put into the modules again: torch refuses them if they changed. Random
   numbers would differ, and so would buffers that a call moves: both are refused while the compiler traces, but for
   the statistics of batch norms, which training does not read. So is a tensor that needs a gradient and is no
   parameter, since the function would not know of it.
6. It is checked, once or always as the layers' policies say: backward takes fingerprints of what it rebuilds last,
   which any wrong inverse spoils, and returns no gradient if they are not those of the forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._torch import reparametrized
from ..nested import tuple_of
from ..operation import Through
from ..policy import Mode
from ..state import state
from .operators import again, fingerprints, verified
from .tracer import (
    allowed_error,
    changed_tensors,
    check_closures,
    examine,
    find_used,
    frame_named,
    frames,
    note_tensors,
    number,
    reads_changed,
    stop,
    used_tensors,
)

__all__ = ["Record", "run"]


def run(owner: nn.Module, through: Through, values: tuple[Any, ...], side: dict[str, Any], log_dets: Any) -> Any:
    """Return ``through(values, side, log_dets)``, as one function."""
    parameters = [p for p in owner.parameters() if p.requires_grad]
    names = [k for k, v in side.items() if isinstance(v, Tensor)]
    positions: dict[Tensor, int] = {p: k for k, p in enumerate(parameters)}
    record = Record(
        type(owner).__name__, through, len(values), names, side, positions, len(parameters), log_dets is not None
    )
    outputs = _Chain.apply(record, *parameters, *_distinct([*values, *[side[k] for k in names]], positions))
    if record.has_log_det:
        log_dets.add(outputs[-1])
        outputs = outputs[:-1]
    return outputs[0] if record.single else outputs


def _distinct(tensors: list[Any], known: dict[Tensor, int]) -> list[Any]:
    """Copy tensors that are given twice, or are parameters: `apply` takes each only once."""
    return [t.clone() if t in known or any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors)]


@dataclass(slots=True)
class _Step:
    """One call: what it runs, and the positions of its values among those of the record."""

    operation: Any
    inputs: list[int]
    dtypes: list[torch.dtype]  # of the inputs
    outputs: list[int]
    floats: list[int]  # which outputs have gradients
    side: list[str]
    constants: dict[str, Any]  # other side inputs
    held: list[tuple[int, str, int]]  # root and name of parameters and buffers, and positions in what the record holds
    moved: list[tuple[int, str]]  # root and name of the buffers that it changes
    keeps: bool  # its inputs
    weights: int  # how many of what the record holds get gradients: the first ones

    def with_held(self, held: Sequence[Tensor], function: Callable[[], Any]) -> Any:
        """Call a function while the modules have these parameters and buffers, and others that it may change."""
        roots = self.operation.roots
        tensors: list[dict[str, Tensor]] = [{} for _ in roots]
        for i, name, k in self.held:
            tensors[i][name] = held[k]
        for i, name in self.moved:
            buffer = roots[i].get_buffer(name)
            tensors[i][name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
        return reparametrized(roots, tensors, function)


@dataclass(slots=True)
class Record:
    """What a chain's forward did, for its backward; it lives while the compiler traces."""

    name: str
    through: Through
    width: int  # how many inputs
    side_names: list[str]  # of the tensors among the side inputs
    side: dict[str, Any]
    positions: dict[Tensor, int]  # of the parameters that get gradients, and of the other tensors held
    weights: int  # how many get gradients: the first ones
    asked: bool  # for log-determinants
    others: list[Tensor] = field(default_factory=list)  # that are held: other parameters, and buffers
    steps: list[_Step] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    places: dict[Tensor, int] = field(default_factory=dict)  # positions in values
    log_det: Tensor | None = None
    has_log_det: bool = False
    single: bool = False
    inputs: list[int] = field(default_factory=list)  # positions
    outputs: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    allowed: float = 0.0  # the relative error
    number: int = -1
    autocast: Any = None

    def run(self, tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Run the forward, and note what it does (rule 2)."""
        n = self.weights
        inputs, rest = tensors[n : n + self.width], tensors[n + self.width :]
        for x in inputs:
            if not isinstance(x, Tensor):
                stop(f"Expected tensors as the inputs of {self.name} under torch.compile; got a {type(x).__name__}")
            self.inputs.append(self.put(x))
        device = inputs[0].device.type
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        side = {**self.side, **dict(zip(self.side_names, rest, strict=True))}
        state.chain = self
        result = self.through(inputs, side, self if self.asked else None)
        state.chain = None
        check_closures(tensors, self.name)
        self.single = not isinstance(result, tuple)
        outputs = tuple_of(result)
        if any(y not in self.places for y in outputs):
            self._refuse_foreign("an output of the whole")
        self.outputs = [self.places[y] for y in outputs]
        self.saved = self._unknown()
        checks = {step.operation.policy.check for step in self.steps if not step.keeps}
        if checks - {"never"}:
            self.checked, self.allowed = self._rebuilt_last(), allowed_error()
            self.number = -1 if "always" in checks else number()
        self.has_log_det = self.log_det is not None
        return outputs if self.log_det is None else (*outputs, self.log_det)

    def put(self, value: Tensor) -> int:
        """Return the position of a value, a new one if need be."""
        if value not in self.places:
            self.places[value] = len(self.values)
            self.values.append(value)
        return self.places[value]

    def add(self, log_det: Tensor) -> None:
        """Add a log-determinant to those that the layers gave; each gets the gradient of the sum."""
        self.log_det = log_det if self.log_det is None else self.log_det + log_det

    def call(self, operation: Any, inputs: tuple[Any, ...], side: dict[str, Any]) -> Any:
        """Run an operation that a layer gives to the engine."""
        where = " in ".join((operation.name, *_places()))
        if any(not isinstance(x, Tensor) or x not in self.places for x in inputs):
            self._refuse_foreign(f"an input of {where}")
        keeps = operation.keeps_input or operation.policy.mode is Mode.recompute
        if operation.inverse is None and not keeps:
            stop(f"Expected a layer with an inverse for mode 'invert'; got {where}. Use mode 'recompute' or 'store'")
        places, tensors = _belongings(operation.roots)
        note_tensors(tensors)
        state.chain = None  # the function is one piece, whatever it is made of
        result = getattr(frames, frame_named(where))(operation.function, inputs, side)
        state.chain = self
        examine(tensors, where)
        moved = [places[k] for k in changed_tensors()]
        if reads_changed() or not all(_is_statistic(operation.roots[i], name) for i, name in moved):
            stop(
                "Expected layers that leave their parameters and buffers as they are in a chain under torch.compile; "
                f"got {where}, which changes some, or reads statistics that it moves. Use mode 'store' for the whole "
                "chain, or eval mode"
            )
        outputs = tuple_of(result)
        self.steps.append(
            _Step(
                operation,
                [self.places[x] for x in inputs],
                [x.dtype for x in inputs],
                [self.put(y) for y in outputs],
                [j for j, y in enumerate(outputs) if _is_float(y)],
                [k for k in side if k in self.side_names],
                {k: v for k, v in side.items() if k not in self.side_names},
                [(*at, self._hold(t)) for at, t in zip(places, tensors, strict=True) if at not in moved],
                moved,
                keeps,
                self.weights,
            )
        )
        return result

    def _hold(self, tensor: Tensor) -> int:
        """Return the position of a parameter or buffer among those that backward gets."""
        if tensor not in self.positions:
            self.positions[tensor] = len(self.positions)
            self.others.append(tensor)
        return self.positions[tensor]

    def _refuse_foreign(self, what: str) -> None:
        stop(
            f"Expected {self.name} to pass on what its layers return, as it is, under torch.compile; got something "
            f"else as {what}. Use mode 'store' for the whole chain"
        )

    def _unknown(self) -> list[int]:
        """Return the positions of the values that backward needs and does not rebuild."""
        known: set[int] = set()
        unknown = []
        for step in reversed(self.steps):
            for i in step.inputs if step.keeps else step.outputs:
                if i not in known:
                    known.add(i)
                    unknown.append(i)
            known.update(step.inputs)
        return unknown

    def _rebuilt_last(self) -> list[int]:
        """Return the positions of the values that are rebuilt, and that nothing is rebuilt from (rule 6).

        Of one that is merely split they are those of its parts, whose sizes may differ. And an input that has fewer
        numbers than what it was rebuilt from does not stand for all of them.
        """
        last, rebuilt = {*self.inputs}, set()
        for step in self.steps:
            if step.keeps:
                last.update(step.outputs)
                continue
            rebuilt.update(step.inputs)
            outputs = step.outputs[: len(step.outputs) - step.operation.log_det]
            splits = len(step.operation.roots) == 0 and last >= {*step.inputs}
            if splits or self._size(outputs) > self._size(step.inputs):
                last.update(outputs)
            if splits:
                last.difference_update(step.inputs)
        return sorted(last & rebuilt)

    def _size(self, positions: list[int]) -> int:
        return sum(self.values[i].numel() for i in positions)


def _places() -> list[str]:
    """Say where in its containers the running layer stands."""
    parts, where = [], state.place
    while where:
        describe, where = where
        parts.append(describe())
    return parts


def _belongings(roots: Sequence[nn.Module]) -> tuple[list[tuple[int, str]], list[Tensor]]:
    """Return where modules have parameters and buffers (root and name), tied ones as often as they do, and these."""
    places, tensors = [], []
    for i, root in enumerate(roots):
        for prefix, module in root.named_modules():  # each once, whatever names it has
            dot = f"{prefix}." if prefix else ""
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    places.append((i, dot + name))
                    tensors.append(tensor)
    return places, tensors


def _is_statistic(root: nn.Module, name: str) -> bool:
    """Whether this is a statistic of a batch norm, which training writes and does not read."""
    path, _, name = name.rpartition(".")
    module = root.get_submodule(path)
    return isinstance(module, _NormBase) and module.training and name in module._buffers


class _Chain(torch.autograd.Function):
    """A container's layers as one function."""

    @staticmethod
    def forward(ctx: Any, record: Record, *tensors: Any) -> tuple[Tensor, ...]:
        outputs = record.run(tensors)
        ctx.record = record
        n = record.weights
        prints = [fingerprints([record.values[i] for i in record.checked], record.number)] if record.checked else []
        # Copies, since nobody looks at versions inside a graph, and who changes these in place later must not change
        # what backward gets. Inductor takes that of an output back where nobody does.
        others = [*record.others, *tensors[n + record.width :], *[record.values[i] for i in record.saved]]
        copies = [t.clone() for t in others]
        ctx.save_for_backward(*prints, *tensors[:n], *copies)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        record = ctx.record
        replay = _Replay(record, ctx.saved_tensors, gradients)
        device, dtype, enabled = record.autocast
        with torch.autocast(device, dtype, enabled):
            for step in reversed(record.steps):
                replay.undo(step)
        return None, *replay.results()


class _Replay:
    """A backward through a record: what is known of its values, and the gradients so far."""

    def __init__(self, record: Record, saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        gradients[0].stride()  # a compiler that learns in a backward of strides starts anew, and cannot inside a vjp
        n, m = len(record.positions), len(record.side_names)
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

    def undo(self, step: _Step) -> None:
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

    def _gradient(self, step: _Step, j: int, output: Tensor) -> Tensor:
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

    def __init__(self, step: _Step, held: Sequence[Tensor], side: dict[str, Tensor]) -> None:
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
        at = [j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _is_float(leaf)]
        n, parts = len(self.weights), _Parts()

        def piece(*tensors: Tensor) -> tuple[Tensor, ...]:
            now = dict(zip(self.weights, tensors[:n], strict=True))
            held = [now.get(k, t) for k, t in enumerate(self.held)]
            new = dict(zip(at, tensors[n:], strict=True))
            args, side = tree_unflatten([new.get(j, leaf) for j, leaf in enumerate(leaves)], structure)
            outputs = parts.split(self.step.with_held(held, lambda: function(*args, **side)))
            find_used(tensors, outputs)
            return *outputs, torch.zeros(())  # there must be one

        primals = [self.held[k] for k in self.weights] + [leaves[j] for j in at]
        if not primals or not self.step.floats:  # nothing to differentiate, or by
            return function(*args, **side)
        outputs, pull = torch.func.vjp(piece, *primals)  # type: ignore[misc]
        outputs = outputs[:-1]
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
            found = piece.pull((*filled, torch.zeros(())))
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
        self.leaves, self.structure = tree_flatten(value)
        self.at = [j for j, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and _is_float(leaf)]
        return tuple([self.leaves[j] for j in self.at])

    def join(self, tensors: tuple[Tensor, ...]) -> Any:
        new = dict(zip(self.at, tensors, strict=True))
        return tree_unflatten([new.get(j, leaf) for j, leaf in enumerate(self.leaves)], self.structure)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
