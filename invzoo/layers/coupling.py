"""Couplings: one part of the input moves by a function of the other, so any function will do."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import engine
from ..engine import Operation, SideNames, Tape
from ..module import InvertibleModule
from ._checks import check_choice, check_positive, refuse
from .split import Partition, SplitSpec, cut, join

__all__ = ["AdditiveCoupling", "AffineCoupling"]

Subnet = Callable[..., Tensor]
_Step = Callable[[Tensor, Tensor], Tensor]  # moves a stream by a subnet's value, or moves it back


class _Coupling(InvertibleModule):
    """A coupling is a chain of updates, one for each subnet; each update is a call of its own.

    An update changes the stream ``x`` by ``h = net(source)`` and passes ``source`` on. Its replay evaluates the subnet
    once: the value gives the inverse, the graph gives the gradient.
    """

    composite = True
    records: ClassVar[bool]  # whether autograd saves anything of `couple`

    def __init__(
        self, f: Subnet, g: Subnet | None, dim: int, split: SplitSpec, swap: bool, options: dict[str, Any]
    ) -> None:
        super().__init__(**options)
        for name, net in (("f", f), ("g", g)):
            if not callable(net) and not (name == "g" and net is None):
                refuse(self, name, "be a module or a function", type(net).__name__, TypeError)
        self.f, self.g = f, g
        self.dim, self.split, self.swap = dim, split, swap
        # The streams of one tensor; a checkerboard has none: its subnets see the whole tensor with zeros.
        self.streams = None if split == "checkerboard" else Partition(split, dim)

    @abstractmethod
    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        """Move ``x`` by ``h``."""

    @abstractmethod
    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:
        """Undo :meth:`couple`."""

    @abstractmethod
    def _check_subnet(self, name: str, x: Tensor, h: Tensor) -> None:
        """Raise if ``h``, which the subnet called ``name`` returned, cannot move ``x``."""

    def side_names(self) -> SideNames:
        return SideNames.union(SideNames.of(net) for net in (self.f, self.g) if net is not None)

    def function(self, *inputs: Tensor, **side: Any) -> Any:
        return self._run(inputs, list(self._updates(self.couple, self.uncouple)), side)

    def inverse(self, *outputs: Tensor, **side: Any) -> Any:
        return self._run(outputs, list(self._updates(self.uncouple, self.couple))[::-1], side)

    def _updates(self, there: _Step, back: _Step) -> Iterator[tuple[int, Operation, SideNames]]:
        """Yield, for each subnet, which stream it updates, the update, and the side inputs that it takes."""
        make = self._masked_update if self.streams is None else self._update
        way = "" if there == self.couple else ".inv"
        for index, (name, net) in enumerate((("f", self.f), ("g", self.g))):
            if net is not None:
                target = index ^ self.swap
                update = make(f"{type(self).__name__}{way} ({name})", name, net, target, there, back)
                yield target, update, SideNames.of(net)

    def _run(
        self, tensors: tuple[Tensor, ...], updates: list[tuple[int, Operation, SideNames]], side: dict[str, Any]
    ) -> Any:
        if len(tensors) > 2 or not all(isinstance(x, Tensor) for x in tensors):
            got = ", ".join(type(x).__name__ for x in tensors)
            refuse(self, "input", "be one Tensor or two", got or "none", TypeError)
        self.side_names().check(self, side)
        if self.streams is None:
            return self._run_masked(tensors, updates, side)
        if len(tensors) == 1:
            streams = cut(self.streams, tensors[0], self._policy)
            return join(self.streams, self._run(streams, updates, side), self._policy)
        moving = list(tensors)
        for target, update, names in updates:
            moved, source = engine.call(update, (moving[target], moving[1 - target]), names.choose(side))
            moving[target], moving[1 - target] = moved, source
        return tuple(moving)

    def _run_masked(
        self, tensors: tuple[Tensor, ...], updates: list[tuple[int, Operation, SideNames]], side: dict[str, Any]
    ) -> Tensor:
        if len(tensors) != 1:
            refuse(self, "input", "be one Tensor, for a checkerboard", "two", TypeError)
        x = tensors[0]
        for _, update, names in updates:
            x = engine.call(update, (x,), names.choose(side))
        return x

    def _update(self, title: str, name: str, net: Subnet, target: int, there: _Step, back: _Step) -> Operation:
        def function(x: Tensor, source: Tensor, **side: Any) -> tuple[Tensor, Tensor]:
            h = net(source, **side)
            self._check_subnet(name, x, h)
            return there(x, h), source

        def inverse(y: Tensor, source: Tensor, **side: Any) -> tuple[Tensor, Tensor]:
            return back(y, net(source, **side)), source

        def replay(tape: Tape, y: Tensor, source: Tensor, **side: Any) -> None:
            h = tape.run(net, tape.input(1, source), **side)
            x = tape.input(0, back(y, h))
            if self.records:
                tape.run(there, x, h)

        return Operation(title, function, inverse, replay, engine.modules_of(net), self._policy)

    def _masked_update(self, title: str, name: str, net: Subnet, target: int, there: _Step, back: _Step) -> Operation:
        def evaluate(x: Tensor, **side: Any) -> Tensor:
            return net(x.where(_checkerboard(x, self.dim, 1 - target), 0), **side)

        def move(x: Tensor, h: Tensor, step: _Step = there) -> Tensor:
            return step(x, h).where(_checkerboard(x, self.dim, target), x)

        def function(x: Tensor, **side: Any) -> Tensor:
            h = evaluate(x, **side)
            self._check_subnet(name, x, h)
            return move(x, h)

        def inverse(y: Tensor, **side: Any) -> Tensor:
            return move(y, evaluate(y, **side), back)

        def replay(tape: Tape, y: Tensor, **side: Any) -> None:
            h = tape.run(evaluate, tape.input(0, y), **side)  # where the subnet looks, the output is the input
            tape.run(move, tape.input(0, move(y, h, back)), h)

        return Operation(title, function, inverse, replay, engine.modules_of(net), self._policy)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, split={self.split!r}" + (", swap=True" if self.swap else "")


def _checkerboard(x: Tensor, dim: int, parity: int) -> Tensor:
    """Mark the positions behind ``dim`` whose coordinates have an even sum (``parity`` 0) or an odd one."""
    shape = x.shape[dim % x.ndim + 1 :]
    if not shape:
        refuse("Coupling", "input", f"have spatial dims after dim {dim}, for a checkerboard", f"shape {tuple(x.shape)}")
    coordinates = torch.meshgrid(*(torch.arange(n, device=x.device) for n in shape), indexing="ij")
    return torch.stack(coordinates).sum(0) % 2 == parity


class AdditiveCoupling(_Coupling):
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
        options: those of :class:`InvertibleModule`.

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

    volume_preserving = True
    records = False

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
        super().__init__(f, g, dim, split, swap, options)

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h

    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:
        return y - h

    def _check_subnet(self, name: str, x: Tensor, h: Tensor) -> None:
        if not isinstance(h, Tensor) or h.shape != x.shape:
            refuse(self, name, f"return a Tensor of shape {tuple(x.shape)}", _shape(h))


class AffineCoupling(_Coupling):
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
        options: those of :class:`InvertibleModule`.

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

    records = True

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
        super().__init__(f, g, dim, split, swap, options)
        check_choice(self, "scale", scale, _LOG_SCALES)
        check_positive(self, "max_log_scale", max_log_scale)
        self.scale, self.max_log_scale = scale, max_log_scale
        for net in (f, g) if zero_init else ():
            _zero_last(net)

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        log_scale, shift = self._parts(x, h)
        return (x * log_scale.exp() + shift).to(x.dtype)

    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:
        log_scale, shift = self._parts(y, h)
        return ((y - shift) * (-log_scale).exp()).to(y.dtype)

    def _parts(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        # In float32 at least: under autocast, exp(s) and exp(-s) in bfloat16 would not undo each other.
        raw, shift = h.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, self.dim)
        return _LOG_SCALES[self.scale](raw, self.max_log_scale), shift

    def _check_subnet(self, name: str, x: Tensor, h: Tensor) -> None:
        shape = [*x.shape]
        shape[self.dim] *= 2
        if not isinstance(h, Tensor) or [*h.shape] != shape:
            refuse(self, name, f"return a Tensor of shape {tuple(shape)}", _shape(h))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale!r}, max_log_scale={self.max_log_scale}"


_LOG_SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "tanh": lambda h, a: a * torch.tanh(h * (0.1 / a)),
    "softclip": lambda h, a: a * (2 / math.pi) * torch.atan(h / a),
    "sigmoid": lambda h, _: torch.log(0.1 + 0.9 * torch.sigmoid(h + 2)),
    "unit": lambda h, _: torch.log1p(torch.sigmoid(h)) - math.log(2),
    "exp": lambda h, _: h,
}


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _zero_last(net: Any) -> None:
    modules = [m for root in engine.modules_of(net) for m in root.modules()]
    weighted = [m for m in modules if isinstance(getattr(m, "weight", None), Tensor)]
    for parameter in weighted[-1].parameters() if weighted else ():
        nn.init.zeros_(parameter)
