"""Couplings: one part of the input moves by a function of the other, so any function will do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..engine import Operation, SideNames, Tape
from ..log_dets import LogDets, sum_per_sample
from ..module import InvertibleModule
from ._checks import refuse
from .maps import Affine, Map, Shift
from .split import Partition, SplitSpec, checkerboard, cut, join

__all__ = ["AdditiveCoupling", "AffineCoupling", "Coupling", "GINCoupling", "zero_last"]

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
        dim: int = 1,
        split: SplitSpec = "half",
        swap: bool = False,
        subnet_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, net in (("f", f), ("g", g)):
            if not callable(net) and not (name == "g" and net is None):
                refuse(self, name, "be a module or a function", type(net).__name__, TypeError)
        map_.check(self)
        self.map, self.f, self.g = map_, f, g
        if subnet_dtype is not None and not (isinstance(subnet_dtype, torch.dtype) and subnet_dtype.is_floating_point):
            refuse(self, "subnet_dtype", "be a floating point dtype or None", repr(subnet_dtype), TypeError)
        self.dim, self.split, self.swap, self.subnet_dtype = dim, split, swap, subnet_dtype
        self.volume_preserving = map_.volume_preserving  # type: ignore[misc]
        # The streams of one tensor; a checkerboard has none: its subnets see the whole tensor with zeros.
        self.streams = None if split == "checkerboard" else Partition(split, dim)

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
        if self.streams is not None and len(tensors) == 1:
            streams = cut(self.streams, tensors[0], self)
            return join(self.streams, self._run(streams, side, updates, log_dets), self)
        moving = list(tensors)
        for update in updates:
            order = slice(None, None, -1 if update.target else 1)  # what moves comes first
            moving[order] = update.call(tuple(moving[order]), side, log_dets)
        return moving[0] if self.streams is None else tuple(moving)

    def check_subnet(self, name: str, x: Tensor, h: Tensor) -> None:
        """Raise if ``h``, which the subnet called ``name`` returned, cannot move ``x``."""
        shape = [*x.shape]
        shape[self.dim] *= self.map.parameters
        if not isinstance(h, Tensor) or [*h.shape] != shape:
            got = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            refuse(self, name, f"return a Tensor of shape {tuple(shape)}", got)
        if h.is_complex() and not x.is_complex():
            refuse(self, name, "return real numbers, for a real stream", h.dtype, TypeError)

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
        outputs = engine.tuple_of(engine.call(self._operation(log_det=asked), inputs, side))
        if asked:
            log_dets.add(outputs[-1])  # type: ignore[union-attr]  # it is asked for
        return outputs[: len(inputs)]

    def _operation(self, *, log_det: bool) -> Operation:
        def function(*inputs: Tensor, **side: Any) -> tuple[Tensor, ...]:
            h = self._evaluate(inputs[-1], **side)
            self.coupling.check_subnet(self.name, inputs[0], h)
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
        roots = engine.modules_of(self.net)
        return Operation(title, function, inverse, replay, roots, self.coupling._policy, log_det=log_det)

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


class AdditiveCoupling(Coupling):
    r"""Move each half of the input by a function of the other: ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``.

    Without ``g``, ``y2 = x2``. The inverse is ``x2 = y2 - g(y1)``, ``x1 = y1 - f(x2)``; the log-determinant is 0. In
    mode ``invert`` backward evaluates each subnet once.

    Shapes: one tensor, which is split and merged; or two streams, which are returned as two and never copied. ``f``
    maps the second stream's shape to the first one's, ``g`` the other way. With ``'checkerboard'``, both map the whole
    tensor's shape to itself and see zeros at the positions that they move.

    Args:
        f: a module or a function; it gets the side inputs as keyword arguments.
        g: likewise, or None.
        dim: the dimension that is split.
        split: ``'half'`` (those of `torch.chunk`), ``'interleave'``, ``'checkerboard'`` (over the dims after ``dim``),
            the first stream's share of the size, or both sizes.
        swap: let ``f`` move the second half by the first instead, and ``g`` the first by the second.
        options: ``subnet_dtype`` of :class:`Coupling`, and those of :class:`InvertibleModule`.

    Raises:
        ValueError: for another ``split``, an input that cannot be split so, or a subnet that returns another shape.
        TypeError: for a subnet that cannot be called, or an input that is not one tensor or two.

    Reference:
        NICE: Non-linear Independent Components Estimation, Dinh, Krueger and Bengio, 2014.
        The Reversible Residual Network, Gomez, Ren, Urtasun and Grosse, 2017.

    Example:
        >>> layer = iz.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        True
    """

    def __init__(
        self,
        f: Subnet,
        g: Subnet | None = None,
        *,
        dim: int = 1,
        split: SplitSpec = "half",
        swap: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(Shift(), f, g, dim=dim, split=split, swap=swap, **options)


class AffineCoupling(Coupling):
    r"""Scale and shift each half by functions of the other: ``y1 = x1 exp(s(x2)) + t(x2)``, then ``y2`` with ``g(y1)``.

    A subnet returns the log-scale's argument ``h`` and the shift ``t``, stacked along ``dim``. The inverse is
    ``x1 = (y1 - t) exp(-s)``; the log-determinant is the sum of ``s``. The log-scale is bounded by default, since deep
    stacks of unbounded ones cannot be inverted in float32.

    Shapes: as for :class:`AdditiveCoupling`, except that subnets return twice as many features in ``dim``.

    Args:
        f: a module or a function; it gets the side inputs as keyword arguments.
        g: likewise, or None: then ``y2 = x2``.
        dim, split, swap: as for :class:`AdditiveCoupling`.
        scale: how ``s`` follows from ``h``, with ``a = max_log_scale``. ``'tanh'``: ``a tanh(0.1 h / a)``;
            ``'softclip'``: ``(2 a / pi) arctan(h / a)``; ``'sigmoid'``: ``exp(s) = 0.1 + 0.9 sigmoid(h + 2)``;
            ``'unit'``: ``exp(s) = (1 + sigmoid(h)) / 2``; ``'exp'``: ``s = h``.
        max_log_scale: the bound ``a`` of ``'tanh'`` and ``'softclip'``.
        zero_init: set the last weighted module of each subnet to zero, so that the layer starts close to the identity.
        options: ``subnet_dtype`` of :class:`Coupling`, and those of :class:`InvertibleModule`.

    Raises:
        ValueError: for another ``split`` or ``scale``, an input that cannot be split so, or a subnet that returns
            another shape.
        TypeError: for a subnet that cannot be called, or an input that is not one tensor or two.

    Reference:
        Density estimation using Real NVP, Dinh, Sohl-Dickstein and Bengio, 2016.

    Example:
        >>> layer = iz.AffineCoupling(nn.Linear(2, 4))
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        True
    """

    def __init__(
        self,
        f: Subnet,
        g: Subnet | None = None,
        *,
        dim: int = 1,
        split: SplitSpec = "half",
        swap: bool = False,
        scale: str = "tanh",
        max_log_scale: float = 2.0,
        zero_init: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(Affine(scale, max_log_scale), f, g, dim=dim, split=split, swap=swap, **options)
        for net in (f, g) if zero_init else ():
            zero_last(net)


class GINCoupling(Coupling):
    r"""Scale and shift like :class:`AffineCoupling`, but keep volumes: the log-scales of a sample add up to 0.

    Their mean over all moved values is subtracted from them, so that they stay below twice the bound.

    Args:
        f: a module or a function; it returns the log-scale's argument and the shift, stacked along ``dim``.
        g: likewise, or None.
        dim, split, swap, scale, max_log_scale, zero_init: as for :class:`AffineCoupling`.
        options: ``subnet_dtype`` of :class:`Coupling`, and those of :class:`InvertibleModule`.

    Raises:
        ValueError: as :class:`AffineCoupling`, and for a checkerboard.
        TypeError: as :class:`AffineCoupling`.

    Reference:
        Disentanglement by Nonlinear ICA with General Incompressible-flow Networks (GIN), Sorrenson, Rother and Köthe,
        2020.

    Example:
        >>> layer = iz.GINCoupling(nn.Linear(2, 4))
        >>> layer.forward_and_log_det(torch.randn(3, 4))[1]
        tensor([0., 0., 0.])
    """

    def __init__(
        self,
        f: Subnet,
        g: Subnet | None = None,
        *,
        dim: int = 1,
        split: SplitSpec = "half",
        swap: bool = False,
        scale: str = "tanh",
        max_log_scale: float = 2.0,
        zero_init: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(Affine(scale, max_log_scale, centred=True), f, g, dim=dim, split=split, swap=swap, **options)
        if self.streams is None:
            refuse(self, "split", "be one into streams", "'checkerboard'")
        for net in (f, g) if zero_init else ():
            zero_last(net)


def zero_last(net: Any) -> None:
    """Set the last weighted module of a subnet to zero, so that the layer starts close to the identity."""
    modules = [m for root in engine.modules_of(net) for m in root.modules()]
    weighted = [m for m in modules if isinstance(getattr(m, "weight", None), Tensor)]
    for parameter in weighted[-1].parameters() if weighted else ():
        nn.init.zeros_(parameter)
