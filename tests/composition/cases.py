"""Nets with invertible layers beside the same maths written plainly, with the same parameters."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import invzoo as iz

__all__ = [
    "BATCH",
    "BUILDERS",
    "MODES",
    "WIDTH",
    "Case",
    "PlainAdditive",
    "PlainAffine",
    "PlainStreams",
    "Streams",
    "assert_same",
    "assert_same_step",
    "coupling",
    "gradients",
    "make",
    "subnet",
    "train_step",
]

BATCH, WIDTH, HIDDEN = 4, 6, 5
MODES = ("store", "recompute", "invert")


def subnet(outputs: int, width: int = WIDTH // 2, hidden: int = HIDDEN, middle: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh() if middle is None else middle, nn.Linear(hidden, outputs))


class PlainAdditive(nn.Module):
    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def streams(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.streams(*x.chunk(2, 1)), 1)


class PlainAffine(PlainAdditive):
    def streams(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = self.move(x1, self.f(x2))
        return y1, self.move(x2, self.g(y1))

    @staticmethod
    def move(x: Tensor, h: Tensor) -> Tensor:
        raw, shift = h.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, 1)
        return (x * (2 * torch.tanh(raw * 0.05)).exp() + shift).to(x.dtype)


class Streams(nn.Module):
    """Invertible couplings by hand on two streams."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        for layer in self.layers:
            x1, x2 = layer(x1, x2)
        return torch.cat((x1, x2), 1)


class PlainStreams(Streams):
    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        for layer in self.layers:
            x1, x2 = layer.streams(x1, x2)
        return torch.cat((x1, x2), 1)


def coupling(kind: str, plain: bool = False, net: Callable[[int], nn.Module] = subnet) -> nn.Module:
    half = WIDTH // 2
    if kind == "additive":
        return (PlainAdditive if plain else iz.AdditiveCoupling)(net(half), net(half))
    return (PlainAffine if plain else iz.AffineCoupling)(net(2 * half), net(2 * half))


KINDS = ("additive", "affine", "additive")


def _layers(plain: bool, net: Callable[[int], nn.Module]) -> list[nn.Module]:
    return [coupling(kind, plain, net) for kind in KINDS]


BUILDERS: dict[str, Callable[[bool, Callable[[int], nn.Module]], nn.Module]] = {
    "layer": lambda plain, net: coupling("affine", plain, net),
    "sequential": lambda plain, net: nn.Sequential(*_layers(plain, net)),
    "invertible_sequential": lambda plain, net: (nn.Sequential if plain else iz.InvertibleSequential)(
        *_layers(plain, net)
    ),
    "streams": lambda plain, net: (PlainStreams if plain else Streams)(*_layers(plain, net)),
}


@dataclass
class Case:
    """A net with invertible layers, the same maths done plainly, and an input for both."""

    net: nn.Module
    plain: nn.Module
    x: Tensor
    name: str = ""


def make(name: str, net: Callable[[int], nn.Module] = subnet) -> Case:
    invertible, plain = BUILDERS[name](False, net), BUILDERS[name](True, net)
    plain.load_state_dict(invertible.state_dict())
    return Case(invertible, plain, torch.randn(BATCH, WIDTH), name)


def gradients(net: nn.Module, *others: Tensor) -> list[Tensor | None]:
    return [p.grad for p in (*net.parameters(), *others)]


def train_step(net: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> list[Any]:
    """Run one step with an op that saves its output before and after the net; return output and gradients."""
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = (lambda n, v: n(v))(net, x.sigmoid()) if call is None else call(net, x.sigmoid())
    y.sin().square().sum().backward()
    return [y.detach(), *gradients(net, x)]


def size(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0


def assert_same(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None], rtol: float = 1e-9) -> None:
    """Compare tensor by tensor, relative to the tensor's size; what is 1e12 times smaller than the largest is noise."""
    actual, expected = [*actual], [*expected]
    assert len(actual) == len(expected)
    largest = max(size(e) for e in expected if e is not None)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(a, e, rtol=rtol, atol=max(rtol * size(e), 1e-12 * largest))


def assert_same_step(case: Case, call: Callable[[nn.Module, Tensor], Tensor] | None = None, steps: int = 2) -> None:
    """Compare steps of both nets, each of which runs inside ``call``; the first one is checked, the next is not."""
    for _ in range(steps):
        assert_same(train_step(case.net, case.x, call), train_step(case.plain, case.x, call))
