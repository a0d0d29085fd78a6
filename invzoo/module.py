"""The base class of every invertible layer, and a layer with its directions swapped."""

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from . import engine
from .compiling import Compilable
from .domains import Domain
from .engine import Mode, Operation, Policy, SideNames, Tape
from .errors import refuse
from .invtorch import Flags
from .log_dets import LogDets, zero_log_det
from .own_hooks import check_hook
from .protocol import WORDS, BaseMap, Bijection, ByHand, Run, defines, run_of, side_names_of

__all__ = ["Composite", "Inverse", "InvertibleModule", "mode", "modules_behind"]


class InvertibleModule(Flags, Compilable, Bijection, nn.Module):
    """A layer ``y = function(x)`` that rebuilds what its backward needs with ``x = inverse(y)``.

    A subclass says its maths in a few words, `move`, `undo` and where it has them `given` and `log_slope`, from which
    all methods are derived; or it writes :meth:`function`, :meth:`inverse` and :meth:`log_det`. ``forward`` belongs to
    this class. Both directions take one or several tensors and return as many as the other takes. Side inputs
    (conditions, masks) are keyword arguments of both; they are never freed, and gradients reach them. A ``function``
    may return more than callers should see (what its inverse needs besides): override ``forward`` to call
    ``super().forward`` and hide it.

    Hooks fire for ``layer(x)`` alone, as for any module: not for the other methods, nor for those of :attr:`inv`, whose
    inputs and outputs are no ``forward``'s. Hooks on modules inside fire in every direction. A hook that computes one
    of the layer's own parameters is refused; a parametrization of `torch.nn.utils.parametrize` is seen by all methods.

    Args:
        mode: ``'store'``, ``'recompute'`` or ``'invert'`` (default).
        check: compare a replay with its forward on the ``'first'`` call until it was right once, ``'always'``, or
            ``'never'``.
        free_input: free the memory of the input, although the caller holds it, until backward.
        invertible, checkpoint: the mode as two flags: ``checkpoint=False`` stores, ``invertible=False`` recomputes.
        seed: keep the state of the random number generators on every call; otherwise on calls that use them.

    Raises:
        TypeError: for a class that defines ``forward`` and no ``function``; and in mode ``invert``, for a layer that
            has no inverse.

    Example:
        >>> class Double(iz.InvertibleModule):
        ...     def move(self, x): return 2 * x
        ...     def undo(self, y): return y / 2
        >>> Double()(torch.ones(3))
        tensor([2., 2., 2.])
    """

    domain: ClassVar[Domain] = constraints.real  # a tuple, if several inputs have their own
    codomain: ClassVar[Domain] = constraints.real
    bijective: ClassVar[bool] = True  # one-to-one and onto; a surjection is not
    volume_preserving: ClassVar[bool] = False
    rearranges: ClassVar[bool] = False  # entries go elsewhere as they are, and their domain with them
    saturating: ClassVar[bool] = False  # the inverse loses precision: mode invert keeps the input instead
    slow_inverse: ClassVar[bool] = False  # the inverse takes many evaluations: mode invert keeps the input instead
    exact: ClassVar[bool] = False  # the inverse is exact in floating point
    two_way: ClassVar[bool] = True  # the function undoes the inverse too, whatever that was given
    assumes_dim: bool = False  # whether `dim` was not given, and is 1, for which one tensor of three dims is refused
    streams: Any = None  # how the layer splits one tensor into two streams, if it takes either
    _looked_behind: bool = False  # whether somebody has asked who trains the modules behind its functions

    by_hand: ClassVar[bool] = True  # whether calls run `function` and `inverse`, not the words; derived from the class

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.by_hand = _is_by_hand(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WORDS and isinstance(value, nn.Module):  # which Python would never find behind the method
            rule = "be the method of that name: call the module something else"
            refuse(self, name, rule, type(value).__name__, TypeError)
        super().__setattr__(name, value)

    def __init__(
        self,
        *,
        mode: Mode | str | None = None,
        check: str = "first",
        free_input: bool = False,
        invertible: bool = True,
        checkpoint: bool = True,
        seed: bool = False,
    ) -> None:
        if _is_overridden(self, "forward") and not (_is_overridden(self, "function") or defines(self, "move")):
            lines = "`def function(self, x): ...` in place of forward, and `def inverse(self, y): ...`"
            got = f"forward, whose activations nobody would free. Write {lines}"
            refuse(self, "class", "define function, which forward runs", got, TypeError)
        super().__init__()
        freeing = Mode.invert if invertible else Mode.recompute
        self._policy = Policy(freeing, engine.check_of(check), seed, free_input, freeing=freeing)
        if mode is not None or not checkpoint:
            self._policy.set_mode(engine.mode_of(mode or Mode.store))

    def function(self, *inputs: Any, **side: Any) -> Any:
        """Map inputs to outputs: by `move`, unless a subclass writes it."""
        _check_call(self, inputs, side, run := _run_in_words(self, inverted=False))
        return run.function(*inputs, **side)

    def inverse(self, *outputs: Any, **side: Any) -> Any:
        """Map outputs back to inputs: by `undo`, unless a subclass writes it."""
        self.prepare(outputs, inverted=True)
        _check_call(self, outputs, side, run := _run_in_words(self, inverted=True))
        return run.function(*outputs, **side)

    def log_det(self, *inputs: Any, **side: Any) -> Tensor:
        """Compute log abs det of the Jacobian of :meth:`function` at ``inputs``, per sample: shape (B,)."""
        if defines(self, "move") and (not self.by_hand or _is_overridden(self, "log_det")):
            _check_call(self, inputs, side, run := Run(self, self))
            return run.log_det_at(inputs, side)
        if not self.volume_preserving:
            refuse(self, "layer", "be a bijection with a log-determinant", "one without", TypeError)
        return zero_log_det(self, inputs)

    def replay(self, tape: Tape, /, *outputs: Any, **side: Any) -> None:
        """Rebuild the inputs and run the function once more on the tape: for a layer that words do not serve."""
        tape.run(self.function, *tape.invert(*outputs), **side)

    def prepare(self, values: tuple[Any, ...], *, inverted: bool) -> None:
        """Look at what a call is about to get: before each, in either direction, and before no replay."""

    def forward(self, *inputs: Any, strict_forward: bool = False, **side: Any) -> Any:
        """Run :meth:`function` so that backward rebuilds what it needs."""
        with self._freeing(inputs):
            self.prepare(inputs, inverted=False)
            outputs = self.through_engine(inputs, side)
        return engine.tuple_of(outputs)[0] if self.keeps_seen else outputs

    def forward_and_log_det(self, *inputs: Any, **side: Any) -> tuple[Any, Tensor]:
        """Return what the layer returns, and log abs det of its Jacobian per sample, with the same memory.

        Returns:
            ``(y, log_det)`` with ``log_det`` of shape (B,), in the dtype of the input, or float32 if that is a half.

        Raises:
            TypeError: for a layer that is no bijection.
        """
        with self._freeing(inputs):
            self.prepare(inputs, inverted=False)
            *outputs, log_det = self.through_engine(inputs, side, log_det=True)
        return (outputs[0] if len(outputs) == 1 or self.keeps_seen else tuple(outputs)), log_det

    def inverse_and_log_det(self, *outputs: Any, **side: Any) -> tuple[Any, Tensor]:
        """Return the inverse and log abs det of *its* Jacobian, so minus that of the forward, as a call of its own."""
        with self._freeing(outputs, ".inv"):
            self.prepare(outputs, inverted=True)
            *inputs, log_det = self.through_engine(outputs, side, inverted=True, log_det=True)
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), log_det

    def register_forward_pre_hook(self, hook: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Register a hook that ``layer(x)`` calls first; one that computes a parameter of the layer is refused."""
        check_hook(self, hook)
        return super().register_forward_pre_hook(hook, *args, **options)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse `torch.jit.script`, which asks every module inside what it scripts."""
        refuse(self, "layer", "be given to torch.export or torch.jit.trace", "torch.jit.script", TypeError)

    def _freeing(self, inputs: tuple[Any, ...], direction: str = "") -> AbstractContextManager[Any]:
        if not inputs:
            refuse(self, "inputs", "be one tensor or several", "none", TypeError)
        frees = self._frees_input() and not engine.inside_container()
        return engine.freeing(self._name() + direction, inputs) if frees else nullcontext()

    def _frees_input(self) -> bool:
        return self._policy.free_input

    def through_engine(
        self, values: tuple[Any, ...], side: dict[str, Any], *, inverted: bool = False, log_det: bool = False
    ) -> Any:
        """Run one direction through the engine; return what comes out, and behind it the log-determinant."""
        _check_call(self, values, side, run := run_of(self, inverted=inverted, log_det=log_det))
        return engine.call(_operation(self, run), values, side)

    def in_direction(self, inverted: bool, log_det: bool, *values: Any, **side: Any) -> Any:
        return run_of(self, inverted=inverted, log_det=log_det).function(*values, **side)

    def _roots(self) -> tuple[nn.Module, ...]:
        """Return the modules that :meth:`function` sees: this one, and those behind functions that it was given."""
        values = [v for name, v in vars(self).items() if name not in _COMPILED and not isinstance(v, _DATA)]
        functions = [v for v in values if callable(v)]
        return (self, *modules_behind(self, *functions)) if functions else (self,)

    def side_names(self) -> SideNames:
        """Return the names of the side inputs that the layer takes."""
        return side_names_of(self) if _is_in_words(self, "function") else SideNames.of(self.function)

    def takes_streams(self, first: int, second: int) -> bool:
        """Whether the layer does the same to streams of these sizes as to the tensor that they make up."""
        return True

    def _name(self) -> str:
        return type(self).__name__

    def _has_inverse(self) -> bool:
        return _is_overridden(self, "inverse") or defines(self, "undo")

    def has_log_det(self) -> bool:
        """Whether the layer has a log-determinant."""
        by_slope = defines(self, "log_slope") and not self.by_hand
        return self.volume_preserving or _is_overridden(self, "log_det") or by_slope

    @property
    def inv(self) -> "InvertibleModule":
        """This layer with its directions swapped, its parameters and mode shared."""
        return Inverse(self)


_COMPILED = ("_compiled", "_compiled_call_impl")
_DATA = (dict, list, tuple, set, int, float, str, Tensor)  # the compiler does not know that they cannot be called


def modules_behind(layer: InvertibleModule, *functions: Callable[..., Any]) -> list[nn.Module]:
    """Find the modules that functions which a layer was given lead to; warn once of those that nobody trains."""
    modules = engine.modules_of(*functions)
    if modules and not layer._looked_behind and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        trained = any(p.requires_grad for module in modules for p in module.parameters())
        if trained and (strangers := engine.unregistered(modules)):
            names = ", ".join(dict.fromkeys(type(module).__name__ for module in strangers))
            warnings.warn(
                f"{layer._name()}: Expected the modules behind its functions to be registered where an optimizer finds "
                f"them; got {names}, which neither the layer nor a module that calls it holds. Pass the module itself, "
                "or register it: `layer.add_module('net', net)`",
                stacklevel=_depth_of_caller(),
            )
        if trained:
            layer._looked_behind = True
    return modules


def _depth_of_caller() -> int:
    """Return how many of the callers of this function's caller are of this package or torch, plus 1."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((f"{__package__}.", "torch.")):
        frame, depth = frame.f_back, depth + 1
    return depth


def _operation(layer: InvertibleModule, run: Run | ByHand) -> Operation:
    """Say to the engine what a layer does in a direction."""
    inverted, log_det = run.inverted, run.log_det
    there, back, roots = run.function, run.inverse, layer._roots()
    if inverted and not log_det and "inverse" in vars(layer):  # wrapped, by FSDP say, to gather parameters first
        there = layer.inverse
    if compiled := layer._compiled:
        evaluate = compiled(layer.in_direction)
        there, back = partial(evaluate, inverted, log_det), partial(evaluate, not inverted, False)
    return Operation(
        name=layer._name() + ".inv" * inverted + " (log_det)" * log_det,
        function=there,
        inverse=back if inverted or layer._has_inverse() else None,
        replay=None if compiled else run.replay,
        roots=roots,
        policy=layer._policy,
        keeps_input=layer.saturating or (layer.slow_inverse if not inverted else not layer.two_way),
        takes_saved=not inverted and "saved" in SideNames.of(layer.inverse).names,
        log_det=log_det,
        foreign=len(roots) > 1,
        in_pieces=run.in_pieces and not compiled,
    )


def _run_in_words(layer: InvertibleModule, *, inverted: bool) -> Run:
    if not defines(layer, "move"):
        name, arguments = ("inverse", "*outputs") if inverted else ("function", "*inputs")
        raise NotImplementedError(f"Expected {type(layer).__name__} to define {name}({arguments}, **side); got none")
    return Run(layer, layer, inverted)


def _check_call(layer: InvertibleModule, values: tuple[Any, ...], side: dict[str, Any], run: Run | ByHand) -> None:
    """Refuse a side input that the layer does not take, one by position, and values that it cannot map."""
    if side:
        layer.side_names().check(layer, side)
    if len(values) > 1 and not layer.keeps_seen and len(values) > (takes := _takes(layer, run.inverted)):
        names = " and ".join(f"`{name}=`" for name in sorted(layer.side_names().names))
        hint = f". Pass {names} by name" if names else ""
        refuse(layer, "inputs", f"be {takes} by position", f"{len(values)}{hint}", TypeError)
    run.check(values)


def _takes(layer: InvertibleModule, inverted: bool) -> float:
    """Return how many values a direction takes by position, at most."""
    method = "inverse" if inverted else "function"
    return (side_names_of(layer) if _is_in_words(layer, method) else SideNames.of(getattr(layer, method))).inputs


def _is_by_hand(kind: type[InvertibleModule]) -> bool:
    """Whether the methods of a class are its own, not what its words make of them."""
    if kind.function is InvertibleModule.function and kind.inverse is InvertibleModule.inverse:
        own_log_det = kind.log_det is not InvertibleModule.log_det and kind.log_slope is BaseMap.log_slope
        return own_log_det or kind.move is BaseMap.move
    written = vars(kind)
    if not written.keys() & {"function", "inverse"} and (words := sorted(written.keys() & {"move", "undo"})):
        raise TypeError(
            f"{kind.__name__}: Expected function and inverse, since a class that it extends writes those; got {words}"
        )
    return True


def _is_in_words(layer: InvertibleModule, method: str) -> bool:
    """Whether a method is derived from the words of a layer."""
    return not layer.by_hand or (defines(layer, "move") and not _is_overridden(layer, method))


def _is_overridden(layer: InvertibleModule, method: str) -> bool:
    return getattr(type(layer), method) is not getattr(InvertibleModule, method)


class Inverse(InvertibleModule):
    """A layer with its directions swapped: ``y = layer.inverse(x)``, ``x = layer.function(y)``.

    Args:
        layer: the layer; its parameters, mode and checks are shared.

    Raises:
        TypeError: for a layer that is not an invertible module.

    Example:
        >>> layer = iz.Permute([2, 0, 1])
        >>> x = torch.arange(3.).unsqueeze(0)
        >>> layer.inv(layer(x))
        tensor([[0., 1., 2.]])
        >>> layer.inv.inv is layer
        True
    """

    def __init__(self, layer: InvertibleModule) -> None:
        super().__init__()
        if not isinstance(layer, InvertibleModule):
            refuse(self, "layer", "be an InvertibleModule", type(layer).__name__, TypeError)
        self.layer, self.training = layer, layer.training
        self._policy = layer._policy

    domain = property(lambda self: self.layer.codomain)
    codomain = property(lambda self: self.layer.domain)
    bijective = property(lambda self: self.layer.bijective)
    volume_preserving = property(lambda self: self.layer.volume_preserving)
    rearranges = property(lambda self: self.layer.rearranges)
    saturating = property(lambda self: self.layer.saturating)
    slow_inverse = property(lambda self: not self.layer.two_way)  # then mode invert keeps the inputs as well
    exact = property(lambda self: self.layer.exact)
    assumes_dim = property(lambda self: self.layer.assumes_dim)
    streams = property(lambda self: self.layer.streams)
    inv = property(lambda self: self.layer)
    _compiled = property(lambda self: self.layer._compiled)

    def function(self, *inputs: Any, **side: Any) -> Any:
        return self.layer.inverse(*inputs, **side)

    def inverse(self, *outputs: Any, **side: Any) -> Any:
        self.prepare(outputs, inverted=True)
        return self.layer.function(*outputs, **side)

    def through_engine(
        self, values: tuple[Any, ...], side: dict[str, Any], *, inverted: bool = False, log_det: bool = False
    ) -> Any:
        if isinstance(self.layer, Composite) and not (inverted or log_det):
            return self.layer.inverse(*values, **side)  # which FSDP may have wrapped, to gather parameters first
        return self.layer.through_engine(values, side, inverted=not inverted, log_det=log_det)

    def forward_and_log_det(self, *inputs: Any, **side: Any) -> tuple[Any, Tensor]:
        return self.layer.inverse_and_log_det(*inputs, **side)

    def inverse_and_log_det(self, *outputs: Any, **side: Any) -> tuple[Any, Tensor]:
        return self.layer.forward_and_log_det(*outputs, **side)

    def prepare(self, values: tuple[Any, ...], *, inverted: bool) -> None:
        self.layer.prepare(values, inverted=not inverted)

    def compile(self, *args: Any, **options: Any) -> None:
        self.layer.compile(*args, **options)

    def log_det(self, *inputs: Any, **side: Any) -> Tensor:
        if not isinstance(self.layer, Composite):
            _check_call(self.layer, inputs, side, run_of(self.layer, inverted=True))
        return self.layer.in_direction(True, True, *inputs, **side)[-1]

    def has_log_det(self) -> bool:
        return self.layer.has_log_det()

    def side_names(self) -> SideNames:
        return self.layer.side_names()

    def _roots(self) -> tuple[nn.Module, ...]:
        return self.layer._roots()

    def takes_streams(self, first: int, second: int) -> bool:
        return self.layer.takes_streams(first, second)

    def _policies(self) -> list[Policy]:
        return self.layer._policies()

    def _name(self) -> str:
        return f"{self.layer._name()}.inv"


class Composite(InvertibleModule):
    """A layer made of layers that are calls of their own. Abstract: a subclass says how values pass through them."""

    def through(
        self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None, *, inverted: bool = False
    ) -> Any:
        """Pass values through, one way or back; add the steps' log-determinants to ``log_dets``, if there is one."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define through(values, side, log_dets, inverted=)"
        )

    def function(self, *inputs: Any, **side: Any) -> Any:
        return self.through_engine(inputs, side)

    def inverse(self, *outputs: Any, **side: Any) -> Any:
        return self.through_engine(outputs, side, inverted=True)

    def log_det(self, *inputs: Any, **side: Any) -> Tensor:
        return self.through_engine(inputs, side, log_det=True)[-1]

    def through_engine(
        self, values: tuple[Any, ...], side: dict[str, Any], *, inverted: bool = False, log_det: bool = False
    ) -> Any:
        if side:
            self.side_names().check(self, side)
        outputs = self.through(values, side, log_dets := LogDets() if log_det else None, inverted=inverted)
        return outputs if log_dets is None else (*engine.tuple_of(outputs), log_dets.total(self, values))

    def in_direction(self, inverted: bool, log_det: bool, *values: Any, **side: Any) -> Any:
        return self.through_engine(values, side, inverted=inverted, log_det=log_det)


