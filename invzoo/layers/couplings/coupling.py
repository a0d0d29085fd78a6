"""What couplings have in common: one part of the input moves by a function of the other, so any function will do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import engine
from ...engine import Operation, SideNames
from ...log_dets import LogDets
from ...module import Composite, modules_behind
from ...protocol import Bijection, Like, Run
from .._checks import check_callable, check_dim_given, check_returned, explain, given_dim, refuse
from ..maps.base import Map, by_map, register_functions
from ..rearrangements.split import Partition, SplitSpec, checkerboard, cut, join

__all__ = ["Coupling", "Subnet"]

Subnet = Callable[..., Tensor]


class Coupling(Composite):
    """A chain of updates, one for each subnet; each moves one stream by a map whose parameters the other gives.

    Each update is a call of its own. Abstract: a subclass chooses the map.

    Args:
        map_: how a value moves by its parameters.
        f: a module or a function; it gets the side inputs as keyword arguments.
        g: likewise, or None.
        dim, split, swap: as for :class:`AdditiveCoupling`.
        zero_init: set the last weighted module of each subnet to zero, so that the layer starts close to the identity.
        subnet_dtype: what streams are cast to for the subnets, whose values are cast back: with the subnets alone in
            bfloat16, rounding errors add up in float32 along a stack. None: streams come as they are.
        options: those of :class:`InvertibleModule`.
    """

    domain = codomain = property(lambda self: self.map.domain)

    def __init__(
        self,
        map_: Map,
        f: Subnet,
        g: Subnet | None = None,
        *,
        dim: int | None = None,
        split: SplitSpec = "half",
        swap: bool = False,
        zero_init: bool = False,
        subnet_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_callable(self, "f", f)
        if g is not None:
            check_callable(self, "g", g)
        map_.check(self)
        self.map, self.f, self.g = map_, f, g
        self.map_functions = register_functions(self, map_)
        if subnet_dtype is not None and not (isinstance(subnet_dtype, torch.dtype) and subnet_dtype.is_floating_point):
            refuse(self, "subnet_dtype", "be a floating point dtype or None", repr(subnet_dtype), TypeError)
        self.dim, self.split, self.swap, self.subnet_dtype = given_dim(self, dim), split, swap, subnet_dtype
        self.volume_preserving = map_.volume_preserving  # type: ignore[misc]
        # The streams of one tensor; a checkerboard has none: its subnets see the whole tensor with zeros.
        self.streams = None if split == "checkerboard" else Partition(split, self.dim)
        for net in (f, g) if zero_init else ():
            _zero_last(net)

    def side_names(self) -> SideNames:
        return SideNames.union(SideNames.of(net) for net in (self.f, self.g) if net is not None)

    def through(
        self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None, *, inverted: bool = False
    ) -> Any:
        if len(values) > 2 or not all(isinstance(x, Tensor) for x in values):
            got = ", ".join(type(x).__name__ for x in values)
            refuse(self, "input", "be one Tensor or two", got or "none", TypeError)
        if self.streams is None and len(values) != 1:
            refuse(self, "input", "be one Tensor, for a checkerboard", "two", TypeError)
        if len(values) == 1:
            check_dim_given(self, values[0])
            if self.streams is not None:
                streams = cut(self.streams, values[0], self)
                return join(self.streams, self.through(streams, side, log_dets, inverted=inverted), self)
        updates = self.updates()
        for update in reversed(updates) if inverted else updates:
            values = update.call(values, side, log_dets, inverted=inverted)
        return values[0] if self.streams is None else values

    def updates(self) -> "list[Update]":
        """Return the steps, in the order of the forward."""
        kind = Checkerboard if self.streams is None else Update
        nets = enumerate((("f", self.f), ("g", self.g)))
        return [kind(self, name, net, i ^ self.swap) for i, (name, net) in nets if net is not None]

    def extra_repr(self) -> str:
        return f"{self.map}, dim={self.dim}, split={self.split!r}" + (", swap=True" if self.swap else "")


class Update(Bijection):
    """One stream moves by the coupling's map, whose parameters a subnet makes of the other."""

    def __init__(self, coupling: Coupling, name: str, net: Subnet, moves: int) -> None:
        self.coupling, self.name, self.net, self.moves = coupling, name, net, moves
        self.map, self.dim = coupling.map, coupling.dim

    volume_preserving, widens, seen, move, undo, undo_at, move_, undo_, log_slope = by_map(
        "volume_preserving", "widens", "seen", "move", "undo", "undo_at", "move_", "undo_", "log_slope"
    )

    def given(self, like: Like, other: Tensor, /, **side: Any) -> tuple[Any, ...]:
        dtype = self.coupling.subnet_dtype
        try:
            h = self.net(other if dtype is None else other.to(dtype), **side)
        except Exception as error:
            explain(self.coupling, self.name, other, error, self._hint(other, like, other, side))
            raise
        shape = [*like.shape]
        shape[self.dim] *= self.map.parameters
        if not isinstance(h, Tensor) or [*h.shape] != shape:
            check_returned(self.coupling, self.name, h, shape, self._hint(like, like, other, side))
        if h.is_complex() and not like.dtype.is_complex:
            refuse(self.coupling, self.name, "return real numbers, for a real stream", h.dtype, TypeError)
        return self.map.parts(h if dtype is None else h.to(other.dtype), like, self.dim)

    def check_argument(self, argument: str, x: Tensor, *others: Tensor) -> None:
        self.map.check_value(self.coupling, "input", x)

    def call(
        self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None, *, inverted: bool
    ) -> tuple[Any, ...]:
        """Run the update through the engine, as a call of its own."""
        if side:
            side = SideNames.of(self.net).choose(side)
        asked = log_dets is not None and not self.coupling.volume_preserving
        run = Run(self, self.coupling, inverted, asked)
        run.check(values)
        results = engine.tuple_of(engine.call(self._operation(run), values, side))
        if asked:
            log_dets.add(results[-1])  # type: ignore[union-attr]  # it is asked for
        return results[: len(values)]

    def _operation(self, run: Run) -> Operation:
        name = f"{type(self.coupling).__name__}{'.inv' * run.inverted} ({self.name}{', log_det' * run.log_det})"
        functions = [self.net, *self.coupling.map_functions]
        foreign = not all(isinstance(function, nn.Module) for function in functions)
        roots = modules_behind(self.coupling, *functions) if foreign else functions
        return Operation(
            name,
            run.function,
            run.inverse,
            run.replay,
            roots,
            self.coupling._policy,
            log_det=run.log_det,
            foreign=foreign,
            in_pieces=run.in_pieces,
        )

    def _hint(self, which: Like, like: Like, other: Tensor, side: dict[str, Any]) -> str:
        """Say, behind an error, which part of the features an input is, and which side inputs did not come."""
        names = " and ".join(f"`{name}=`" for name in sorted(SideNames.of(self.net).names - side.keys()))
        hint = f". Pass {names} by name: tensors by position are streams" if names else ""
        if self.coupling.streams is None:
            return hint
        stream = ("first", "second")[self.moves if which is like else 1 - self.moves]
        kind = "half" if self.coupling.split == "half" else "stream"
        mine, *both = (x.shape[self.dim] if -x.ndim <= self.dim < x.ndim else 0 for x in (which, like, other))
        return f". The {stream} {kind} has {mine} of {sum(both)} features in dim {self.dim}{hint}"


