"""A call that keeps nothing for backward but what it takes to replay it; the package's NOTE has the rules."""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._torch import (
    Stamp,
    at_end_of_backward,
    backward_id,
    is_hollow,
    keeps_graph,
    may_step,
    plainly,
    set_grad_enabled,
    stamps,
    storage_key,
    transparent,
    version_of,
)
from ..fingerprint import Prints, tolerance
from ..func import run_below, runs_below
from ..nested import attributes_of, map_tensors, tuple_of
from ..operation import Operation
from ..policy import Mode, Policy
from ..state import note, state, steps_aside
from ..surroundings.buffers import copy_of, differ
from ..surroundings.snapshot import Surroundings
from .kept import kept
from .slots import Slot, key_of, slot_of
from .tape import Input, Meta, Tape

__all__ = ["call"]


def call(operation: Operation, inputs: tuple[Any, ...], side: dict[str, Any]) -> Any:
    """Run ``operation`` so that backward rebuilds what it needs, as the operation's policy says."""
    if state.chain is not None:
        return state.chain.call(operation, inputs, side)
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
    looks = unversioned and _is_unverified(policy, inference := f"{operation.name}, inference")
    copies = [copy_of(x) for x in unversioned] if looks else []
    result = operation.function(*inputs, **side)
    if versions != [version_of(x) for x in tensors] or any(map(differ, unversioned, copies)):
        raise _changed_input(operation.name)
    if looks:
        policy.verified.add(inference)
    return result


def _is_unverified(policy: Policy, name: str) -> bool:
    return policy.check == "always" or (policy.check == "first" and name not in policy.verified)


def _changed_input(name: str) -> RuntimeError:
    return RuntimeError(
        f"Expected {name} to leave its inputs as they are; got one that its function changed in place. Use "
        "out-of-place operations, nn.ReLU() for nn.ReLU(inplace=True) say, or let it begin with x.clone()"
    )


class Handle:
    """Stands in the graph for a tensor that autograd saved; its value comes when the call is rebuilt.

    It knows the value's version when it was saved, since autograd does not compare that of what hooks return.
    """

    __slots__ = ("__weakref__", "value", "version")

    def __init__(self, value: Tensor):
        self.value: Tensor | None = value
        self.version = version_of(value)


