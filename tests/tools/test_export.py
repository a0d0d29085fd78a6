"""`torch.export` of every layer of the catalogue, there and back."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import invzoo as iz
from invzoo.engine import tuple_of
from invzoo.testing import Case
from tests.reference import assert_near
from tests.tools.families import DIRECTIONS, FAMILIES, FORWARD, REFUSED, given, take_few_steps, together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # torch's own
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

# With `strict=True` it comes from the compiler.
REFUSED_STRICTLY = REFUSED | {
    "Monotone-inverse": "its derivative is found by `torch.autograd.grad`, which the compiler follows if told to",
    "Monotone[context]-inverse": "as above",
    "Monotone[bounds]-inverse": "as above",
}

CASES = [
    pytest.param(case, direction, id=f"{case.name}-{direction}")
    for case in iz.testing.cases()
    for direction in DIRECTIONS
]


@pytest.mark.parametrize(("case", "direction"), CASES)
def test_export(case: Case, direction: str, monkeypatch: pytest.MonkeyPatch):
    take_few_steps(monkeypatch)
    layer, values, side = given(case, direction)
    export = partial(torch.export.export, layer, values, side)
    if f"{case.name}-{direction}" in REFUSED:
        with pytest.raises(GuardOnDataDependentSymNode):
            export()
        return
    exported = export().module()
    torch.manual_seed(0)
    expected = tuple_of(layer(*values, **side))
    torch.manual_seed(0)
    assert_near(tuple_of(exported(*values, **side)), expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_strict_export(family: str, direction: str, monkeypatch: pytest.MonkeyPatch):
    take_few_steps(monkeypatch)
    net, inputs = together(family, direction, REFUSED_STRICTLY.__contains__)
    exported = torch.export.export(net, inputs, strict=True).module()
    torch.manual_seed(0)
    expected = net(*inputs)
    torch.manual_seed(0)
    assert_near(exported(*inputs), expected)


@pytest.mark.parametrize(("case", "direction"), [p for p in CASES if p.id in REFUSED_STRICTLY])
def test_strict_export_refuses(case: Case, direction: str):
    layer, values, side = given(case, direction)
    with pytest.raises(Unsupported):
        torch.export.export(layer, values, side, strict=True)


def flow() -> iz.InvertibleSequential:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
    return iz.InvertibleSequential(iz.ActNorm(4), iz.InvertibleLinear(4), iz.AffineCoupling(net), iz.Reverse()).double()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("strict", [False, True])
def test_any_batch_size(direction: str, strict: bool, tmp_path):
    net, x = flow(), torch.randn(5, 4, dtype=torch.float64)
    net(x)  # what depends on the first batch is set
    module = net if direction == FORWARD else net.inv
    batches = {"inputs": ({0: torch.export.Dim("batch")},)}  # forward(*inputs)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=batches, strict=strict), tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (2, 7):
        fresh = torch.randn(batch, 4, dtype=torch.float64)
        assert_near([loaded(fresh)], [module(fresh)])


@pytest.mark.usual
def test_log_determinants():
    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = flow()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z, log_det = self.net.forward_and_log_det(x)
            return log_det - z.square().sum(1) / 2

    module, x = Density(), torch.randn(5, 4, dtype=torch.float64)
    module(x)
    assert_near([torch.export.export(module, (x,)).module()(x)], [module(x)])


def test_an_exported_net_trains_as_it_did():
    net, x = flow(), torch.randn(5, 4, dtype=torch.float64)
    net(x)
    exported = torch.export.export(net, (x,)).module()
    exported(x).square().sum().backward()
    found = [p.grad for p in exported.parameters()]
    net(x).square().sum().backward()
    assert_near(found, [p.grad for p in net.parameters()])


def test_strict_export_first_in_a_process():  # where einops has not seen a parameter yet
    script = """if True:
        import torch, invzoo as iz
        torch.export.export(iz.MaskedAutoregressive(2).inv, (torch.zeros(1, 2),), strict=True)
    """
    subprocess.run([sys.executable, "-W", "error:While compiling:UserWarning", "-c", script], check=True)  # noqa: S603
