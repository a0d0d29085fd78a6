"""A call that keeps nothing for backward but what it takes to replay it; the package's NOTE has the rules."""

import threading
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._torch import (
    backward_id,
    keeps_graph,
    may_step,
    plainly,
    set_grad_enabled,
    storage_key,
    transparent,
    version_of,
)
from ..func import run_below, runs_below
from ..nested import attributes_of, tuple_of
from ..operation import Operation
from ..policy import Mode
from ..state import note, state, steps_aside
from ..surroundings.buffers import copy_of, differ
from ..surroundings.snapshot import Surroundings
from .given import Given
from .kept import kept
from .links import Links, waits_to_be_freed
from .proof import Proof, is_unverified
from .saved import Handle, Saved
from .slots import Slot
from .tape import Input, Tape, inverted

__all__ = ["call"]


def call(operation: Operation, inputs: tuple[Any, ...], side: dict[str, Any]) -> Any:
    """Run ``operation`` so that backward rebuilds what it needs, as the operation's policy says."""
    if state.record is not None:
        return state.record.call(operation, inputs, side)
    mode = operation.policy.mode
    if mode is Mode.store:
        return _run_plainly(operation, inputs, side)
    if steps_aside():
        if runs_below(operation, inputs, side):
            return run_below(call, operation, inputs, side)
        return _run_plainly(operation, inputs, side)
    if mode is Mode.invert and operation.inverse is None:
        raise TypeError(
            f"Expected a layer with an inverse for mode 'invert'; got {operation.name}, which has none. "
            "Use mode 'recompute' or 'store'"
        )
    return Call(operation, inputs, side).forward(inputs, side)


def _run_plainly(operation: Operation, inputs: tuple[Any, ...], side: dict[str, Any]) -> Any:
    """Run the function as a plain module would, but for changes of its inputs: no mode takes them.

    Tensors of the inference mode have no versions, so there the first call looks at values.
    """
    if torch.compiler.is_compiling():
        return operation.function(*inputs, **side)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    versions, policy = [version_of(x) for x in tensors], operation.policy
    unversioned = [x for x in tensors if x.is_inference()]
    looks = unversioned and is_unverified(policy, inference := f"{operation.name}, inference")
    copies = [copy_of(x) for x in unversioned] if looks else []
    result = operation.function(*inputs, **side)
    if versions != [version_of(x) for x in tensors] or any(map(differ, unversioned, copies)):
        raise _changed_input(operation.name)
    if looks:
        policy.verified.add(inference)
    return result


def _changed_input(name: str) -> RuntimeError:
    """Return the error for a function that changes its inputs."""
    return RuntimeError(
        f"Expected {name} to leave its inputs as they are; got one that its function changed in place. Use "
        "out-of-place operations, nn.ReLU() for nn.ReLU(inplace=True) say, or let it begin with x.clone()"
    )


