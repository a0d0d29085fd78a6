"""What the compiled engine asks the compiler while that traces: which tensors moved, what is random, what is missed.

Each function here is traced. The work is done by another one that `comptime` runs for real, on what the compiler knows
of the caller's variables: tensors without values ("fakes"), and the graph so far.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .._torch import storage_key, top_hook
from ..fingerprint import tolerance

__all__ = [
    "allowed_error",
    "begin",
    "changed_tensors",
    "check_closures",
    "examine",
    "find_used",
    "frame_named",
    "frames",
    "gave_up",
    "note_tensors",
    "number",
    "stop",
    "used_tensors",
]

_versions: list[int] = []  # of the tensors noted last; the compiler works for one thread at a time
_changed: list[int] = []
_read: list[Node] = []  # nodes that take what was changed, and do not change it
_used: list[int] = []
_given_up: list[bool] = []
_dtypes: set[torch.dtype] = set()  # of all that the chain computes
frames = SimpleNamespace()
_frame_names: dict[str, str] = {}
_numbers = itertools.count()
_ENGINE = str(Path(__file__).parents[1])
_UNFIT = {  # what the compiler's graph may hold, but `torch.func.vjp` of it not
    "cond": "look at no tensor's value",
    "item": "look at no tensor's value",
    "tag_activation_checkpoint": "do without torch.utils.checkpoint",
    **{f"_{kind}_increment_nesting": "do without torch.func's transforms" for kind in ("grad", "jvp", "vmap")},
}


def begin(name: str) -> None:  # noqa: ARG001 - comptime reads it
    """Find out whether the chain of this name can be traced as one function.

    The compiler may be trying once more, after it could not trace what called the chain. Or hooks on saved tensors are
    active, with which `torch.func.vjp` cannot be traced.
    """
    comptime(_begin)


def _begin(context: ComptimeContext) -> None:
    """Do what :func:`begin` says while the compiler traces; likewise the functions below."""
    translator: Any = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    while translator.parent is not None:
        translator = translator.parent
    _dtypes.clear()
    once_more = translator.f_code.co_filename.startswith(_ENGINE)
    if once_more:
        name = context.get_local("name").as_python_constant()
        warnings.warn(
            f"torch.compile could not trace {name} as one function; compiled in pieces, it stores what backward needs. "
            "With fullgraph=True an error says why; mode 'store' says that this is meant",
            stacklevel=2,
        )
    _given_up[:] = [True] * (once_more or top_hook() is not None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def gave_up() -> bool:
    """Whether :func:`begin` found that the chain runs in pieces, and stores."""
    return bool(_given_up)


def stop(problem: str) -> None:  # noqa: ARG001 - comptime reads them
    """Let the compiler stop with a message (`fullgraph=True`), or do without the chain."""
    comptime(_stop)


def _stop(context: ComptimeContext) -> None:
    context.graph_break(context.get_local("problem").as_python_constant())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def frame_named(where: str) -> str:
    """Return the name of one of the :data:`frames`, a function that calls a function in a frame of the name ``where``.

    The compiler's errors list the frames that they come from, and nothing else that we could add to.
    """
    if where not in _frame_names:
        _frame_names[where] = f"frame_{len(_frame_names)}"
        setattr(frames, _frame_names[where], FunctionType(_call.__code__.replace(co_name=where), globals()))
    return _frame_names[where]


def _call(function: Callable[..., Any], args: tuple[Any, ...], side: dict[str, Any]) -> Any:
    return function(*args, **side)


def note_tensors(tensors: Sequence[Tensor]) -> None:  # noqa: ARG001 - comptime reads them
    """Remember how often these were changed in place."""
    comptime(_note)


def _note(context: ComptimeContext) -> None:
    _versions[:] = [fake._version for fake in _fakes(context, "tensors")]


_MOVING = frozenset(("add_", "batch_norm", "instance_norm"))  # they move statistics, and training reads none


def examine(tensors: Sequence[Tensor], where: str) -> None:  # noqa: ARG001 - comptime reads them
    """Look at what was traced since :func:`note_tensors`: find what it changed, and stop if it cannot be done again."""
    comptime(_examine)


def _examine(context: ComptimeContext) -> None:
    fakes, changed = _fakes(context, "tensors"), set()
    modules = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.nn_modules
    nodes = _inside(context.graph(), modules)
    for node in nodes:
        if node.meta.get("invzoo_checked"):
            continue
        node.meta["invzoo_checked"] = True
        values = tree_leaves(node.meta.get("example_value"))
        _dtypes.update(value.dtype for value in values if isinstance(value, Tensor))
        name = _name(node)
        if name == "item" and not any(map(free_unbacked_symbols, values)):
            continue  # a number that the compiler made a tensor of, for other numbers to come
        expected = _UNFIT.get(name)
        if expected is None:
            watch = _watched(node)
            changed |= watch.changed
            expected = "draw no random numbers in training" if watch.random else None
        if expected is not None:
            where = context.get_local("where").as_python_constant()
            context.graph_break(
                f"Expected layers that {expected} in a chain under torch.compile, whose backward could not do the same "
                f"again; got {where}, which uses {name!r}. Use mode 'store' for the whole chain"
            )
    _changed[:] = [i for i, x in enumerate(fakes) if x._version != _versions[i] or storage_key(x) in changed]
    moved = {storage_key(fakes[i]) for i in _changed}
    # Those of calls before this one as well, which would be replayed with what it leaves there.
    nodes = nodes if moved else []
    _read[:] = [node for node in nodes if _name(node) not in _MOVING and not moved.isdisjoint(_memory(node))]


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _memory(node: Node) -> list[int | None]:
    """Return the storages that a node takes."""
    values = [source.meta.get("example_value") for source in node.all_input_nodes]
    return [storage_key(x) for x in values if isinstance(x, Tensor)]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def changed_tensors() -> tuple[int, ...]:
    """Return the positions of those that :func:`examine` found changed."""
    return tuple(_changed)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def reads_changed() -> bool:
    """Whether :func:`examine` found that something changed is read by more than the operators that change it."""
    return bool(_read)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def allowed_error() -> float:
    """Return the relative error allowed in what is rebuilt from what :func:`examine` looked at."""
    return tolerance(_dtypes)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def number() -> int:
    """Return a number that no other trace gets."""
    return next(_numbers)


def find_used(tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:  # noqa: ARG001 - comptime reads them
    """Find out which of the tensors have a gradient, given that ``outputs`` have one."""
    comptime(_find_used)


def _find_used(context: ComptimeContext) -> None:
    todo, reached = _nodes(context, "outputs"), set()
    while todo:
        node = todo.pop()
        values = tree_leaves(node.meta.get("example_value"))
        if node not in reached and any(isinstance(value, Tensor) and value.requires_grad for value in values):
            reached.add(node)
            todo += node.all_input_nodes
    _used[:] = [i for i, node in enumerate(_nodes(context, "tensors")) if node in reached]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def used_tensors() -> tuple[int, ...]:
    """Return the positions of those that :func:`find_used` found."""
    return tuple(_used)


def check_closures(tensors: Sequence[Any], name: str) -> None:  # noqa: ARG001 - comptime reads them
    """Raise if the function that is traced uses a tensor that needs a gradient and is none of ``tensors``."""
    comptime(_check_closures)


def _check_closures(context: ComptimeContext) -> None:
    known = {id(fake) for fake in _fakes(context, "tensors")}
    for node in context.graph().find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.requires_grad and id(value) not in known and node.users:
            name = context.get_local("name").as_python_constant()
            context.graph_break(
                f"Expected the tensors that need a gradient to be inputs, side inputs or parameters of {name}, under "
                f"torch.compile; got another one of shape {tuple(value.shape)} ({node.name!r}). "
                "Register it, or use mode 'store' for the whole chain"
            )


def _inside(graph: fx.Graph, modules: dict[str, Any]) -> list[fx.Node]:
    """Return all nodes, those of graphs inside included."""
    nodes = []
    for node in graph.nodes:
        nodes.append(node)
        inner = modules.get(node.target) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            nodes += _inside(inner.graph, modules)
    return nodes


def _nodes(context: ComptimeContext, name: str) -> list[fx.Node]:
    variables: Any = context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
    return [x.as_proxy().node for x in variables.items if x.is_tensor()]


def _fakes(context: ComptimeContext, name: str) -> list[Tensor]:
    return [node.meta["example_value"] for node in _nodes(context, name)]


class _Watch(TorchDispatchMode):
    """Notices operators that draw random numbers or change what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.random = False
        self.changed: set[int | None] = set()  # storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments, kwargs = func._schema.arguments, kwargs or {}
        given = {a.name: args[i] if i < len(args) else a.default_value for i, a in enumerate(arguments)} | kwargs
        self.random |= _draws(func, given)
        written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        if "batch_norm" in func._schema.name and (given.get("training") or given.get("train")):
            written |= {"running_mean", "running_var"}  # not all of their schemas say so
        self.changed |= {storage_key(x) for x in map(given.get, written) if isinstance(x, Tensor)}
        return func(*args, **kwargs)


def _draws(operator: Any, given: dict[str, Any]) -> bool:
    """Whether an operator draws random numbers for these arguments: attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    idle = given.get("train") is False or given.get("training") is False
    return not idle and given.get("dropout_p", given.get("dropout")) != 0


def _watched(node: fx.Node) -> _Watch:
    """Do what a node of the compiler's graph does once more, on fakes, and watch."""
    watch, value = _Watch(), node.meta.get("example_value")
    if node.op not in ("call_function", "call_method") or not isinstance(value, Tensor | tuple):
        return watch
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_"):  # in place, so that versions tell
        packet = getattr(torch.ops.aten, name, None)
        watch.random = packet is not None and any(_draws(getattr(packet, o), {}) for o in packet.overloads())
        return watch
    args, kwargs = tree_map_only(fx.Node, lambda n: n.meta.get("example_value"), (node.args, node.kwargs))
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    if isinstance(function, torch._ops.HigherOrderOperator):  # its graphs are looked at on their own
        return watch
    with detect_fake_mode(), watch:  # type: ignore[union-attr]  # the compiler has one
        function(*args, **kwargs)
    return watch
