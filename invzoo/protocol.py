"""What a layer says of itself, and all that follows from it: both directions, both log-determinants and one replay.

NOTE [The layer protocol]

Both directions of a layer can see the same things: a stream that passes, a condition, the parameters. What is costly is
a function of these alone, ``h = given(...)``; what is left is a cheap map, ``y = move(x, *h)``, and the way back,
``x = undo(y, *h)``. So backward evaluates ``given`` once: its value rebuilds the input, its graph gives the gradients.
What only the map sees, at x, is ``s = seen(x, *h)``.

A call of a layer, in either direction, and with its log-determinant or without, is a `Run`:

    forward:  h = given(passed); s = seen(x, *h);  y = move(x, *h, *s);  log_slope(x, *h, *s)
    inverse:  h = given(passed); x = undo(y, *h);  s = seen(x, *h);     -log_slope(x, *h, *s)
    replay:   h = given(passed); the way back; then the lines behind ``given`` again, until all that autograd saved
              of them is there

A layer may write ``function`` and ``inverse`` instead, in which case a replay is one after the other (`ByHand`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .dtypes import widen
from .engine import SideNames, Tape, tuple_of
from .errors import refuse
from .log_dets import sum_per_sample, zero_log_det

__all__ = [
    "WORDS",
    "BaseMap",
    "Bijection",
    "ByHand",
    "Like",
    "Moving",
    "Run",
    "defines",
    "moved",
    "run_of",
    "seen",
    "side_names_of",
    "undone",
]


class Like(Protocol):
    """What maths may know of a value beside its numbers; a tensor will do."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...


class Moving(Like, Protocol):
    """All that ``given`` may know of the value that moves: never its numbers, which each direction has others of."""

    @property
    def log_det(self) -> bool:
        """Whether the log-determinant is asked for, too."""


@dataclass(slots=True)
class _Moving:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    log_det: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


class BaseMap:
    """A map that can be undone, in the words that all else follows from. Abstract: a subclass writes some of them.

    ``h`` are the values that both directions see, ``s`` those that only the map does, of any kind. The words are
    mathematics alone: they check no arguments and leave no traces, and a replay may stop in the middle of them.
    """

    volume_preserving: ClassVar[bool] = False
    widens: ClassVar[bool] = False  # values come in at least float32, and what becomes of them goes back to their dtype

    def seen(self, x: Any, *h: Any, **_: Any) -> Any:
        """Compute ``s``, what `move` and `log_slope` see at ``x`` besides: a spline's bin, a draw, statistics."""
        return ()

    def move(self, x: Any, *args: Any, **_: Any) -> Any:
        """Compute ``y``, given ``x, *h, *s``."""
        raise NotImplementedError(f"Expected {type(self).__name__} to define move(x, *h); got none")

    def undo(self, y: Any, *args: Any, **_: Any) -> Any:
        """Compute ``x``, given ``y, *h``; with ``s`` behind it, if it has found that on the way."""
        raise NotImplementedError(f"Expected {type(self).__name__} to define undo(y, *h); got none")

    def undo_at(self, x: Any, y: Any, *args: Any, **_: Any) -> Any:
        """As `undo`, where its value is known to be ``x``: for a search, which then writes no `move_`."""
        return self.undo(y, *args)

    def log_slope(self, x: Any, *args: Any, **_: Any) -> Tensor:
        """Compute, given ``x, *h, *s``, log abs of each value's slope: of shape (B, ...), it sums to the log-det."""
        raise NotImplementedError

    def move_(self, x: Any, *args: Any, **_: Any) -> Any:
        """As `move`, in the memory of ``x`` if that saves any."""
        return self.move(x, *args)

    def undo_(self, y: Any, *args: Any, **_: Any) -> Any:
        """As `undo`, in the memory of ``y`` if that saves any."""
        return self.undo(y, *args)


class Bijection(BaseMap):
    """A map of one input, whose ``h`` may come of the others, of side inputs and of parameters. Abstract."""

    moves = 0  # which input moves; the others pass
    keeps_seen: ClassVar[bool] = False  # `function` returns s behind y, for `undo` behind h; `forward` hides it
    mixes_inputs: ClassVar[bool] = False  # `unarrange` is written, and computes; derived, since every call asks
    passes_parts: ClassVar[bool] = False  # `passed` is, and looks at what moves; likewise

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.mixes_inputs = cls.unarrange is not Bijection.unarrange
        cls.passes_parts = cls.passed is not Bijection.passed

    def given(self, like: Moving, /, *passed: Any, **side: Any) -> Any:
        """Compute ``h``, one value or a tuple of several; ``like`` has the shape, dtype and device of what moves."""
        return ()

    def passed(self, x: Any, *others: Any, **_: Any) -> tuple[Any, ...]:
        """Return what both directions see of the inputs: by default those that do not move."""
        return others

    def arrange(self, y: Any, *others: Any, **_: Any) -> tuple[Any, ...]:
        """Arrange the outputs: by default y is where x was. Autograd saves nothing of it."""
        return (*others[: self.moves], y, *others[self.moves :])

    def unarrange(self, *outputs: Any, **_: Any) -> tuple[Any, ...]:
        """Undo `arrange`."""
        return _pick(outputs, self.moves)

    def check_argument(self, argument: str, x: Any, *others: Any) -> None:
        """Raise if a call cannot take ``x``, which errors call ``argument``, beside the others; no replay asks."""


