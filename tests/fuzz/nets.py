"""The nets of a fuzz case: built of InvZoo's layers once, and run either as they are or as their maths alone."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import invzoo as iz
from invzoo.engine import tuple_of
from invzoo.protocol import run_of
from tests.fuzz.specs import Group, Leaf, Net

__all__ = ["FuzzNet"]

Values = tuple[Tensor, ...]


# ---- parts that both ways of running share: plain torch -------------------------------------------------------------


class Subnet(nn.Module):
    """A net from so many features (or channels) to so many."""

    def __init__(self, kind: str, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [dense(inputs, 4, rank)]
        if kind in ("batchnorm", "both"):
            layers.append(nn.BatchNorm1d(4) if rank == 2 else nn.BatchNorm2d(4))
        layers += {"linear": [], "relu": [nn.ReLU()], "inplace": [nn.ReLU(inplace=True)]}.get(kind, [nn.Tanh()])
        if kind in ("dropout", "both"):
            layers.append(Dropout())
        self.body, self.last = nn.Sequential(*layers), dense(4, outputs, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


class Dropout(nn.Module):
    """Torch's own draws in the order of the memory, and the plain maths may lay it out in another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, dtype=x.dtype) > 0.3) / 0.7 if self.training else x


class Conditioned(Subnet):
    def __init__(self, kind: str, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(kind, inputs, outputs, rank)
        self.project = dense(3, 4, rank)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.body(x)
        return self.last(h if condition is None else h * (1 + self.project(condition)))


def dense(inputs: int, outputs: int, rank: int) -> nn.Module:
    return nn.Linear(inputs, outputs) if rank == 2 else nn.Conv2d(inputs, outputs, (1, 3), padding=(0, 1))


class Op(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def neighbour(kind: str, features: int, rank: int) -> nn.Module | None:
    """A layer that is none of ours."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense(features, features, rank),
        "dense_relu_": lambda: nn.Sequential(dense(features, features, rank), nn.ReLU(inplace=True)),
        "relu": nn.ReLU,
        "exp": lambda: Op(lambda x: torch.exp(x.tanh())),
        "sigmoid": nn.Sigmoid,
        "scale": lambda: Op(lambda x: x * 0.7),
        "transposed": lambda: Op(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    }
    return makers[kind]() if kind in makers else None


# ---- plain maths of the layers --------------------------------------------------------------------------------------


def indices(split: Any, n: int) -> tuple[list[int], list[int]]:
    """Which features make the first stream, and which the second."""
    if split == "interleave":
        return [*range(0, n, 2)], [*range(1, n, 2)]
    if split == "half":
        first = (n + 1) // 2
    else:
        first = min(n - 1, math.ceil(n * split)) if isinstance(split, float) else split[0]
    return [*range(first)], [*range(first, n)]


def merged(streams: Values, indices: tuple[list[int], list[int]]) -> Tensor:
    """Put streams back to where they were split from; a swap of unequal ones changes their sizes."""
    joined = torch.cat(streams, 1)
    first, second = indices
    if streams[0].shape[1] != len(first):
        return joined
    order = first + second
    return joined[:, sorted(range(len(order)), key=order.__getitem__)]


def plain_leaf(layer: nn.Module, values: Values, side: dict[str, Tensor], back: bool) -> Values:
    """Run the maths of a layer, without the engine; that they are right is for the layers' own tests to say."""
    if not isinstance(layer, iz.InvertibleModule):
        return (layer(*values),)
    return tuple_of(run_of(layer, inverted=back).function(*values, **side))


# ---- nets -----------------------------------------------------------------------------------------------------------


@dataclass
class Built:
    """An item of the spec with its module, turned round where the spec says so, and its parts."""

    spec: Leaf | Group
    module: nn.Module
    layer: nn.Module
    parts: "list[Built]"

    @property
    def takes_condition(self) -> bool:
        if isinstance(self.spec, Leaf):
            return "condition" in (self.spec.f, self.spec.g)
        return self.spec.kind != "sequential" and any(p.takes_condition for p in self.parts)

    def ours(self, values: Values, side: dict[str, Tensor]) -> Values:
        result = self.module(*values, **(side if self.takes_condition else {}))
        return result if isinstance(result, tuple) else (result,)

    def plain(self, values: Values, side: dict[str, Tensor], back: bool = False) -> Values:
        spec, back = self.spec, back != self.spec.inv
        if isinstance(spec, Leaf):
            return plain_leaf(self.layer, values, side if self.takes_condition else {}, back)
        side, start = {} if spec.kind == "sequential" else side, values
        if spec.kind == "streams":
            (x,) = values
            first, second = indices(spec.split, x.shape[1])
            values = x[:, first], x[:, second]
        results: list[Values] = []
        for part in (self.parts * spec.repeat)[:: -1 if back else 1]:
            result = part.plain(values, side, back)
            values = values if spec.kind == "branch" else result
            results.append(result)
        if spec.kind == "branch":
            return (results[0][0] + results[1][0],)
        if spec.kind == "streams":
            return (merged(values, (first, second)),)
        return (start[0] + values[0],) if spec.kind == "residual" else values

    def walk(self) -> "Iterator[Built]":
        yield self
        for part in self.parts:
            yield from part.walk()


class Around(nn.Module):
    """Groups that are no container of InvZoo's or torch's."""

    def __init__(self, group: Group, parts: list[Built]) -> None:
        super().__init__()
        self.group, self.parts = group, parts
        self.held = nn.ModuleList([p.module for p in parts])
        self.cut, self.join = iz.Split(split=group.split), iz.Merge(split=group.split)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        side = {} if condition is None else {"condition": condition}
        group, values = self.group, (x,)
        if group.kind == "branch":
            (a,), (b,) = (p.ours(values, side) for p in self.parts)
            return a + b
        if group.kind == "streams":
            parts = indices(group.split, x.shape[1])
            values = self.cut(x) if group.flip else tuple(x[:, part] for part in parts)
        for part in self.parts * group.repeat:
            values = part.ours(values, side)
        if group.kind == "streams":
            stays = values[0].shape[1] == len(parts[0])
            return self.join(*values) if group.flip and stays else merged(values, parts)
        if group.kind == "residual":
            return values[0] + x if group.flip else x + values[0]
        return values[0]


class FuzzNet(nn.Module):
    """The net of a case; `plain` says how it runs."""

    def __init__(self, spec: Net, plain: bool) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec, self.plain = spec, plain
        self.built = [self._build(item, None)[0] for item in spec.items]
        self.held = nn.ModuleList([b.module for b in self.built])
        self.encoder = nn.Linear(3, 3)
        self.to(getattr(torch, spec.dtype))
        generator = torch.Generator().manual_seed(spec.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter.dtype))
                parameter.requires_grad_(torch.rand((), generator=generator).item() >= spec.frozen)

    def _build(self, item: Leaf | Group, sizes: tuple[int, int] | None) -> tuple[Built, tuple[int, int] | None]:
        """Build an item, for two streams of these sizes if any; return the sizes of what it returns too."""
        if isinstance(item, Leaf):
            layer = self._leaf(item, sizes)
            module = layer.inv if item.inv else layer
            return Built(item, module, layer, []), sizes and (sizes[::-1] if item.kind == "swap" else sizes)
        inner = tuple(map(len, indices(item.split, self.spec.features))) if item.kind == "streams" else sizes
        # What is turned round meets the streams from the other end, where an odd number of swaps has swapped the sizes.
        if inner and item.inv and sum(i.kind == "swap" for i in item.items) % 2:
            inner = inner[::-1]
        parts = []
        for part in item.items:
            built, inner = self._build(part, inner)
            parts.append(built)
        if item.kind in ("invertible", "sequential"):
            container = iz.InvertibleSequential if item.kind == "invertible" else nn.Sequential
            layer = container(*[p.module for p in parts * item.repeat])
        else:
            layer = Around(item, parts)
        out = None if item.kind == "streams" else inner
        if sizes and item.inv:
            out = sizes[::-1] if sum(i.kind == "swap" for i in item.items) % 2 else sizes
        return Built(item, layer.inv if item.inv else layer, layer, parts), out

    def _leaf(self, leaf: Leaf, sizes: tuple[int, int] | None) -> nn.Module:
        n, rank = self.spec.features, self.spec.rank
        plain = neighbour(leaf.kind, n, rank)
        options = {"mode": leaf.mode, "check": leaf.check, "seed": leaf.seed}
        generator = torch.Generator().manual_seed(leaf.order)
        makers: dict[str, Callable[..., nn.Module]] = {
            "additive": lambda **o: self._coupling(leaf, sizes, o),
            "affine": lambda **o: self._coupling(leaf, sizes, o),
            "matrix": partial(iz.InvertibleLinear if rank == 2 else iz.InvertibleConv1x1, n, kind=leaf.matrix),
            "permute": partial(iz.Permute, torch.randperm(n, generator=generator)),
            "shuffle": partial(iz.Shuffle, n, generator=generator),
            "reverse": partial(iz.Reverse, leaf.dim),
            "swap": partial(iz.Swap, leaf.dim),
            "interleave": partial(iz.Interleave, leaf.dim),
            "deinterleave": partial(iz.Deinterleave, leaf.dim),
            "leaky": partial(iz.InvertibleLeakyReLU, leaf.slope),
            "identity": iz.Identity,
            "tanh": iz.InvertibleTanh,
            "atanh": iz.InvertibleAtanh,
            "sigmoid_layer": iz.InvertibleSigmoid,
            "logit": iz.InvertibleLogit,
        }
        return makers[leaf.kind](**options) if plain is None else plain

    def _coupling(self, leaf: Leaf, sizes: tuple[int, int] | None, options: dict[str, Any]) -> nn.Module:
        n = self.spec.features
        sizes = sizes or ((n, n) if leaf.split == "checkerboard" else tuple(map(len, indices(leaf.split, n))))
        nets = []
        for index, kind in enumerate((leaf.f, leaf.g)):
            target = index ^ leaf.swap
            factor = 2 if leaf.kind == "affine" else 1
            make = Conditioned if kind == "condition" else Subnet
            net = kind and make(kind, sizes[1 - target], factor * sizes[target], self.spec.rank)
            if net and leaf.scale == "exp":  # exponentials of exponentials lose all digits, whoever inverts them
                net.last = nn.Sequential(net.last, nn.Tanh())
            nets.append(net)
        more = {"scale": leaf.scale} if leaf.kind == "affine" else {}
        layer = iz.AffineCoupling if leaf.kind == "affine" else iz.AdditiveCoupling
        return layer(*nets, split=leaf.split, swap=leaf.swap, **more, **options)

    def set_modes(self, mode: str | None) -> None:
        """Set one mode everywhere, or each layer's own again."""
        for built in (b for root in self.built for b in root.walk()):
            if isinstance(built.spec, Leaf) and isinstance(built.layer, iz.InvertibleModule):
                built.layer.mode = mode or built.spec.mode

    def forward(self, x: Tensor, side: dict[str, Tensor]) -> list[Tensor]:
        """Return what each of the outermost items returns."""
        values, outputs = (x,), []
        for built in self.built:
            values = built.plain(values, side) if self.plain else built.ours(values, side)
            outputs.append(values[0])
        return outputs
