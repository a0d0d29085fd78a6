"""The engine under `torch.compile`: a chain is one `torch.autograd.Function` whose backward inverts layer by layer.

NOTE [How a compiled chain forgets and remembers]

1. Hooks on saved tensors cannot be traced, so the compiler would store what the eager engine forgets. Instead the
   outermost container runs as one function of its inputs, side inputs and parameters. It saves what no call in it can
   rebuild: the outputs, and the inputs of calls that keep them.
2. Its forward runs the layers as ever. Their calls arrive at the `Record`, which notes which values each took and gave.
   Values are told apart by identity: nothing may happen to them between two calls.
3. Its backward goes through the record in reverse: a call's inverse rebuilds its inputs, `torch.func.vjp` of its
   function gives the gradients of inputs, side inputs and parameters. Where both evaluate the same subnet at the same
   values, the compiler sees one expression twice and evaluates it once (inductor does, aot_eager does not).
4. The compiler may move whatever does not depend on a gradient into the forward, and merge it with what is computed
   there: of side inputs alone, or around a batch norm, it would save something for each layer. So backward begins with
   an opaque copy of what was saved that has to wait for a gradient.
5. A replay must be what the forward was. Both are traced together, so flags and modules are the same; autocast is set
   again. Random numbers would differ, buffers would have moved: both are refused while the compiler traces, but for the
   statistics of batch norms, which training does not read. So is a tensor that needs a gradient and is no parameter,
   since the function would not know of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ._torch import with_tensors
from .chain import Through
from .compile_time import changed_tensors, check_closures, examine, note_tensors, stop
from .mode import Mode
from .state import state
from .tape import tuple_of

__all__ = ["Record", "run"]


def run(owner: nn.Module, through: Through, values: tuple[Any, ...], side: dict[str, Any], log_dets: Any) -> Any:
    """Return ``through(values, side, log_dets)``, as one function."""
    parameters = [p for p in owner.parameters() if p.requires_grad]
    names = [k for k, v in side.items() if isinstance(v, Tensor)]
    record = Record(type(owner).__name__, through, len(values), names, side, parameters, log_dets is not None)
    outputs = _Chain.apply(record, *values, *[side[k] for k in names], *parameters)
    if record.has_log_det:
        log_dets.add(outputs[-1])
        outputs = outputs[:-1]
    return outputs[0] if record.single else outputs


@dataclass(slots=True)
class _Step:
    """One call: what it runs, and the positions of its values among those of the record."""

    operation: Any
    inputs: list[int]
    outputs: list[int]
    side: list[str]
    constants: dict[str, Any]  # other side inputs
    weights: list[tuple[int, str, int]]  # root, name, and position among the record's parameters
    moved: list[tuple[int, str]]  # root and name of the buffers that it changes
    keeps: bool  # its inputs

    def run(self, function: Any, weights: dict[int, Tensor], values: Sequence[Tensor], side: dict[str, Tensor]) -> Any:
        """Call the function or its inverse with other parameters, and with stand-ins for what it changes."""
        roots = self.operation.roots
        tensors: list[dict[str, Tensor]] = [{} for _ in roots]
        for i, name, k in self.weights:
            tensors[i][name] = weights[k]
        for i, name in self.moved:
            buffer = roots[i].get_buffer(name)
            tensors[i][name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
        return _with(roots, tensors, lambda: function(*values, **side, **self.constants))


@dataclass(slots=True)
class Record:
    """What a chain's forward did, for its backward; it lives while the compiler traces."""

    name: str
    through: Through
    width: int  # how many inputs
    side_names: list[str]  # of the tensors among the side inputs
    side: dict[str, Any]
    parameters: list[nn.Parameter]
    asked: bool  # for log-determinants
    steps: list[_Step] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    places: dict[Tensor, int] = field(default_factory=dict)  # positions in values
    log_det: Tensor | None = None
    has_log_det: bool = False
    single: bool = False
    outputs: list[int] = field(default_factory=list)  # positions
    saved: list[int] = field(default_factory=list)
    autocast: Any = None

    def run(self, tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Run the forward, and note what it does (rule 2)."""
        inputs, rest = tensors[: self.width], tensors[self.width :]
        for x in inputs:
            if not isinstance(x, Tensor):
                stop(f"Expected tensors as the inputs of {self.name} under torch.compile; got a {type(x).__name__}")
            self.put(x)
        device = inputs[0].device.type
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        side = {**self.side, **dict(zip(self.side_names, rest, strict=False))}
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
        self.has_log_det = self.log_det is not None
        return outputs if self.log_det is None else (*outputs, self.log_det)

    def put(self, value: Tensor) -> int:
        """Return the position of a value, a new one if need be."""
        if value not in self.places:
            self.places[value] = len(self.values)
            self.values.append(value)
        return self.places[value]

    def add(self, log_det: Tensor) -> None:
        """Add a log-determinant; each gets the gradient of the sum."""
        self.log_det = log_det if self.log_det is None else self.log_det + log_det

    def call(self, operation: Any, inputs: tuple[Any, ...], side: dict[str, Any]) -> Any:
        """Run an operation that a layer gives to the engine."""
        where = " in ".join((operation.name, *_places()))
        if any(not isinstance(x, Tensor) or x not in self.places for x in inputs):
            self._refuse_foreign(f"an input of {where}")
        keeps = operation.keeps_input or operation.policy.mode is Mode.recompute
        if operation.inverse is None and not keeps:
            stop(f"Expected a layer with an inverse for mode 'invert'; got {where}. Use mode 'recompute' or 'store'")
        result, moved = self._evaluate(where, operation, inputs, side)
        self.steps.append(
            _Step(
                operation,
                [self.places[x] for x in inputs],
                [self.put(y) for y in tuple_of(result)],
                [k for k in side if k in self.side_names],
                {k: v for k, v in side.items() if k not in self.side_names},
                self._weights(operation.roots),
                moved,
                keeps,
            )
        )
        return result

    def _evaluate(
        self, where: str, operation: Any, inputs: tuple[Any, ...], side: dict[str, Any]
    ) -> tuple[Any, list[tuple[int, str]]]:
        """Run an operation's function, and return which buffers it moves (rule 5)."""
        roots = operation.roots
        owned = [(i, name, b) for i, root in enumerate(roots) for name, b in root.named_buffers()]
        watched = [b for _, _, b in owned] + [p for root in roots for p in root.parameters()]
        note_tensors(watched)
        state.chain = None  # it is one piece, whatever it is made of
        result = operation.function(*inputs, **side)
        state.chain = self
        examine(watched, where)
        moved = changed_tensors()
        if not all(i < len(owned) and _is_statistic(roots[owned[i][0]], owned[i][1]) for i in moved):
            stop(
                "Expected layers that leave their parameters and buffers as they are in a chain under torch.compile; "
                f"got {where}, which changes some. Use mode 'store' for the whole chain, or eval mode"
            )
        return result, [(owned[i][0], owned[i][1]) for i in moved]

    def _weights(self, roots: Sequence[nn.Module]) -> list[tuple[int, str, int]]:
        """Return where a call's modules have which of the parameters, tied ones as often as they do."""
        at = {p: k for k, p in enumerate(self.parameters)}
        return [
            (i, f"{prefix}.{name}" if prefix else name, at[p])
            for i, root in enumerate(roots)
            for prefix, module in root.named_modules()  # each once, whatever names it has
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if p in at
        ]

    def _refuse_foreign(self, what: str) -> None:
        stop(
            f"Expected {self.name} to pass on what its layers return, as it is, under torch.compile; got something "
            f"else as {what}. Use mode 'store' for the whole chain"
        )

    def tensors_to_save(self) -> list[Tensor]:
        """Return what backward starts with; the compiler wants it to share no memory with other values."""
        theirs = {*range(self.width), *self.outputs}
        return [self.values[i] if i in theirs else self.values[i].clone() for i in self.saved]

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


def _places() -> list[str]:
    """Say where in its containers the running layer stands."""
    parts, where = [], state.place
    while where:
        describe, where = where
        parts.append(describe())
    return parts


def _is_statistic(root: nn.Module, name: str) -> bool:
    """Whether a buffer is a statistic of a batch norm, which training writes and does not read."""
    module = root.get_submodule(name.rpartition(".")[0])
    return isinstance(module, _NormBase) and module.training


class _Chain(torch.autograd.Function):
    """A container's layers as one function."""

    @staticmethod
    def forward(ctx: Any, record: Record, *tensors: Any) -> tuple[Tensor, ...]:
        outputs = record.run(tensors)
        ctx.record = record
        ctx.save_for_backward(*record.tensors_to_save(), *tensors[record.width :])
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
        n, m = len(record.saved), len(record.saved) + len(record.side_names)
        self.record = record
        copies = [again(t, gradients[0]) for t in saved[:m]]
        self.values = dict(zip(record.saved, copies, strict=False))
        self.side = dict(zip(record.side_names, copies[n:], strict=True))
        self.weights = saved[m:]
        self.log_det = gradients[-1] if record.has_log_det else None
        self.gradients: dict[tuple[str, Any], Tensor] = {}
        for i, gradient in zip(record.outputs, gradients, strict=False):
            self.add("value", {i: gradient})

    def add(self, kind: str, gradients: dict[Any, Tensor]) -> None:
        """Add to the gradients of values, side inputs or weights."""
        for key, gradient in gradients.items():
            known = self.gradients.get((kind, key))
            self.gradients[kind, key] = gradient if known is None else known + gradient

    def undo(self, step: _Step) -> None:
        """Rebuild a call's inputs, and pass the gradients of its outputs on to them (rule 3)."""
        weights = {k: self.weights[k] for _, _, k in step.weights}
        side = {name: self.side[name] for name in step.side}
        if not step.keeps:
            known = [self.values[i] for i in step.outputs[: len(step.outputs) - step.operation.log_det]]
            rebuilt = tuple_of(step.run(step.operation.inverse, weights, known, side))
            self.values.update(zip(step.inputs, rebuilt, strict=True))
        inputs = {i: self.values[i] for i in step.inputs}

        def function(weights: Any, some_inputs: Any, some_side: Any) -> dict[int, Tensor]:
            values = [*{**inputs, **some_inputs}.values()]
            outputs = tuple_of(step.run(step.operation.function, weights, values, {**side, **some_side}))
            return _floats(dict(enumerate(outputs)))

        outputs, pull = torch.func.vjp(function, weights, _floats(inputs), _floats(side))  # type: ignore[misc]
        of_weights, of_inputs, of_side = pull({j: self._gradient(step, j, y) for j, y in outputs.items()})
        self.add("weight", of_weights)
        self.add("value", of_inputs)
        self.add("side", of_side)

    def _gradient(self, step: _Step, j: int, output: Tensor) -> Tensor:
        """Take the gradient of a call's j-th output."""
        if step.operation.log_det and j == len(step.outputs) - 1:
            return torch.zeros_like(output) if self.log_det is None else self.log_det.to(output.dtype)
        gradient = self.gradients.pop(("value", step.outputs[j]), None)
        return torch.zeros_like(output) if gradient is None else gradient

    def results(self) -> list[Tensor | None]:
        """Return the gradients of inputs, side inputs and parameters."""
        record = self.record
        keys = [("value", i) for i in range(record.width)] + [("side", name) for name in record.side_names]
        return [self.gradients.get(key) for key in keys + [("weight", k) for k in range(len(record.parameters))]]


def _floats(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
    return {k: t for k, t in tensors.items() if t.is_floating_point() or t.is_complex()}


def _with(roots: Sequence[nn.Module], tensors: Sequence[dict[str, Tensor]], function: Callable[[], Any]) -> Any:
    """Call a function while modules have other parameters and buffers."""
    if not roots:
        return function()
    with with_tensors(roots[0], tensors[0]):  # type: ignore[misc]  # a chain steps aside where it is missing
        return _with(roots[1:], tensors[1:], function)


@torch.library.custom_op("invzoo::again", mutates_args=())
def again(tensor: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    """Return a copy that cannot be had before ``after`` (rule 4)."""
    return tensor.clone()


@again.register_fake
def _(tensor: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(tensor)