class Call:
    """One run of an operation: what it takes to run it again."""

    side: dict[str, Any] = {}  # noqa: RUF012 - nobody writes into it
    kept: tuple[Any, ...] | None = None  # the inputs, if the replay does not rebuild them
    leaf_inputs: Sequence[int | None] = ()  # the storages of inputs that want a gradient of their own
    proof: Proof | None = None  # what its replay is compared by, if it is

    def __init__(self, operation: Operation, inputs: tuple[Any, ...], side: dict[str, Any]):
        self.operation = operation
        self.place = state.place
        self.given, self.saved, self.links = Given(), Saved(), Links()
        self.dtypes: set[torch.dtype] = set()  # of all that the call took, saved and returned, and of its weights
        self.inputs: list[Any] = []  # what rebuilt tensors look like; the other inputs as they are
        tensors, others = [], [*side.values()]
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor):
                attributes = attributes_of(x)
                self.inputs.append(spec := Input.of(x, attributes and self.given.take_all(f"input {i}", attributes)))
                if spec.requires_grad and x.is_leaf:
                    self.leaf_inputs = [*self.leaf_inputs, storage_key(x)]
                tensors.append(x)
            else:
                self.inputs.append(self.given.take(f"input {i}", x))
                others.append(x)
        if side:
            self.side = {k: self.given.take(f"side input {k!r}", v) for k, v in side.items()}
            tensors += [x for x in side.values() if isinstance(x, Tensor)]
        generators = [x for x in others if isinstance(x, torch.Generator)]
        self.surroundings = Surroundings(operation.roots, tensors, generators, foreign=operation.foreign)

    @property
    def lock(self) -> threading.RLock:
        return self.links.lock

    @property
    def awaited(self) -> bool:
        """Whether a graph waits for a replay that rebuilds the inputs."""
        return bool(self.links.slots) and self.saved.awaited

    def forward(self, inputs: tuple[Any, ...], side: dict[str, Any]) -> Any:
        """Run the function, with handles in its graph (rule 1)."""
        operation, surroundings = self.operation, self.surroundings
        if not surroundings.replayable:
            return _run_plainly(operation, inputs, side)
        state.packing.append(pack := transparent(self.pack))
        try:
            with saved_tensors_hooks(pack, self.unpack), surroundings.observers.watched():
                result = operation.function(*inputs, **side)
        except RuntimeError as error:
            if "support saved tensor hooks" in str(error):
                error.add_note(f"Use torch.autograd.grad in {operation.name}, or mode 'store' for it")
            raise
        finally:
            state.packing.pop()
        for spec, x in zip(self.inputs, inputs, strict=True):
            if isinstance(spec, Input) and version_of(x) != spec.version:
                raise _changed_input(operation.name)
        outputs = tuple_of(result)
        needs_grad = any(isinstance(y, Tensor) and y.requires_grad for y in outputs)
        if (needs_grad or waits_to_be_freed(inputs)) and surroundings.close(seed=operation.policy.seed):
            self._close(inputs, outputs)
        return result

    def _close(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Forget everything that a replay can rebuild."""
        operation, parameters = self.operation, self.surroundings.parameters
        if operation.policy.mode is Mode.invert and not operation.keeps_input:
            self.links.join(self, inputs, outputs[:-1] if operation.log_det else outputs)
        else:
            self.kept = tuple(x.detach() if isinstance(x, Tensor) else None for x in inputs)
            for i, x in enumerate(self.kept):
                if x is not None:
                    self.given.keep(f"input {i}", x)
        # Whether a backward may replay it: its graph saved something, or a call before it needs its inputs.
        wanted = self.links.inherits or self.saved.awaited
        if wanted and self.kept is None:
            self.proof = Proof.of_inverted(operation, inputs, self.links.passed)
        elif wanted:
            self.proof = Proof.of_recomputed(operation, outputs, self.saved)
        if wanted and (may_step(parameters.tensors) or self.given.leaves):
            self._come_first(inputs, outputs)
        self.saved.release()
        tensors = [x for x in (*inputs, *outputs) if isinstance(x, Tensor)]
        self.dtypes.update(map(_dtype, tensors), map(_dtype, parameters.tensors), map(_dtype_of_meta, self.saved.metas))

    def _come_first(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Be rebuilt before any parameter gets its gradient, since its hook may step an optimizer (rule 7)."""
        given = {*map(id, inputs)}
        for y in outputs:
            if isinstance(y, Tensor) and id(y) not in given and (node := y.grad_fn) is not None:
                node.register_prehook(self._rebuild_first)

    def _rebuild_first(self, _: Any) -> None:
        with self.lock, plainly():
            handle = next(self.saved.live(), None)
            if handle is not None:
                if handle.value is None:
                    self.rebuild()
            elif self.links.loses():
                self.bring_back()

    def pack(self, tensor: Tensor) -> Handle:
        """Give autograd a handle for what it saves."""
        is_leaf = tensor.requires_grad and tensor.is_leaf and id(tensor) not in self.surroundings.parameters.known
        if is_leaf and storage_key(tensor) not in self.leaf_inputs:
            self.given.keep_leaf(tensor)
        return self.saved.add(tensor)

    def unpack(self, handle: Handle) -> Tensor:
        """Give backward the value of a handle, which rebuilds the call at the first (rule 3)."""
        value = handle.value
        if value is None:
            with self.lock, plainly():
                if handle.value is None:
                    self.rebuild()
                value = handle.value
            if backward_id() == -1:  # somebody looks at the graph
                kept().end()
        if version_of(value) != handle.version:  # type: ignore[arg-type]  # it is rebuilt
            note(error := handle.changed(self.operation.name), self.place)
            raise error
        return value  # type: ignore[return-value]

    def rebuild(self) -> None:
        """Replay the call, and give the graph what it saved (rules 3 and 4)."""
        keep = keeps_graph()
        if keep:
            kept().begin(self)
        _pull(self)
        self._as_it_was(self._rebuild, Tape(self), not keep)
        if keep:
            self.links.drop()
        else:
            self.links.forget()
            self.given.forget()
            self.kept = None if self.kept is None else ()

    def _rebuild(self, tape: Tape, done: bool) -> None:
        """Fill handles and input slots; ``done`` if no later backward will ask again."""
        values = self._replay(tape) if self.kept is None else self._recompute(tape, self.kept)
        if self.proof is not None:
            self.proof.compare(values, self.links.dtypes(self.dtypes))
        tape.fill()
        self.surroundings.generators.check()
        self.links.put(tape.inputs, self.links.dtypes(self.dtypes), done=done)
        tape.forget()

    def _recompute(self, tape: Tape, inputs: tuple[Any, ...]) -> Sequence[Any]:
        """Run the function again, as far as anybody needs it, and return what it is compared by."""
        function, inputs = self.operation.function, tuple([tape.input(i, x) for i, x in enumerate(inputs)])
        if self.proof is not None and self.proof.needs_outputs:
            return tuple_of(tape.run(function, *inputs, **self.side))
        tape.run_until_saved(function, *inputs, **self.side)
        return tape.saved()

    def _replay(self, tape: Tape) -> Sequence[Any]:
        """Rebuild the inputs and run the function again, and return the inputs."""
        outputs = self.links.values(self.operation.name)
        if self.operation.replay is not None:
            self.operation.replay(tape, *outputs, **self.side)
        else:
            tape.run(self.operation.function, *tape.invert(*outputs), **self.side)
        return tape.inputs

    def bring_back(self) -> None:
        """Rebuild the inputs alone, for whoever needs them."""
        _pull(self)
        self.restore()

    def restore(self) -> None:
        """Rebuild the inputs from outputs that are there."""
        self._as_it_was(self._invert)
        self.links.drop()

    def _invert(self) -> None:
        """Fill the input slots alone."""
        links, name = self.links, self.operation.name
        specs = enumerate(zip(self.inputs, inverted(self, links.values(name)), strict=True))
        inputs = [s.accept(x, name, i) if isinstance(s, Input) else x for i, (s, x) in specs]
        if self.proof is not None:
            self.proof.compare(inputs, self.links.dtypes(self.dtypes))
        # Where the later calls are done with and no graph waits for this one, it is done with as well.
        done = not keeps_graph() and not self.awaited and not links.consumed
        links.put(inputs, self.links.dtypes(self.dtypes), done=done)

    def _as_it_was(self, replay: Callable[..., None], *args: Any) -> None:
        """Run ``replay`` without gradients, and with all that the call saw as it was."""
        grad = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            self.given.check(self.operation.name)
            with self.surroundings.as_they_were():
                replay(*args)
        except Exception as error:
            note(error, (lambda: f"the replay of {self.operation.name}", self.place))
            raise
        finally:
            set_grad_enabled(grad)


_dtype, _dtype_of_meta = attrgetter("dtype"), itemgetter(1)


def _pull(wanted: Call) -> None:
    """Make every output slot of a call hold its value, by inverting later calls where it does not."""
    stack: list[Any] = [wanted]
    filled: list[Slot] = []
    while stack:
        call = stack[-1]
        if (missing := call.links.missing()) is not None:
            stack.append(missing.consumer)  # what is not here, somebody rebuilds
            continue
        stack.pop()
        if call is not wanted:
            call.restore()
            filled += call.links.sources()
    for slot in filled:
        if slot not in wanted.links.slots:
            slot.drop()