class mode:  # noqa: N801 - reads as the word that it is, like torch.set_grad_enabled
    """Set the mode of every invertible module inside ``module``.

    It acts at once; used in a ``with``, it puts the mode that each module had back at the end. In ``'invert'`` a layer
    without an inverse is recomputed.

    Args:
        module: a module with invertible modules in it, or one itself.
        value: ``'store'``, ``'recompute'`` or ``'invert'``.

    Raises:
        ValueError: for another mode, and for a module without invertible modules; then nothing changes.

    Example:
        >>> layer = iz.InvertibleLeakyReLU()
        >>> with iz.mode(layer, "store"):
        ...     print(layer.mode)
        store
        >>> _ = iz.mode(layer, "recompute")
        >>> print(layer.mode)
        recompute
    """

    def __init__(self, module: nn.Module, value: Mode | str) -> None:
        value = engine.mode_of(value)
        modules = module.modules() if isinstance(module, nn.Module) else ()
        layers = [m for m in modules if isinstance(m, InvertibleModule)]
        if not layers:
            got = f"{type(module).__name__}, none of whose modules saves memory"
            refuse("iz.mode", "module", "be an InvertibleModule or hold one", got)
        otherwise = Mode.recompute if value is Mode.invert else value
        self._modes = [(layer._policy, value if layer._has_inverse() else otherwise) for layer in layers]
        self._before = [(policy, policy.mode, policy.freeing) for policy, _ in self._modes]
        self.__enter__()

    def __enter__(self) -> None:
        for policy, value in self._modes:
            policy.set_mode(value)

    def __exit__(self, *error: object) -> None:
        for policy, before, freeing in self._before:
            policy.mode, policy.freeing = before, freeing
