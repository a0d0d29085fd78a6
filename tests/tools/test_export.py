"""`torch.export` of every layer of the catalogue, there and back."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import invzoo as iz
from invzoo.engine import tuple_of
from invzoo.layers import mixture, roots
from invzoo.testing import Case
from tests.composition.cases import assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # torch's own
]

FORWARD, INVERSE = "forward", "inverse"

# An exported graph has no branches that depend on values.
REFUSED = {
    ("InvertibleResidual", INVERSE): "the fixed-point iteration stops when it has converged",
    ("InvertibleResidual[series]", INVERSE): "as above",
    ("InvertibleResidual[solve]", INVERSE): "as above",
    ("InvertibleResidual[context]", INVERSE): "as above",
    ("Slice[context]", INVERSE): "its decoder makes a distribution that checks its parameters",
    ("Augment[context]", FORWARD): "as above",
}

CASES = [
    pytest.param(case, direction, id=f"{case.name}-{direction}")
    for entry in iz.testing.CATALOGUE
    for case in entry.cases
    for direction in (FORWARD, INVERSE)
]


@pytest.mark.parametrize(("case", "direction"), CASES)
def test_export(case: Case, direction: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roots.bracket.__wrapped__, "__defaults__", (6,))  # unrolled loops are long to export
    monkeypatch.setattr(roots.newton.__wrapped__, "__defaults__", (4,))
    monkeypatch.setattr(mixture, "_STEPS", 4)
    layer, values, side = case.layer(), case.inputs(), case.side_inputs()
    if direction == INVERSE:
        with torch.no_grad():
            layer, values = layer.inv, tuple_of(layer(*values, **side))
    export = partial(torch.export.export, layer, values, side)
    if (case.name, direction) in REFUSED:
        with pytest.raises(GuardOnDataDependentSymNode):
            export()
        return
    exported = export().module()
    torch.manual_seed(0)
    expected = tuple_of(layer(*values, **side))
    torch.manual_seed(0)
    assert_same(tuple_of(exported(*values, **side)), expected)


def flow() -> iz.InvertibleSequential:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
    return iz.InvertibleSequential(iz.ActNorm(4), iz.InvertibleLinear(4), iz.AffineCoupling(net), iz.Reverse()).double()


@pytest.mark.parametrize("direction", [FORWARD, INVERSE])
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
        assert_same([loaded(fresh)], [module(fresh)])


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
    assert_same([torch.export.export(module, (x,)).module()(x)], [module(x)])


def test_an_exported_net_trains_as_it_did():
    net, x = flow(), torch.randn(5, 4, dtype=torch.float64)
    net(x)
    exported = torch.export.export(net, (x,)).module()
    exported(x).square().sum().backward()
    found = [p.grad for p in exported.parameters()]
    net(x).square().sum().backward()
    assert_same(found, [p.grad for p in net.parameters()])
