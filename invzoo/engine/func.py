"""The engine inside `torch.func.grad` and `vjp`, where torch allows no hooks on saved tensors.

NOTE [Transforms]

1. A transform differentiates at a level of its own, whose tensors wrap those of the level below. A call runs below, on
   what they wrap, where it works as ever. Its graph there is one node of the transform's graph (`_Below`), which saves
   nothing.
2. The function may use more wrapped tensors than it is given. Parameters and buffers of a `functional_call` are
   replaced in the modules; others that a function closes over by a mode (`_Lower`), in forward and in replays. All of
   them are inputs of the node.
3. Of the graph below only the edges are kept where gradients go in and come out. It begins at nodes that hold nothing
   (`_Enter`): what a leaf or an output would hold is the engine's to free.
4. A transform records its backward. That of a call is linear in the gradients that it gets (`_Gradients`), and so is
   the derivative of that (`_Tangents`). A derivative in the inputs can be asked for while the transform lasts, and is
   refused: what a backward returns depends on `Below.anchors`, empty functions of the inputs. Where tensors below need
   gradients themselves, it could be asked for later: there calls step aside.
5. The compiler knows nothing of this: compiled subnets run as they were written, and inside a compiled container calls
   step aside.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ._torch import (
    compiler_watches,
    compiling_nothing,
    has_ended,
    is_wrapped,
    needs_gradient,
    plainly,
    records_below,
    reparametrized,
    unwrapped,
    with_tensors,
)
from .eager.kept import kept
from .nested import map_tensors
from .operation import Operation
from .state import nothing_saved, state

__all__ = ["run_below", "runs_below"]


def runs_below(operation: Operation, inputs: tuple[Any, ...], side: dict[str, Any]) -> bool:
    """Whether a call that steps aside for a transform can run below it instead."""
    if nothing_saved() or (records := records_below()) is None or state.packing or with_tensors is None:
        return False
    if compiler_watches():  # it would take levels and modes for what they are outside
        return False
    tensors: list[Tensor] = [p for root in operation.roots for p in root.parameters()] if records else []
    map_tensors(tensors.append, (inputs, side))
    return not records or not any(unwrapped(x).requires_grad for x in tensors)


def run_below(
    call: "Callable[[Operation, tuple[Any, ...], dict[str, Any]], Any]",
    operation: Operation,
    inputs: tuple[Any, ...],
    side: dict[str, Any],
) -> Any:
    """Make a call of the engine below the transform that is active."""
    records = bool(records_below())
    state.below = True
    try:
        with plainly(), torch.enable_grad(), compiling_nothing():
            below = Below(operation.name, records, _next_number())
            arguments = map_tensors(below.lower, (inputs, side))
            modules, tensors = below.lower_modules(operation.roots)
            result = reparametrized(modules, tensors, lambda: call(below.lowered(operation), *arguments))
            below.note_ends(result)
    finally:
        state.below = False
    wanted = below.release()
    outputs = iter(_Below.apply(below, *wanted) if below.ends and wanted else below.take())
    return map_tensors(lambda _: next(outputs), result)


@dataclass(slots=True)
class Below:
    """What a call did below a transform."""

    name: str
    records: bool  # whether gradients are recorded below, too
    begin: int  # above the numbers of all nodes that were there before
    given: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by identity, and what stands for it below
    used: set[int] = field(default_factory=set)  # those of them that the function found itself
    starts: list[GradientEdge] = field(default_factory=list)  # where gradients of those that need one come out
    ends: list[tuple[int, GradientEdge]] = field(default_factory=list)  # and where those of outputs go in
    outputs: list[Tensor] = field(default_factory=list)
    differentiable: list[Tensor] = field(default_factory=list)  # those of the given that need a gradient
    anchors: list[Tensor] = field(default_factory=list)  # empty tensors of the transform, which depend on them
    leaves: list[weakref.ref[Tensor]] = field(default_factory=list)  # that the function made
    released: bool = False  # the forward is done

    def lower(self, tensor: Tensor) -> Tensor:
        """Return what stands for a tensor below."""
        if not is_wrapped(tensor):
            return tensor
        if id(tensor) in self.given:
            return self.given[id(tensor)][1]
        value = unwrapped(tensor)
        if self.released:  # an inverse uses it, which has no gradients
            return value
        if tensor.requires_grad:
            value = _start(value.detach())
            self.starts.append(get_gradient_edge(value))
            self.differentiable.append(tensor)
        self.given[id(tensor)] = tensor, value
        return value

    def find(self, tensor: Tensor) -> Tensor:
        """Return what stands for a tensor that the function uses."""
        if is_wrapped(tensor):
            self.used.add(id(tensor))
        elif (
            self.records
            and not self.released
            and torch.is_grad_enabled()  # without, nothing leads back, though views by torch.unbind say they need one
            and tensor.requires_grad
            and self._is_older(tensor)
        ):
            raise RuntimeError(
                f"Expected {self.name} inside a transform of torch.func to close over no tensor that needs a gradient "
                f"outside of it; got one of shape {tuple(tensor.shape)}. Pass it as a side input, or use mode 'store'"
            )
        return self.lower(tensor)

    def _is_older(self, tensor: Tensor) -> bool:
        """Whether a tensor was there before the call."""
        if tensor.grad_fn is None:
            return not any(ref() is tensor for ref in self.leaves)
        return tensor.grad_fn._sequence_nr() < self.begin

    def note(self, result: Any) -> None:
        """Note a leaf that the function made, to differentiate by itself."""
        if isinstance(result, Tensor) and result.requires_grad and result.grad_fn is None:
            self.leaves.append(weakref.ref(result))

    def lower_modules(self, roots: Sequence[nn.Module]) -> tuple[list[nn.Module], list[dict[str, Tensor]]]:
        """Return the modules that have wrapped tensors, and what stands for those."""
        found = []
        for root in roots:
            named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
            if lowered := {name: self.lower(tensor) for name, tensor in named if is_wrapped(tensor)}:
                found.append((root, lowered))
        return [root for root, _ in found], [lowered for _, lowered in found]

    def lowered(self, operation: Operation) -> "Operation":
        """Return the operation as it is below."""

        def lowered(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                with compiling_nothing():
                    if self.released and not self.used:
                        return function(*args, **options)
                    with _Lower(self):
                        result = function(*args, **options)
                return map_tensors(self.find, result)

            return run

        functions = {name: getattr(operation, name) for name in ("function", "inverse", "replay")}
        changes: dict[str, Any] = {name: lowered(f) for name, f in functions.items() if f is not None}
        return replace(operation, **changes)

    def note_ends(self, result: Any) -> None:
        """Note where the graph ends."""
        map_tensors(self.outputs.append, result)
        self.ends = [(i, get_gradient_edge(y)) for i, y in enumerate(self.outputs) if y.requires_grad]
        self.outputs = [y.detach() for y in self.outputs]

    def release(self) -> list[Tensor]:
        """Forget the inputs, but for those that replays find themselves; return those that need gradients."""
        self.given = {key: pair for key, pair in self.given.items() if key in self.used}
        self.released = True
        tensors, self.differentiable = self.differentiable, []
        self.anchors = [tensor[None][:0].clone() for tensor in tensors]
        return tensors

    def has_ended(self) -> bool:
        """Whether the transform has."""
        return has_ended(self.anchors[0])

    def take(self) -> tuple[Tensor, ...]:
        """Return the outputs, and forget them."""
        outputs, self.outputs = self.outputs, []
        return tuple(outputs)


class _Lower(TorchFunctionMode):
    """Let functions see what tensors of the transform wrap."""

    def __init__(self, below: Below) -> None:
        super().__init__()
        self.below = below

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*map_tensors(self.below.find, args), **map_tensors(self.below.find, kwargs or {}))
        self.below.note(result)
        return result


def _start(tensor: Tensor) -> Tensor:
    """Begin a graph at a tensor, whatever the surroundings are."""
    with torch.enable_grad():
        return _Enter.apply(tensor.new_empty(0, requires_grad=True), [tensor])


def _next_number() -> int:
    """Return a number above those of all nodes that are there."""
    return get_gradient_edge(_start(torch.empty(0))).node._sequence_nr()


class _Enter(torch.autograd.Function):
    """Begin a graph at a tensor that it does not hold."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, values: list[Tensor]) -> Tensor:  # noqa: ARG004 - torch's interface
        return values[0]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:  # noqa: ARG004 - torch's interface
        return None, None