class Call:
    """One run of an operation: what it takes to run it again."""

    copies: Mapping[int, Tensor] = MappingProxyType({})  # of tensors with attributes, by their identity, for a while
    given: Sequence[tuple[str, Tensor, int]] = ()  # tensors that the replay gets as they are, and their versions
    kept: tuple[Any, ...] | None = None
    leaf_inputs: Sequence[int | None] = ()  # the storages of inputs that want a gradient of their own
    side: dict[str, Any] = {}  # noqa: RUF012 - nobody writes into it
    lock: threading.RLock  # shared along a chain: several threads may run one graph
    prints: Prints | None = None  # what its replay is compared by, if it is
    wanted = False  # whether a backward may replay it: its graph saved something, or a call before it needs its inputs

    def __init__(self, operation: Operation, inputs: tuple[Any, ...], side: dict[str, Any]):
        self.operation = operation
        self.place = state.place
        self.leaves: list[tuple[weakref.ref[Tensor], Stamp]] = []  # weights that belong to no module
        self.handles: list[weakref.ref[Handle]] = []
        self.metas: list[Meta] = []
        self.outputs: list[Any] = []  # values and slots
        self.slots: list[Slot] = []  # those among the outputs
        self.produced: list[Slot] = []
        self.passed: dict[int, int] = {}  # input position -> position of the output that is this input
        self.sources: list[Callable[[], Slot | None]] = []  # weakly, the slots that this call rebuilds
        self.inputs: list[Any] = []
        self.dtypes: set[torch.dtype] = set()  # of all that the call took, saved and returned, and of its weights
        tensors, generators = [], []
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor):
                self.inputs.append(spec := Input.of(x))
                if attributes := attributes_of(x):
                    spec.attributes = self._give_all(f"input {i}", attributes)
                if spec.requires_grad and x.is_leaf:
                    self.leaf_inputs = [*self.leaf_inputs, storage_key(x)]
                tensors.append(x)
            else:
                self.inputs.append(map_tensors(partial(self._give, f"input {i}"), x))
                generators.append(x)
        if side:
            self.side = {k: map_tensors(partial(self._give, f"side input {k!r}"), v) for k, v in side.items()}
            tensors += [x for x in side.values() if isinstance(x, Tensor)]
            generators += side.values()
        if self.copies:
            del self.copies
        generators = [x for x in generators if isinstance(x, torch.Generator)]
        self.surroundings = Surroundings(operation.roots, tensors, generators, foreign=operation.foreign)

    def _give(self, what: str, tensor: Tensor) -> Tensor:
        """Note a tensor that replays get as it is, and return it without its graph (rule 5)."""
        if (data := self.copies.get(id(tensor))) is not None:  # it leads to itself
            return data
        data = tensor.detach().requires_grad_(tensor.requires_grad)
        self.given = [*self.given, (what, data, version_of(data))]
        if attributes := attributes_of(tensor):
            self.copies = {**self.copies, id(tensor): data}
            vars(data).update(self._give_all(what, attributes))
        return data

    def _give_all(self, what: str, attributes: dict[str, Any]) -> dict[str, Any]:
        return {name: map_tensors(partial(self._give, f"{name} of {what}"), v) for name, v in attributes.items()}

    def forward(self, inputs: tuple[Any, ...], side: dict[str, Any]) -> Any:
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
        outputs = tuple_of(result)
        for spec, x in zip(self.inputs, inputs, strict=True):
            if isinstance(spec, Input) and version_of(x) != spec.version:
                raise _changed_input(operation.name)
        for y in outputs:
            if isinstance(y, Tensor) and y.requires_grad:
                self._close(inputs, outputs)
                return result
        if _frees(inputs):
            self._close(inputs, outputs)
        return result

    def _close(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Forget everything that a replay can rebuild, if there can be one."""
        operation = self.operation
        if not self.surroundings.close(seed=operation.policy.seed):
            return
        self.wanted = any(ref() is not None for ref in self.handles)
        invert = operation.policy.mode is Mode.invert and not operation.keeps_input
        if invert:
            self._link(inputs, outputs[:-1] if operation.log_det else outputs)
        else:
            self.kept = tuple(x.detach() if isinstance(x, Tensor) else None for x in inputs)
            kept = [(f"input {i}", x, version_of(x)) for i, x in enumerate(self.kept) if x is not None]
            self.given = [*self.given, *kept]
            self.lock = threading.RLock()
        if self.wanted and _is_unverified(operation.policy, self._verified_as):
            self.prints = self._take_prints(inputs, outputs)
        if self.wanted and (may_step(self.surroundings.parameters.tensors) or self.leaves):
            self._come_first(inputs, outputs)
        self.release()
        self.dtypes.update(
            x.dtype for x in (*inputs, *outputs, *self.surroundings.parameters.tensors) if isinstance(x, Tensor)
        )
        self.dtypes.update(dtype for _, dtype in self.metas)

    def _come_first(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Be rebuilt before any parameter gets its gradient, since its hook may step an optimizer (rule 7)."""
        given = {*map(id, inputs)}
        for y in outputs:
            if isinstance(y, Tensor) and id(y) not in given and (node := y.grad_fn) is not None:
                node.register_prehook(self._rebuild_first)

    def _rebuild_first(self, _: Any) -> None:
        with self.lock, plainly():
            handle = next((handle for ref in self.handles if (handle := ref()) is not None), None)
            if handle is not None:
                if handle.value is None:
                    self.rebuild()
            elif any((slot := ref()) is not None and slot.gone for ref in self.sources):
                self._pull()
                self._restore()

    def _take_prints(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> Prints:
        """Take the fingerprints that a replay is compared by (rule 6)."""
        if self.kept is None:
            return Prints("input", [None if i in self.passed else x for i, x in enumerate(inputs)])
        if self.operation.policy.check == "always":
            return Prints("output", outputs)
        saved = [None if (handle := ref()) is None else handle.value for ref in self.handles]
        return Prints("saved tensor", [x if _is_number(x) else None for x in saved])

    def _link(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Put the outputs into slots, and become the one who rebuilds those of the inputs (rule 2)."""
        keys_in = [key_of(x) if isinstance(x, Tensor) else None for x in inputs]
        known = {
            id(x): key for x, key in zip(inputs, keys_in, strict=True)
        }  # most outputs that are inputs are the same
        keys_out = [(known.get(id(y)) or key_of(y)) if isinstance(y, Tensor) else None for y in outputs]
        slots_in = [None if k is None else slot_of(x, k) for x, k in zip(inputs, keys_in, strict=True)]
        self.lock = next((slot.lock for slot in slots_in if slot is not None), None) or threading.RLock()
        self.passed = {i: keys_out.index(k) for i, k in enumerate(keys_in) if k and k[0] and k in keys_out}
        # A slot that is there is held by a call that a backward may replay: others are gone by now.
        self.wanted |= any(slot is not None for slot in slots_in)
        for i, slot in enumerate(slots_in):
            if slot is None or i in self.passed:
                self.sources.append(_none)
                if slot is not None:
                    slot.passers.append(weakref.ref(self))
            else:
                slot.consume(self)
                self.sources.append(weakref.ref(slot))
        for y, key in zip(outputs, keys_out, strict=True):
            if key is None:
                self.outputs.append(map_tensors(Tensor.detach, y))
                continue
            slot = slot_of(y, key)
            if slot is None:
                self.produced.append(slot := Slot(y, key, self.lock))
            self.outputs.append(slot)
            self.slots.append(slot)
        for head in _heads([slot for i, slot in enumerate(slots_in) if i not in self.passed]):
            self._give_back(head, outputs)

    def _give_back(self, head: Slot, outputs: tuple[Any, ...]) -> None:
        """See to it that a backward through this call restores the freed input of its chain, even if nothing asks."""
        found = weakref.ref(head)  # the caller's tensor holds it as long as there is something to restore

        def restore(head: Slot) -> None:
            if head.gone:
                head.consumer._pull()  # type: ignore[union-attr]  # it is gone
                head.consumer._restore()  # type: ignore[union-attr]
            head.take()

        def remind(_: Any) -> None:
            if (head := found()) is not None and head.freed is not None and head.freed.tensor() is not None:
                at_end_of_backward(partial(restore, head))

        nodes = [y.grad_fn for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None]
        for node in nodes:
            node.register_prehook(remind)
        if nodes and head.freed is not None:
            head.freed.promised = True
        else:  # nothing needs a gradient yet: the next call sees to it
            for slot in self.produced:
                slot.head = weakref.ref(head)

    def pack(self, tensor: Tensor) -> Handle:
        if tensor.requires_grad and tensor.is_leaf and self._is_foreign(tensor):
            self.leaves.append((weakref.ref(tensor), stamps([tensor])[0]))
        handle = Handle(tensor.detach())
        self.handles.append(weakref.ref(handle))
        self.metas.append((tensor.shape, tensor.dtype))
        return handle

    def _is_foreign(self, leaf: Tensor) -> bool:
        """Whether it is neither a module's parameter nor an input."""
        return id(leaf) not in self.surroundings.parameters.known and storage_key(leaf) not in self.leaf_inputs

    def unpack(self, handle: Handle) -> Tensor:
        value = handle.value
        if value is None:
            with self.lock, plainly():
                if handle.value is None:
                    self.rebuild()
                value = handle.value
            if backward_id() == -1:  # somebody looks at the graph
                kept.end()
        if version_of(value) != handle.version:  # type: ignore[arg-type]  # it is rebuilt
            raise self._changed(value)  # type: ignore[arg-type]
        return value  # type: ignore[return-value]

    def _changed(self, value: Tensor) -> RuntimeError:
        error = RuntimeError(
            f"Expected the function of {self.operation.name} to leave what autograd saved for its backward as it is; "
            f"got a tensor of shape {tuple(value.shape)} that was changed in place later. Use an out-of-place operation"
        )
        note(error, self.place)
        return error

    def release(self) -> None:
        """Forget what the handles hold."""
        for ref in self.handles:
            if (handle := ref()) is not None:
                handle.value = None

    def rebuild(self) -> None:
        """Replay the call, and give the graph what it saved (rules 3 and 4)."""
        keep = keeps_graph()
        if keep:
            kept.begin(self)
        self._pull()
        self._as_it_was(self._rebuild, Tape(self), not keep)
        if keep:
            self._drop()
        else:
            self.outputs, self.slots, self.produced, self.given = [], [], [], []
            self.kept = None if self.kept is None else ()

    def _rebuild(self, tape: Tape, done: bool) -> None:
        if self.kept is not None:
            self._verify(self._recompute(tape, self.kept))
        else:
            self._replay(tape)
            self._verify(tape.inputs)
        tape.fill()
        self.surroundings.generators.check()
        self._put(tape.inputs, done=done)
        tape.forget()

    def _recompute(self, tape: Tape, kept: tuple[Any, ...]) -> Sequence[Any]:
        """Run the function again, as far as anybody needs it, and return what it is compared by."""
        function, inputs = self.operation.function, [tape.input(i, x) for i, x in enumerate(kept)]
        if self.prints is not None and self.prints.what == "output":
            return tuple_of(tape.run(function, *inputs, **self.side))
        tape.run_until_saved(function, *inputs, **self.side)
        return tape.saved()

    def _replay(self, tape: Tape) -> None:
        outputs = self._values()
        if self.operation.replay is not None:
            self.operation.replay(tape, *outputs, **self.side)
        else:
            tape.run(self.operation.function, *tape.invert(*outputs), **self.side)

    def invert(self, outputs: tuple[Any, ...]) -> list[Any]:
        """Compute the inputs from the outputs."""
        inverse: Callable[..., Any] = self.operation.inverse  # type: ignore[assignment]  # mode invert has one
        passed = self.passed
        known = {i for i, x in enumerate(self.inputs) if not isinstance(x, Input)} | passed.keys()
        saved = {"saved": known} if self.operation.takes_saved else {}
        values = list(tuple_of(inverse(*outputs, **self.side, **saved))) if len(known) < len(self.inputs) else None
        if values is not None and len(values) != len(self.inputs):
            raise RuntimeError(
                f"Expected the inverse of {self.operation.name} to return {len(self.inputs)} values; got {len(values)}"
            )
        values = values or [None] * len(self.inputs)
        for i in known:
            values[i] = outputs[passed[i]] if i in passed else self.inputs[i]
        return values

    def _pull(self) -> None:
        """Make every output slot hold its value, by inverting later calls where it does not."""
        stack, filled = [self], []
        while stack:
            call = stack[-1]
            missing = next((s for s in call.slots if s.value is None and not s.recall()), None)
            if missing is not None:
                stack.append(missing.consumer)  # type: ignore[arg-type]  # what is not here, somebody rebuilds
                continue
            stack.pop()
            if call is not self:
                filled += call._restore()
        for slot in filled:
            if slot not in self.slots:
                slot.drop()

    def _restore(self) -> list[Slot]:
        """Rebuild the inputs alone, for an earlier call."""
        self._as_it_was(self._invert)
        self._drop()
        return [slot for ref in self.sources if (slot := ref()) is not None]

    def _invert(self) -> None:
        inputs = self.invert(self._values())
        name = self.operation.name
        specs = enumerate(zip(self.inputs, inputs, strict=True))
        inputs = [s.accept(x, name, i) if isinstance(s, Input) else x for i, (s, x) in specs]
        self._verify(inputs)
        # Where the later calls are done with and no graph waits for this one, it is done with as well.
        done = not keeps_graph() and not self.awaited and all(slot.consumer is None for slot in self.slots)
        self._put(inputs, done=done)

    @property
    def awaited(self) -> bool:
        """Whether a graph waits for a replay."""
        return bool(self.outputs) and any(ref() is not None for ref in self.handles)

    def shares(self, output: Tensor) -> bool:
        """Whether a later call is still to be replayed with an output of this one."""
        return any(slot.value is output and slot.awaited for slot in self.slots)

    def _values(self) -> tuple[Any, ...]:
        for slot in self.slots:
            if slot.changed:
                raise RuntimeError(
                    f"Expected the outputs of {self.operation.name} to stay as they are until backward; got one that "
                    "was changed in place. Use an out-of-place operation on it"
                )
        return tuple([y.take() if isinstance(y, Slot) else y for y in self.outputs])

    def _put(self, inputs: Sequence[Any], *, done: bool) -> None:
        """Fill the slots of the inputs; if this call is done with, they have to keep what they get."""
        dtypes = self._dtypes()
        for ref, value in zip(self.sources, inputs, strict=False):
            if (slot := ref()) is not None:
                slot.put(value, dtypes)
                if done:
                    slot.consumer = None
                elif keeps_graph():
                    kept.slots.append(ref)

    def _drop(self) -> None:
        for slot in self.produced:
            slot.drop()

    @property
    def _verified_as(self) -> str:
        return self.operation.name if self.kept is None else f"{self.operation.name}, recomputed"

    def _verify(self, values: Sequence[Any]) -> None:
        if self.prints is None:
            return
        # No replay comes nearer than what it starts from.
        self.prints.compare(self.operation.name, values, tolerance(self._dtypes()))
        self.operation.policy.verified.add(self._verified_as)

    def _dtypes(self) -> set[torch.dtype]:
        """Return the dtypes that a rebuilt input has gone through, in this call and in those behind it."""
        return self.dtypes.union(*[slot.dtypes for slot in self.slots])

    def _check(self) -> None:
        for what, tensor, version in self.given:
            if version_of(tensor) != version:
                raise RuntimeError(
                    f"Expected {what} of {self.operation.name} to stay as it was until backward; got one that was "
                    "changed in place. Use an out-of-place operation on it"
                )
        for ref, stamp in self.leaves:
            if (leaf := ref()) is not None and stamps([leaf])[0][:2] != stamp[:2]:
                raise RuntimeError(
                    f"Expected the weights of {self.operation.name} to stay as they were between forward and backward; "
                    f"got a change of one of shape {tuple(leaf.shape)}. Call backward before optimizer.step()"
                )

    def _as_it_was(self, replay: Callable[..., None], *args: Any) -> None:
        """Run ``replay`` without gradients, and with all that the call saw as it was."""
        grad = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            self._check()
            if self.surroundings.intact():
                replay(*args)
            else:
                with self.surroundings.restored():
                    replay(*args)
        except Exception as error:
            note(error, (lambda: f"the replay of {self.operation.name}", self.place))
            raise
        finally:
            set_grad_enabled(grad)


def _is_number(tensor: Tensor | None) -> bool:
    """Whether a tensor is numbers, and not, say, a kernel's workspace, of which parts may be left unwritten.

    Nor a parameter whose memory FSDP has taken away again.
    """
    return tensor is not None and (tensor.is_floating_point() or tensor.is_complex()) and not is_hollow(tensor)


def _heads(slots: Sequence[Slot | None]) -> list[Slot]:
    """Find the inputs to be freed behind these slots."""
    return list({id(head): head for s in slots if s is not None and (head := s.head()) is not None}.values())


def _frees(inputs: tuple[Any, ...]) -> bool:
    """Whether these inputs are to be freed, so that a call must be able to rebuild them though nothing needs it."""
    return bool(_heads([slot_of(x, key_of(x)) for x in inputs if isinstance(x, Tensor)]))


def _none() -> None:
    return None