class Checkerboard(Update):
    """Of one tensor, the fields of one colour move by what a subnet makes of the others."""

    def __init__(self, coupling: Coupling, name: str, net: Subnet, moves: int) -> None:
        super().__init__(coupling, name, net, 0)
        self.colour = moves

    def passed(self, x: Tensor) -> tuple[Tensor]:
        return (self._where(x, 0, 1 - self.colour),)

    def move(self, x: Tensor, *args: Any) -> Tensor:
        return self._where(self.map.move(x, *args), x, self.colour)

    def undo(self, y: Tensor, *h: Any) -> Tensor:
        return self._where(engine.tuple_of(self.map.undo(y, *h))[0], y, self.colour)

    def log_slope(self, x: Tensor, *args: Any) -> Tensor:
        return self._where(self.map.log_slope(x, *args), 0, self.colour)

    undo_at, move_, undo_ = Bijection.undo_at, Bijection.move_, Bijection.undo_

    def _where(self, values: Tensor, others: Tensor | float, colour: int) -> Tensor:
        """Keep ``values`` on the fields of one colour."""
        return values.where(checkerboard(values, self.dim, colour), others)


def _zero_last(net: Any) -> None:
    """Set the last weighted module of a subnet to zero."""
    modules = [m for root in engine.modules_of(net) for m in root.modules()]
    weighted = [m for m in modules if isinstance(getattr(m, "weight", None), Tensor)]
    for parameter in weighted[-1].parameters() if weighted else ():
        nn.init.zeros_(parameter)
