"""The nets of a fuzz case: built of InvZoo's layers once, and run either as they are or as plain maths."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import invzoo as iz
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
    first = {"half": (n + 1) // 2}.get(split) if isinstance(split, str) else None
    if isinstance(split, float):
        first = min(n - 1, math.ceil(n * split))
    elif not isinstance(split, str):
        first = split[0]
    return [*range(first)], [*range(first, n)]


def permuted(x: Tensor, order: list[int], dim: int, back: bool = False) -> Tensor:
    if back:
        order = sorted(range(len(order)), key=order.__getitem__)
    return torch.stack([x.select(dim, i) for i in order], dim)


def order_of(leaf: Leaf, layer: nn.Module, n: int) -> list[int]:
    evens, odds = [*range(0, n, 2)], [*range(1, n, 2)]
    half = (n + 1) // 2
    match leaf.kind:
        case "reverse":
            return [*range(n)][::-1]
        case "swap":
            return [*range(half, n), *range(half)]
        case "deinterleave":
            return evens + odds
        case "interleave":
            return sorted(range(n), key=(evens + odds).__getitem__)
    return layer.permutation.tolist()


def checkerboard(x: Tensor, parity: int) -> Tensor:
    rows, columns = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[3])
    return ((rows + columns) % 2 == parity).to(x.dtype)


def shifted(leaf: Leaf, x: Tensor, h: Tensor, back: bool) -> Tensor:
    if leaf.kind == "additive":
        return x - h if back else x + h
    raw, shift = h.split([h.shape[1] // 2] * 2, 1)
    scale = {
        "tanh": lambda: torch.exp(2 * torch.tanh(raw / 20)),
        "softclip": lambda: torch.exp(4 / math.pi * torch.atan(raw / 2)),
        "sigmoid": lambda: 0.1 + 0.9 / (1 + torch.exp(-raw - 2)),
        "unit": lambda: (1 + 1 / (1 + torch.exp(-raw))) / 2,
        "exp": lambda: torch.exp(raw),
    }[leaf.scale]()
    return (x - shift) / scale if back else x * scale + shift


def coupled(leaf: Leaf, layer: nn.Module, values: Values, side: dict[str, Tensor], back: bool) -> Values:
    def apply(net: nn.Module, x: Tensor) -> Tensor:
        return net(x, **side) if isinstance(net, Conditioned) else net(x)

    order = [(net, index ^ leaf.swap) for index, net in enumerate((layer.f, layer.g)) if net is not None]
    order = order[::-1] if back else order
    if leaf.split == "checkerboard":
        (x,) = values
        for net, target in order:
            moving, still = checkerboard(x, target), checkerboard(x, 1 - target)
            x = still * x + moving * shifted(leaf, x, apply(net, x * still), back)
        return (x,)
    if len(values) == 1:
        first, second = indices(leaf.split, values[0].shape[1])
        streams = [values[0][:, first], values[0][:, second]]
    else:
        streams = [*values]
    for net, target in order:
        streams[target] = shifted(leaf, streams[target], apply(net, streams[1 - target]), back)
    if len(values) == 2:
        return tuple(streams)
    return (permuted(torch.cat(streams, 1), first + second, 1, back=True),)


def weight_of(leaf: Leaf, layer: nn.Module) -> Tensor:
    """The matrix of an invertible linear layer, from its parameters."""
    p = dict(layer.matrix.named_parameters())
    match leaf.matrix:
        case "householder":
            return reflections(p["vectors"])
        case "cayley":
            skew = p["generator"] - p["generator"].mT
            eye = torch.eye(len(skew), dtype=skew.dtype)
            return torch.linalg.inv(eye + skew) @ (eye - skew)
        case "scaled":
            return reflections(p["left"]) @ p["log_scale"].tanh().exp().diag() @ reflections(p["right"]).mT
        case "plu":
            n = len(p["packed"])
            packed, scale = p["packed"] / math.sqrt(n), p["packed"].diagonal().tanh().exp()
            lower = packed.tril(-1) + torch.eye(n, dtype=packed.dtype)
            upper = packed.triu(1) + torch.diag(layer.matrix.sigma * scale)
            return torch.stack([(lower @ upper)[i] for i in layer.matrix.permutation.tolist()])
    return p["entries"]


def reflections(vectors: Tensor) -> Tensor:
    product = torch.eye(len(vectors), dtype=vectors.dtype)
    for v in vectors.unbind(1):
        product = product - 2 * torch.outer(product @ v, v) / (v @ v)
    return product


def mixed(leaf: Leaf, layer: nn.Module, x: Tensor, back: bool) -> Tensor:
    weight, bias = weight_of(leaf, layer), layer.bias
    rows = x.movedim(1, -1)
    rows = (rows - bias) @ torch.linalg.inv(weight).mT if back else rows @ weight.mT + bias
    return rows.movedim(-1, 1)


def plain_leaf(leaf: Leaf, layer: nn.Module, values: Values, side: dict[str, Tensor], back: bool) -> Values:
    if leaf.kind in ("additive", "affine"):
        return coupled(leaf, layer, values, side, back)
    if leaf.kind == "swap" and len(values) == 2:
        return values[::-1]
    (x,) = values
    match leaf.kind:
        case "matrix":
            y = mixed(leaf, layer, x, back)
        case "identity":
            y = x
        case "leaky":
            y = torch.where(x > 0, x, x / leaf.slope if back else x * leaf.slope)
        case "tanh" | "atanh":
            y = torch.atanh(x) if back != (leaf.kind == "atanh") else torch.tanh(x)
        case "sigmoid_layer" | "logit":
            y = torch.log(x / (1 - x)) if back != (leaf.kind == "logit") else 1 / (1 + torch.exp(-x))
        case _:
            y = permuted(x, order_of(leaf, layer, x.shape[leaf.dim]), leaf.dim, back)
    return (y,)


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
            if not isinstance(self.layer, iz.InvertibleModule):
                return (self.layer(*values),)
            return plain_leaf(spec, self.layer, values, side, back)
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
            sizes = len(first), len(second)
            joined = torch.cat(values, 1)
            return (permuted(joined, first + second, 1, back=True) if stays(values, sizes) else joined,)
        return (start[0] + values[0],) if spec.kind == "residual" else values

    def walk(self) -> "Iterator[Built]":
        yield self
        for part in self.parts:
            yield from part.walk()


def stays(streams: Values, sizes: tuple[int, int]) -> bool:
    """Whether streams are of the sizes that they were split into; a swap of unequal ones changes that."""
    return tuple(s.shape[1] for s in streams) == sizes


class Around(nn.Module):
    """Groups that are no container of InvZoo's or torch's."""

    def __init__(self, group: Group, parts: list[Built], features: int) -> None:
        super().__init__()
        self.group, self.parts = group, parts
        self.held = nn.ModuleList([p.module for p in parts])
        self.sizes = tuple(map(len, indices(group.split, features)))
        self.cut, self.join = iz.Split(split=group.split), iz.Merge(split=group.split)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        side = {} if condition is None else {"condition": condition}
        group, values = self.group, (x,)
        if group.kind == "branch":
            (a,), (b,) = (p.ours(values, side) for p in self.parts)
            return a + b
        if group.kind == "streams":
            first, second = indices(group.split, x.shape[1])
            values = self.cut(x) if group.flip else (x[:, first], x[:, second])
        for part in self.parts * group.repeat:
            values = part.ours(values, side)
        if group.kind == "streams":
            if stays(values, self.sizes):
                return (
                    self.join(*values) if group.flip else permuted(torch.cat(values, 1), first + second, 1, back=True)
                )
            return torch.cat(values, 1)
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
            layer = Around(item, parts, self.spec.features)
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
        split = indices(leaf.split, n) if leaf.split != "checkerboard" else None
        sizes = sizes or ((len(split[0]), len(split[1])) if split else (n, n))
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
