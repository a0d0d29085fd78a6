"""What couplings have in common: one part of the input moves by a function of the other, so any function will do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..engine import Operation, SideNames, Tape
from ..log_dets import LogDets, sum_per_sample
from ..module import InvertibleModule, modules_behind
from ._checks import check_callable, check_dim_given, check_returned, explain, given_dim, refuse
from .maps import Map
from .split import Partition, SplitSpec, checkerboard, cut, join

__all__ = ["Coupling", "Subnet", "zero_last"]

Subnet = Callable[..., Tensor]


class Coupling(InvertibleModule):
    """A chain of updates, one for each subnet; each moves one stream by a map whose parameters the other gives.

    Each update is a call of its own. Abstract: a subclass chooses the map.

    Args:
        map_: how a value moves by its parameters.
        f: a module or a function; it gets the side inputs as keyword arguments.
        g: likewise, or None.
        dim, split, swap: as for :class:`AdditiveCoupling`.
        subnet_dtype: what streams are cast to for the subnets, whose values are cast back: with the subnets alone in
            bfloat16, rounding errors add up in float32 along a stack. None: streams come as they are.
        options: those of :class:`InvertibleModule`.
    """

    composite = True
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
        subnet_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_callable(self, "f", f)
        if g is not None:
            check_callable(self, "g", g)
        map_.check(self)
        self.map, self.f, self.g = map_, f, g
        if subnet_dtype is not None and not (isinstance(subnet_dtype, torch.dtype) and subnet_dtype.is_floating_point):
            refuse(self, "subnet_dtype", "be a floating point dtype or None", repr(subnet_dtype), TypeError)
        self.dim, self.split, self.swap, self.subnet_dtype = given_dim(self, dim), split, swap, subnet_dtype
        self.volume_preserving = map_.volume_preserving  # type: ignore[misc]
        # The streams of one tensor; a checkerboard has none: its subnets see the whole tensor with zeros.
        self.streams = None if split == "checkerboard" else Partition(split, self.dim)

    def side_names(self) -> SideNames:
        return SideNames.union(SideNames.of(net) for net in (self.f, self.g) if net is not None)

    def function(self, *inputs: Tensor, **side: Any) -> Any:
        return self._run(inputs, side, self._updates(), None)

    def inverse(self, *outputs: Tensor, **side: Any) -> Any:
        return self._run(outputs, side, self._updates(inverted=True)[::-1], None)

    def function_and_log_det(self, *inputs: Tensor, **side: Any) -> tuple[Any, Tensor]:
        outputs = self._run(inputs, side, self._updates(), log_dets := LogDets())
        return outputs, log_dets.total(self, inputs)

    def inverse_and_log_det(self, *outputs: Tensor, **side: Any) -> tuple[Any, Tensor]:
        inputs = self._run(outputs, side, self._updates(inverted=True)[::-1], log_dets := LogDets())
        return inputs, log_dets.total(self, outputs)

    def _updates(self, *, inverted: bool = False) -> "list[_Update]":
        nets = enumerate((("f", self.f), ("g", self.g)))
        return [_Update(self, name, net, i ^ self.swap, inverted) for i, (name, net) in nets if net is not None]

    def _run(
        self, tensors: tuple[Tensor, ...], side: dict[str, Any], updates: "list[_Update]", log_dets: LogDets | None
    ) -> Any:
        if len(tensors) > 2 or not all(isinstance(x, Tensor) for x in tensors):
            got = ", ".join(type(x).__name__ for x in tensors)
            refuse(self, "input", "be one Tensor or two", got or "none", TypeError)
        if side:
            self.side_names().check(self, side)
        if self.streams is None and len(tensors) != 1:
            refuse(self, "input", "be one Tensor, for a checkerboard", "two", TypeError)
        if len(tensors) == 1:
            check_dim_given(self, tensors[0])
            if self.streams is not None:
                streams = cut(self.streams, tensors[0], self)
                return join(self.streams, self._run(streams, side, updates, log_dets), self)
        moving = list(tensors)
        for update in updates:
            order = slice(None, None, -1 if update.target else 1)  # what moves comes first
            moving[order] = update.call(tuple(moving[order]), side, log_dets)
        return moving[0] if self.streams is None else tuple(moving)

    def extra_repr(self) -> str:
        return f"{self.map}, dim={self.dim}, split={self.split!r}" + (", swap=True" if self.swap else "")


@dataclass(slots=True)
class _Update:
    """One stream moves by a subnet's value at the other, which is passed on; or it moves back, if ``inverted``.

    A replay evaluates the subnet once: the value gives the inverse, the graph gives the gradient.
    """

    coupling: Coupling
    name: str
    net: Subnet
    target: int  # the stream that moves
    inverted: bool

    def call(self, inputs: tuple[Tensor, ...], side: dict[str, Any], log_dets: LogDets | None) -> tuple[Tensor, ...]:
        """Run the update through the engine."""
        self.coupling.map.check_value(self.coupling, "input", inputs[0])
        asked = log_dets is not None and not self.coupling.volume_preserving
        if side:
            side = SideNames.of(self.net).choose(side)
        try:
            outputs = engine.tuple_of(engine.call(self._operation(log_det=asked), inputs, side))
        except Exception as error:
            explain(self.coupling, self.name, inputs[-1], error, self._hint(inputs, -1, side))
            raise
        if asked:
            log_dets.add(outputs[-1])  # type: ignore[union-attr]  # it is asked for
        return outputs[: len(inputs)]

    def _operation(self, *, log_det: bool) -> Operation:
        def function(*inputs: Tensor, **side: Any) -> tuple[Tensor, ...]:
            h = self._evaluate(inputs[-1], **side)
            self._check_value(inputs, side, h)
            moved, *logs = there(inputs[0], h)
            return moved, *inputs[1:], *logs

        def inverse(*outputs: Tensor, **side: Any) -> tuple[Tensor, ...]:
            return self._move_back(outputs[0], self._evaluate(outputs[-1], **side)), *outputs[1:]

        def replay(tape: Tape, *outputs: Tensor, **side: Any) -> None:
            # Where the subnet looks, the outputs are the inputs.
            h = tape.run(self._evaluate, tape.input(len(outputs) - 1, outputs[-1]), **side)
            x = tape.input(0, self._move_back(outputs[0], h, in_place=tape.owns(outputs[0])))
            if self.coupling.map.records or self.coupling.streams is None:  # a mask is saved
                tape.run(there, x, h, outputs[0])

        there = self._there_and_log_det if log_det else self._there
        title = f"{type(self.coupling).__name__}{'.inv' * self.inverted} ({self.name}{', log_det' * log_det})"
        net, foreign = self.net, not isinstance(self.net, nn.Module)
        roots = [net] if isinstance(net, nn.Module) else modules_behind(self.coupling, net)
        policy = self.coupling._policy
        return Operation(title, function, inverse, replay, roots, policy, log_det=log_det, foreign=foreign)

    def _check_value(self, inputs: tuple[Tensor, ...], side: dict[str, Any], h: Any) -> None:
        """Raise if ``h``, which the subnet returned, cannot move the first of the inputs."""
        shape = [*inputs[0].shape]
        shape[self.coupling.dim] *= self.coupling.map.parameters
        if not isinstance(h, Tensor) or [*h.shape] != shape:
            check_returned(self.coupling, self.name, h, shape, self._hint(inputs, 0, side))
        if h.is_complex() and not inputs[0].is_complex():
            refuse(self.coupling, self.name, "return real numbers, for a real stream", h.dtype, TypeError)

    def _hint(self, inputs: tuple[Tensor, ...], position: int, side: dict[str, Any]) -> str:
        """Say, behind an error, which part of the features an input is, and which side inputs did not come."""
        names = " and ".join(f"`{name}=`" for name in sorted(SideNames.of(self.net).names - side.keys()))
        hint = f". Pass {names} by name: tensors by position are streams" if names else ""
        if len(inputs) == 1:
            return hint
        which = ("first", "second")[self.target if position == 0 else 1 - self.target]
        dim, kind = self.coupling.dim, "half" if self.coupling.split == "half" else "stream"
        sizes = [x.shape[dim] if -x.ndim <= dim < x.ndim else 0 for x in inputs]
        return f". The {which} {kind} has {sizes[position]} of {sum(sizes)} features in dim {dim}{hint}"

    def _evaluate(self, source: Tensor, **side: Any) -> Tensor:
        x, dtype = self._masked(source, 0, 1 - self.target), self.coupling.subnet_dtype
        if dtype is None:
            return self.net(x, **side)
        h = self.net(x.to(dtype), **side)
        return h.to(source.dtype) if isinstance(h, Tensor) else h

    def _there(self, x: Tensor, h: Tensor, moved: Tensor | None = None) -> tuple[Tensor]:
        map_, dim, known = self.coupling.map, self.coupling.dim, self._known(moved)
        if not self.inverted:
            moved = map_.forward(x, h, dim)
        else:
            moved = map_.inverse(x, h, dim) if known is None else map_.inverse_at(x, h, dim, known)
        return (self._masked(moved, x, self.target),)

    def _there_and_log_det(self, x: Tensor, h: Tensor, moved: Tensor | None = None) -> tuple[Tensor, Tensor]:
        map_, dim = self.coupling.map, self.coupling.dim
        if self.inverted:
            moved, log_slope = map_.inverse_and_log_slope(x, h, dim, self._known(moved))
        else:
            moved, log_slope = map_.forward_and_log_slope(x, h, dim)
        log_det = sum_per_sample(self.coupling, self._masked(log_slope, 0, self.target))
        return self._masked(moved, x, self.target), -log_det if self.inverted else log_det

    def _known(self, moved: Tensor | None) -> Tensor | None:
        """Return the value of the map's inverse that a replay knows; a checkerboard's mask hides some of it."""
        return None if self.coupling.streams is None else moved

    def _move_back(self, y: Tensor, h: Tensor, *, in_place: bool = False) -> Tensor:
        map_ = self.coupling.map
        if in_place and self.coupling.streams is not None:
            step = map_.forward_ if self.inverted else map_.inverse_
        else:
            step = map_.forward if self.inverted else map_.inverse
        return self._masked(step(y, h, self.coupling.dim), y, self.target)

    def _masked(self, values: Tensor, others: Tensor | float, parity: int) -> Tensor:
        """Keep ``values`` on the fields of one parity, of a checkerboard; on streams there is nothing to mask."""
        if self.coupling.streams is not None:
            return values
        return values.where(checkerboard(values, self.coupling.dim, parity), others)


def zero_last(net: Any) -> None:
    """Set the last weighted module of a subnet to zero, so that the layer starts close to the identity."""
    modules = [m for root in engine.modules_of(net) for m in root.modules()]
    weighted = [m for m in modules if isinstance(getattr(m, "weight", None), Tensor)]
    for parameter in weighted[-1].parameters() if weighted else ():
        nn.init.zeros_(parameter)