class _Below(torch.autograd.Function):
    """A call below, as one node."""

    @staticmethod
    def forward(below: Below, *_: Tensor) -> tuple[Tensor, ...]:
        return below.take()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.below = inputs[0]
        ctx.set_materialize_grads(False)
        ends = {i for i, _ in ctx.below.ends}
        ctx.mark_non_differentiable(*[y for i, y in enumerate(output) if i not in ends])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(edge, grad) for i, edge in ctx.below.ends if (grad := grads[i]) is not None]
        if not given:
            return (None,) * (1 + len(ctx.below.starts))
        request = _Request(ctx.below, [edge for edge, _ in given])
        found = iter(request.gradients([grad for _, grad in given]))
        return None, *(next(found) if known else None for known in request.known)


@dataclass(slots=True)
class _Request:
    """A backward of a call below: from which ends, and to which starts it came."""

    below: Below
    ends: list[GradientEdge]
    known: list[bool] = field(default_factory=list)  # for each start
    kinds: list[tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=list)  # of gradients at the ends

    def gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients at the starts that the ends depend on, as a function of those at the ends."""
        if torch.is_grad_enabled() and (not self.below.has_ended() or any(map(needs_gradient, grads))):
            return _Gradients.apply(self, *self.below.anchors, *grads)
        return self.solve(grads)

    def solve(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return them as they are."""
        with kept().one_backward():
            found = torch.autograd.grad(self.ends, self.below.starts, grads, retain_graph=True, allow_unused=True)
        self.known = [grad is not None for grad in found]
        return tuple(grad for grad in found if grad is not None)

    def tangents(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what becomes of changes of the starts at the ends: the transpose of the linear map in `solve`."""
        starts = [start for start, known in zip(self.below.starts, self.known, strict=True) if known]
        with plainly(), torch.enable_grad(), kept().one_backward():
            zeros = [torch.zeros(s, dtype=t, device=d, requires_grad=True) for s, t, d in self.kinds]
            found = torch.autograd.grad(self.ends, starts, zeros, create_graph=True)
            return torch.autograd.grad(found, zeros, grads, retain_graph=True, materialize_grads=True)


class _Gradients(torch.autograd.Function):
    """The backward of a call below, which is linear in the gradients that it gets."""

    @staticmethod
    def forward(request: _Request, *tensors: Tensor) -> tuple[Tensor, ...]:
        grads = tensors[len(request.below.anchors) :]
        request.kinds = [(grad.shape, grad.dtype, grad.device) for grad in grads]
        return request.solve(grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 - torch's interface
        ctx.request = inputs[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], request: _Request, *tensors: Tensor) -> tuple[Any, Any]:
        return _one_by_one(_Gradients, info.batch_size, in_dims[1:], request, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        below = ctx.request.below
        if not below.has_ended():
            raise RuntimeError(
                f"Expected one derivative of {below.name} for a transform of torch.func; got a second one by autograd "
                "inside it. Nest transforms, or use mode 'store'"
            )
        return None, *(None for _ in below.anchors), *_Tangents.apply(ctx.request, *grads)


class _Tangents(torch.autograd.Function):
    """The derivative of `_Gradients`, its transpose."""

    @staticmethod
    def forward(request: _Request, *grads: Tensor) -> tuple[Tensor, ...]:
        return request.tangents(grads)

    setup_context = _Gradients.setup_context

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], request: _Request, *tensors: Tensor) -> tuple[Any, Any]:
        return _one_by_one(_Tangents, info.batch_size, in_dims[1:], request, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Gradients.apply(ctx.request, *ctx.request.below.anchors, *grads)


def _one_by_one(
    function: Any, size: int, dims: Sequence[int | None], request: _Request, tensors: Sequence[Tensor]
) -> tuple[Any, Any]:
    """Map over a batch of gradients that themselves are differentiated later, as those of a Jacobian may be."""
    rows = []
    for i in range(size):
        row = [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)]
        rows.append(function.apply(request, *row))
    results = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    return results, (0,) * len(results)
