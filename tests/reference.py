"""Nets with invertible layers beside the same maths done plainly, with the same parameters, and comparisons of both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz

__all__ = [
    "BATCH",
    "FEATURES",
    "FORMS",
    "HALF",
    "MODES",
    "SUBJECTS",
    "Called",
    "Case",
    "Chain",
    "PlainAdditive",
    "PlainAffine",
    "Streams",
    "Subject",
    "assert_near",
    "assert_same_run",
    "assert_same_step",
    "first_cases",
    "gradients",
    "make",
    "mlp",
    "params",
    "run",
    "train_step",
]

MODES = ("store", "recompute", "invert")
BATCH, FEATURES, HALF = 4, 6, 3  # the width of what a net maps, and of what a subnet does

Block = Callable[[int, int], nn.Module]  # makes a subnet from so many features to so many


class Called(nn.Module):
    """A net that is called in some way, ``how(net, x)``."""

    def __init__(self, net: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.net, x)


def mlp(inputs: int, outputs: int, middle: nn.Module | None = None, *, hidden: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh() if middle is None else middle, nn.Linear(hidden, outputs))


# ---- plain layers ---------------------------------------------------------------------------------------------------


class PlainAdditive(nn.Module):
    """``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``, on one tensor or on two."""

    def __init__(self, f: nn.Module, g: nn.Module | None = None, *, swap: bool = False) -> None:
        super().__init__()
        self.f, self.g, self.swap = f, g, swap

    def forward(self, *x: Tensor, **side: Any) -> Any:
        if len(x) == 1:
            return torch.cat(self.forward(*x[0].chunk(2, 1), **side), 1)
        a, b = x[::-1] if self.swap else x
        a = self.couple(a, self.f(b, **side))
        if self.g is not None:
            b = self.couple(b, self.g(a, **side))
        return (b, a) if self.swap else (a, b)

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h


class PlainAffine(PlainAdditive):
    """``y1 = x1 exp(2 tanh(0.05 h)) + t`` with ``h, t = f(x2)``."""

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        log_scale, shift = h.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, 1)
        return (x * torch.exp(2 * torch.tanh(log_scale * 0.05)) + shift).to(x.dtype)


class UserLayer(iz.InvertibleModule):
    """What a user writes: a function, an inverse, a fact, and nothing else."""

    volume_preserving = True

    def __init__(self, f: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.f = f

    def function(self, *x: Tensor, **side: Any) -> Any:
        return self._move(torch.add, *x, **side)

    def inverse(self, *y: Tensor, **side: Any) -> Any:
        return self._move(torch.sub, *y, **side)

    def _move(self, step: Callable, *x: Tensor, **side: Any) -> Any:
        if len(x) == 1:
            return torch.cat(self._move(step, *x[0].chunk(2, 1), **side), 1)
        return step(x[0], self.f(x[1], **side)), x[1]


class Chain(nn.Sequential):
    """`nn.Sequential`, and side inputs for every layer if there are any."""

    def forward(self, x: Tensor, **side: Any) -> Tensor:
        if not side:
            return super().forward(x)
        for layer in self:
            x = layer(x, **side)
        return x


class Streams(nn.Sequential):
    """Layers on two streams, split once and merged once."""

    def forward(self, x: Tensor, **side: Any) -> Tensor:
        streams = x.chunk(2, 1)
        for layer in self:
            streams = layer(*streams, **side)
        return torch.cat(streams, 1)


# ---- subjects -------------------------------------------------------------------------------------------------------


def _additive(block: Block, ours: bool, swap: bool = False) -> nn.Module:
    subnets = block(HALF, HALF), block(HALF, HALF)
    return (iz.AdditiveCoupling if ours else PlainAdditive)(*subnets, swap=swap)


def _affine(block: Block, ours: bool, swap: bool = False) -> nn.Module:
    return (iz.AffineCoupling if ours else PlainAffine)(block(HALF, 2 * HALF), swap=swap)


def _user(block: Block, ours: bool) -> nn.Module:
    return (UserLayer if ours else PlainAdditive)(block(HALF, HALF))


def _layers(block: Block, ours: bool, depth: int) -> list[nn.Module]:
    kinds = (
        _user,
        _additive,
        lambda *how: _affine(*how, swap=True),
        lambda *how: _additive(*how, swap=True),
    )
    return [kinds[i % len(kinds)](block, ours) for i in range(depth)]


FORMS: dict[str, Callable[[Block, bool, int], nn.Module]] = {
    "additive": lambda block, ours, depth: _additive(block, ours),
    "affine": lambda block, ours, depth: _affine(block, ours),
    "user": lambda block, ours, depth: _user(block, ours),
    "sequential": lambda block, ours, depth: Chain(*_layers(block, ours, depth)),
    "stack": lambda block, ours, depth: (iz.InvertibleSequential if ours else Chain)(*_layers(block, ours, depth)),
    "streams": lambda block, ours, depth: Streams(*_layers(block, ours, depth)),
}


@dataclass(frozen=True)
class Subject:
    """One form of net in one mode, beside the plain net with the same weights."""

    form: str
    mode: str

    def pair(self, block: Block = mlp, depth: int = 4, **options: Any) -> tuple[nn.Module, nn.Module]:
        """Return the plain net and ours."""
        plain, ours = FORMS[self.form](block, False, depth), FORMS[self.form](block, True, depth)
        ours.load_state_dict(plain.state_dict())
        for layer in ours.modules():
            if isinstance(layer, iz.InvertibleModule) and not isinstance(layer, iz.InvertibleSequential):
                layer.mode = self.mode
                for name, value in options.items():
                    setattr(layer, name, value)
        return plain, ours

    def holds(self, program: Callable[[nn.Module], Any], block: Block = mlp, **how: Any) -> None:
        """Assert that the program does the same with the plain net and with ours, twice over."""
        plain, ours = self.pair(block, **how)
        Case(ours, plain, torch.empty(0), self).holds(program)


@dataclass
class Case:
    """A net with invertible layers, the plain net with the same weights, and an input for both."""

    net: nn.Module
    plain: nn.Module
    x: Tensor
    subject: Subject = Subject("stack", "invert")

    def holds(self, program: Callable[[nn.Module], Any], tolerance: float = 1e-9) -> None:
        """Assert that the program does the same with both nets, twice over."""
        for _ in range(2):  # the engine looks closer at a layer's first call
            assert_same_run(program, self.plain, self.net, tolerance)


def make(form: str, block: Block = mlp, mode: str = "invert") -> Case:
    """Make a small net of a form, and the plain net beside it."""
    subject = Subject(form, mode)
    plain, net = subject.pair(block, depth=3)
    return Case(net, plain, torch.randn(BATCH, FEATURES), subject)


SUBJECTS = [Subject(form, mode) for form in FORMS for mode in MODES[1:]]
SUBJECTS += [Subject(form, "store") for form in ("stack", "streams")]  # there is little to go wrong

# Both modes that free something, every container, each kind of layer in them, and a layer alone.
USUAL = {Subject("affine", "invert"), Subject("sequential", "recompute")}
USUAL |= {Subject("stack", "invert"), Subject("streams", "invert")}


def params(subjects: list[Subject]) -> list[Any]:
    """Return parameters for pytest; those for which the usual ones stand are slow."""
    return [pytest.param(s, id=f"{s.form}-{s.mode}", marks=() if s in USUAL else pytest.mark.slow) for s in subjects]


def first_cases() -> list[Any]:
    """Return the catalogue's cases as parameters for pytest; those behind the first one of their layer are slow."""
    first = [entry.cases[0] for entry in iz.testing.CATALOGUE]
    return [pytest.param(c, id=c.name, marks=() if c in first else pytest.mark.slow) for c in iz.testing.cases()]


