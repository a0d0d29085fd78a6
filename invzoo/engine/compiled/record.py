"""Forward under the compiler: which call took and gave what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .._torch import reparametrized
from ..nested import tuple_of
from ..operation import Through
from ..policy import Mode
from ..state import state
from .tracer import (
    allowed_error,
    changed_tensors,
    check_closures,
    examine,
    frame_named,
    frames,
    note_tensors,
    number,
    reads_changed,
    stop,
)

__all__ = ["Record", "Step", "is_float"]


@dataclass(slots=True)
class Step:
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
    held: dict[Tensor, int]  # positions of the parameters that get gradients, and of the other tensors held
    weights: int  # how many get gradients: the first ones
    asked: bool  # for log-determinants
    others: list[Tensor] = field(default_factory=list)  # that are held: other parameters, and buffers
    steps: list[Step] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    positions: dict[Tensor, int] = field(default_factory=dict)  # positions in values
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
        state.record = self
        result = self.through(inputs, side, self if self.asked else None)
        state.record = None
        check_closures(tensors, self.name)
        self.single = not isinstance(result, tuple)
        outputs = tuple_of(result)
        if any(y not in self.positions for y in outputs):
            self._refuse_foreign("an output of the whole")
        self.outputs = [self.positions[y] for y in outputs]
        self.saved = self._unknown()
        checks = {step.operation.policy.check for step in self.steps if not step.keeps}
        if checks - {"never"}:
            self.checked, self.allowed = self._rebuilt_last(), allowed_error()
            self.number = -1 if "always" in checks else number()
        self.has_log_det = self.log_det is not None
        return outputs if self.log_det is None else (*outputs, self.log_det)

    def put(self, value: Tensor) -> int:
        """Return the position of a value, a new one if need be."""
        if value not in self.positions:
            self.positions[value] = len(self.values)
            self.values.append(value)
        return self.positions[value]

    def add(self, log_det: Tensor) -> None:
        """Add a log-determinant to those that the layers gave; each gets the gradient of the sum."""
        self.log_det = log_det if self.log_det is None else self.log_det + log_det

    def call(self, operation: Any, inputs: tuple[Any, ...], side: dict[str, Any]) -> Any:
        """Run an operation that a layer gives to the engine."""
        where = " in ".join((operation.name, *_places()))
        if any(not isinstance(x, Tensor) or x not in self.positions for x in inputs):
            self._refuse_foreign(f"an input of {where}")
        keeps = operation.keeps_input or operation.policy.mode is Mode.recompute
        if operation.inverse is None and not keeps:
            stop(f"Expected a layer with an inverse for mode 'invert'; got {where}. Use mode 'recompute' or 'store'")
        places, tensors = _belongings(operation.roots)
        note_tensors(tensors)
        state.record = None  # the function is one piece, whatever it is made of
        result = getattr(frames, frame_named(where))(operation.function, inputs, side)
        state.record = self
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
            Step(
                operation,
                [self.positions[x] for x in inputs],
                [x.dtype for x in inputs],
                [self.put(y) for y in outputs],
                [j for j, y in enumerate(outputs) if is_float(y)],
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
        if tensor not in self.held:
            self.held[tensor] = len(self.held)
            self.others.append(tensor)
        return self.held[tensor]

    def _refuse_foreign(self, what: str) -> None:
        """Stop at a value that no call returned (rule 2)."""
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


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()