WORDS = frozenset(
    name for kind in (BaseMap, Bijection) for name in vars(kind) if callable(getattr(kind, name)) and name[0] != "_"
)


def defines(bijection: Any, word: str) -> bool:
    """Whether a bijection has written a word of its own."""
    return getattr(type(bijection), word) is not getattr(Bijection, word)


def side_names_of(bijection: Bijection) -> SideNames:
    """Return the side inputs that ``given`` takes, and how many inputs the layer does."""
    names = SideNames.of(bijection.given)
    named = frozenset(names.names if defines(bijection, "given") else ())
    return SideNames(named, names.any and defines(bijection, "given"), names.inputs)


def _pick(values: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    return values if at == 0 else (values[at], *values[:at], *values[at + 1 :])


def _in(map_: BaseMap, x: Any) -> Any:
    return widen(x) if map_.widens else x


def seen(map_: BaseMap, x: Any, *h: Any) -> tuple[Any, ...]:
    """Return ``s``, what the map alone sees at x."""
    return tuple_of(map_.seen(_in(map_, x), *h))


def moved(map_: BaseMap, x: Any, *h: Any, s: Any = None, in_place: bool = False) -> tuple[Any, ...]:
    """Return y, and ``s`` behind it, which may be known."""
    wide = _in(map_, x)
    s = tuple_of(map_.seen(wide, *h)) if s is None else s
    y = (map_.move_ if in_place else map_.move)(wide, *h, *s)
    return (y.to(x.dtype) if map_.widens else y), *s


def undone(map_: BaseMap, y: Any, *h: Any, in_place: bool = False, known: Any = None) -> tuple[Any, ...]:
    """Return x, which may be known, and ``s`` behind it where it was found."""
    wide = _in(map_, y)
    if known is None:
        x, *s = tuple_of((map_.undo_ if in_place else map_.undo)(wide, *h))
    else:
        x, *s = tuple_of(map_.undo_at(_in(map_, known), wide, *h))
    return (x.to(y.dtype) if map_.widens else x), *s


@dataclass(slots=True)
class Run:
    """One call of a bijection in one direction, as the engine runs it."""

    bijection: Any
    owner: Any  # the layer, for errors
    inverted: bool = False
    log_det: bool = False
    like: Moving | None = None
    needs_grad: tuple[bool, ...] = ()  # of what passed

    def check(self, values: tuple[Any, ...]) -> None:
        argument = "y" if self.inverted else "x"
        if not (
            self.inverted and self.bijection.mixes_inputs
        ):  # else as they came: nothing is computed of what may not fit
            moves = self.bijection.moves
            if len(values) <= moves:
                refuse(self.owner, "inputs", f"be at least {moves + 1}", len(values), TypeError)
            values = values[:1] if self.inverted and self.bijection.keeps_seen else _pick(values, moves)
        if not isinstance(values[0], Tensor):
            refuse(self.owner, argument, "be a Tensor", type(values[0]).__name__, TypeError)
        self.bijection.check_argument(argument, *values)

    def function(self, *values: Any, **side: Any) -> Any:
        """Run the map, or the way back; return what comes out, and behind it the log-determinant if it is asked for."""
        x, passing, kept = self._moving(values, self.inverted)
        if self.like is None:
            self.like = _Moving(x.shape, x.dtype, x.device, self.log_det)
            if self.inverted and self.bijection.mixes_inputs:
                self.needs_grad = tuple([p.requires_grad for p in passing])
        h = self._given(x, passing, side)
        return self._results(x, passing, (*h, *kept), None)

    def inverse(self, *values: Any, **side: Any) -> Any:
        """Run the other direction."""
        return Run(self.bijection, self.owner, not self.inverted).function(*values, **side)

    def replay(self, tape: Tape, /, *values: Any, **side: Any) -> Any:
        """Rebuild the inputs from the outputs, and run the map again; ``given`` is evaluated once for both.

        Return what the map returns, if the tape runs so far.
        """
        bijection, inverted = self.bijection, self.inverted
        y, passing, kept = self._moving(values, not inverted)
        mixes = inverted and bijection.mixes_inputs
        if mixes:  # the inputs are what becomes of it
            passing = tuple([p.detach().requires_grad_(r) for p, r in zip(passing, self.needs_grad, strict=True)])
        else:
            passing = tuple([tape.input(i + (i >= bijection.moves), p) for i, p in enumerate(passing)])
        h = tape.run(self._given, tape.input(bijection.moves, y) if bijection.passes_parts else y, passing, side)
        owned = tape.owns(y)
        if inverted:
            x = moved(bijection, y, *h, in_place=owned)[0]
        else:
            x = undone(bijection, y, *h, *kept, in_place=owned)[0]  # what it found besides is let go
        if mixes:
            x, *_ = bijection.unarrange(*[tape.input(i, v) for i, v in enumerate(bijection.arrange(x, *passing))])
        else:
            x = tape.input(bijection.moves, x)
        return tape.run_until_saved(self._results, x, passing, h, y if inverted else None)

    @property
    def in_pieces(self) -> bool:
        """Whether a replay does no more than run pieces of the map: between them it must not mix inputs."""
        return not (self.inverted and self.bijection.mixes_inputs)

    def _moving(self, values: tuple[Any, ...], outputs: bool) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        """Return the value that moves, those that pass, and what was kept behind outputs."""
        bijection = self.bijection
        if not outputs:
            x, *passing = _pick(values, bijection.moves)
            return x, tuple(passing), ()
        if bijection.keeps_seen:
            return values[0], (), values[1:]
        y, *passing = bijection.unarrange(*values)
        return y, tuple(passing), ()

    def _given(self, x: Any, passing: tuple[Any, ...], side: dict[str, Any]) -> tuple[Any, ...]:
        return tuple_of(self.bijection.given(self.like, *self.bijection.passed(x, *passing), **side))

    def _results(self, x: Any, passing: tuple[Any, ...], h: tuple[Any, ...], known: Any) -> Any:
        """Move x, or back, to a value that may be known; return all outputs, and the log-determinant."""
        bijection, narrow = self.bijection, x
        x = _in(bijection, x)
        if self.inverted:
            x, *s = undone(bijection, x, *h, known=known)
            y, kept = x, []
            log_det = -self._total(x, h, s or seen(bijection, x, *h)) if self.log_det else None
        else:
            y, *s = moved(bijection, x, *h)
            kept = s if bijection.keeps_seen else []
            log_det = self._total(x, h, s) if self.log_det else None
        y = y.to(narrow.dtype) if bijection.widens else y
        outputs = Bijection.arrange(bijection, y, *passing) if self.inverted else bijection.arrange(y, *passing)
        results = (*outputs, *kept) if log_det is None else (*outputs, *kept, log_det)
        return results[0] if len(results) == 1 else results

    def _total(self, x: Tensor, h: tuple[Any, ...], s: Any) -> Tensor:
        """Return the log-determinant of the map at x."""
        if self.bijection.volume_preserving:
            return zero_log_det(self.owner, (x,))
        if not defines(self.bijection, "log_slope"):
            refuse(self.owner, "layer", "be a bijection with a log-determinant", "one without", TypeError)
        slopes = self.bijection.log_slope(_in(self.bijection, x), *h, *s)
        if not isinstance(slopes, Tensor):
            refuse(self.owner, "log_slope", "return a Tensor", type(slopes).__name__, TypeError)
        if x.ndim and slopes.shape not in (x.shape, x.shape[:1]):
            shapes = f"one slope for each value, {tuple(x.shape)}, or their sum for each sample, {tuple(x.shape[:1])}"
            refuse(self.owner, "log_slope", f"return {shapes}", f"shape {tuple(slopes.shape)}")
        return sum_per_sample(self.owner, slopes)

    def log_det_at(self, values: tuple[Any, ...], side: dict[str, Any]) -> Tensor:
        """Return the log-determinant of the map alone, at these inputs."""
        x, passing, _ = self._moving(values, outputs=False)
        self.like = _Moving(x.shape, x.dtype, x.device, log_det=True)
        h = self._given(x, passing, side)
        return self._total(x, h, seen(self.bijection, x, *h))


@dataclass(slots=True)
class ByHand:
    """One call, in one direction, of a layer that writes ``function`` and ``inverse``."""

    layer: Any
    inverted: bool = False
    log_det: bool = False

    in_pieces: ClassVar[bool] = False

    def check(self, values: tuple[Any, ...]) -> None:
        """The layer looks itself."""

    def function(self, *values: Any, **side: Any) -> Any:
        layer, inverted = self.layer, self.inverted
        results = (layer.inverse if inverted else layer.function)(*values, **side)
        if not self.log_det:
            return results
        results = tuple_of(results)
        log_det = layer.log_det(*(results if inverted else values), **side)
        return *results, -log_det if inverted else log_det

    def inverse(self, *values: Any, **side: Any) -> Any:
        return (self.layer.function if self.inverted else self.layer.inverse)(*values, **side)

    def replay(self, tape: Tape, /, *values: Any, **side: Any) -> None:
        if self.inverted:
            tape.run(self.function, *tape.invert(*values), **side)
            return
        self.layer.replay(tape, *values, **side)
        if self.log_det:
            tape.run(self.layer.log_det, *tape.inputs, **side)


def run_of(layer: Any, *, inverted: bool = False, log_det: bool = False) -> Run | ByHand:
    """Return what the engine runs in a call of a layer."""
    return ByHand(layer, inverted, log_det) if layer.by_hand else Run(layer, layer, inverted, log_det)