# ---- comparisons ----------------------------------------------------------------------------------------------------


def run(program: Callable[[nn.Module], Any], net: nn.Module, seed: int = 1) -> dict[str, Any]:
    """Run a program from a fixed random state; return its result and all its side effects."""
    torch.manual_seed(seed)
    net.zero_grad()
    result = program(net)
    return {
        "result": result,
        "grads": {name: p.grad for name, p in net.named_parameters()},
        "parameters": {name: p.detach().clone() for name, p in net.named_parameters()},
        "buffers": {name: b.clone() for name, b in net.named_buffers()},
        "random state": torch.get_rng_state(),
    }


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Assert equal structure, types and shapes, and a relative error in the largest element below ``tolerance``."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"a Tensor, not {actual!r}"
        assert actual.requires_grad == expected.requires_grad
        largest = expected.detach().abs().max().item() if expected.numel() and expected.dtype.is_floating_point else 0
        largest = largest if largest < float("inf") else 0  # and not NaN
        exact = not (expected.dtype.is_floating_point or expected.dtype.is_complex)
        torch.testing.assert_close(
            actual.detach(),
            expected.detach(),
            rtol=0 if exact else tolerance,
            atol=0 if exact else tolerance * (largest + 1e-3),
            equal_nan=True,
        )
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            try:
                assert_near(actual[key], value, tolerance)
            except AssertionError as error:
                error.add_note(f"in {key!r}")
                raise
    elif isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, tolerance)
    else:
        assert actual == expected


def assert_same_run(
    program: Callable[[nn.Module], Any], plain: nn.Module, ours: nn.Module, tolerance: float = 1e-9
) -> None:
    """Assert that a program has the same result, gradients, buffers and random state with either net."""
    assert_near(run(program, ours), run(program, plain), tolerance)


def gradients(net: nn.Module, *others: Tensor) -> list[Tensor | None]:
    return [p.grad for p in (*net.parameters(), *others)]


def train_step(net: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> list[Any]:
    """Run one step with an op that saves its output before and after the net; return output and gradients."""
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = net(x.sigmoid()) if call is None else call(net, x.sigmoid())
    y.sin().square().sum().backward()
    return [y.detach(), *gradients(net, x)]


def assert_same_step(case: Case, call: Callable[[nn.Module, Tensor], Tensor] | None = None, steps: int = 2) -> None:
    """Compare steps of both nets, each of which runs inside ``call``; the first one is checked, the next is not."""
    for _ in range(steps):
        assert_near(train_step(case.net, case.x, call), train_step(case.plain, case.x, call))
