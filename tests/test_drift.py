"""Deep stacks of 64 features in float32: as they start, and with conditioners three times as large."""

import pytest
import torch
from torch import nn

import invzoo as iz
from invzoo.testing.memory import track_memory


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, outputs))


COUPLINGS = {
    "additive": lambda: iz.AdditiveCoupling(mlp(32, 32)),
    "affine": lambda: iz.AffineCoupling(mlp(32, 64)),
    "affine-two-sided": lambda: iz.AffineCoupling(mlp(32, 64), mlp(32, 64)),
    "affine-softclip": lambda: iz.AffineCoupling(mlp(32, 64), scale="softclip", zero_init=True),
    "gin": lambda: iz.GINCoupling(mlp(32, 64)),
    "spline": lambda: iz.RationalQuadraticCoupling(mlp(32, 32 * 23)),
    "spline-circular": lambda: iz.RationalQuadraticCoupling(mlp(32, 32 * 24), tails="circular"),
    "mixture": lambda: iz.MixtureLogisticCoupling(mlp(32, 32 * iz.MixtureLogisticCoupling(mlp(1, 1)).map.parameters)),
    "hint": lambda: iz.HINTCoupling(64, mlp, depth=2),
    "glow-step": lambda: iz.GlowStep(64, mlp(32, 64), dim=-1),
    "additive-two-sided": lambda: iz.AdditiveCoupling(mlp(32, 32), mlp(32, 32)),
}
LINEAR = {
    **{kind: lambda kind=kind: iz.InvertibleLinear(64, kind=kind) for kind in ("householder", "cayley", "scaled")},
    **{kind: lambda kind=kind: iz.InvertibleLinear(64, kind=kind) for kind in ("plu", "free")},
    "woodbury": lambda: iz.WoodburyLinear(64, 8),
    "permute": lambda: iz.Shuffle(64),
    "elementwise-spline": lambda: iz.RationalQuadraticSpline(64),
    "elementwise-affine": lambda: iz.ElementwiseAffine(64),
}


def drift(build, depth, factor=1.0):
    layers = (layer for _ in range(depth) for layer in (build(), iz.Swap()))
    net = iz.InvertibleSequential(*layers).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(factor)
        x = torch.randn(128, 64)
        return (net.inverse(net(x)) - x).abs().max().item()


@pytest.mark.parametrize("name", [*COUPLINGS, *LINEAR])
def test_a_stack_of_64_comes_back(name):
    assert drift((COUPLINGS | LINEAR)[name], 64) < 1e-4


@pytest.mark.parametrize("name", ["additive", "affine", "gin", "spline", "spline-circular", "mixture"])
def test_conditioners_three_times_as_large(name):
    assert drift(COUPLINGS[name], 16, 3.0) < 1e-3


def chain_bytes(case, depth):
    """Return what a chain of a layer, and of it undone, holds in mode invert."""
    layers = [layer for one in [case.layer() for _ in range(depth // 2)] for layer in (one, one.inv)]
    (x,), side = case.inputs(batch=4), case.side_inputs(batch=4)
    for layer in layers:  # what the first call checks
        layer.check = "never"
    x.requires_grad_()
    with track_memory() as memory:
        y = x
        for layer in layers:
            y = layer(y, **side)
        return memory.current


def chains(case):
    """Whether a layer and its inverse, in turn, make a chain of single tensors."""
    return len(case.shapes) == 1 and isinstance(case.layer()(*case.inputs(), **case.side_inputs()), torch.Tensor)


KEEPS_NOTHING = [case for entry in iz.testing.CATALOGUE if entry.keeps == "nothing" for case in entry.cases]


@pytest.mark.parametrize("case", [case for case in KEEPS_NOTHING if chains(case)], ids=lambda case: case.name)
def test_a_chain_holds_one_activation(case):
    """At any depth, as the catalogue's assertion on memory adds."""
    (x,) = case.inputs(batch=4)
    activation = max(x.nbytes, case.layer()(x, **case.side_inputs(batch=4)).nbytes)
    assert chain_bytes(case, 4) <= activation
