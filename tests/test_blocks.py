"""Blocks: the layers that they are made of, and how these are put together."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import invzoo as iz
from tests.layers.helpers import inputs, jacobian, perturbed


class Net(nn.Module):
    """A small subnet between any two numbers of features in ``dim`` 1."""

    def __init__(self, inputs, outputs, dtype=torch.float64):
        super().__init__()
        self.inner = nn.Linear(inputs, 5, dtype=dtype)
        self.outer = nn.Linear(5, outputs, dtype=dtype)

    def forward(self, x, context=None):
        h = self.outer(self.inner(x.movedim(1, -1)).tanh()).movedim(-1, 1)
        return h if context is None else h * context


class Net32(Net):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, torch.float32)


def glow(features=5, **options):
    first = -(-features // 2)
    return perturbed(iz.GlowStep(features, Net(features - first, 2 * first), dtype=torch.float64, **options), 0.3)


def hint(features=7, **options):
    return perturbed(iz.HINTCoupling(features, Net, **options), 0.3)


def test_options_reach_every_layer():
    block = hint()
    assert block.mode == "invert"
    block.mode = "recompute"
    assert all(m.mode == "recompute" for m in block.modules() if isinstance(m, iz.InvertibleModule))
    for block in (glow(mode="store", check="never"), hint(mode="store", check="never")):
        layers = [m for m in block.modules() if isinstance(m, iz.AffineCoupling | iz.ActNorm)]
        assert {(m.mode, m.check) for m in layers} == {("store", "never")}


@pytest.mark.parametrize("mode", iz.Mode)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda net, half: iz.GlowStep(7, net(3, 8), dim=1, subnet_dtype=half), id="glow"),
        pytest.param(lambda net, half: iz.HINTCoupling(7, net, dim=1, subnet_dtype=half), id="hint"),
    ],
)
def test_subnets_alone_in_half_precision(make, mode):
    """All else is float32, so that the inverse is as good as ever, and gradients do not depend on the mode."""
    half = torch.bfloat16
    block, x = perturbed(make(lambda n, m: Net(n, m, half), half), 0.3), torch.randn(5, 7, 2, requires_grad=True)
    block(x)  # sets the norm
    y, log_det = block.forward_and_log_det(x)
    assert {y.dtype, log_det.dtype} == {torch.float32}
    assert_close(block.inverse(y), x, rtol=1e-5, atol=1e-5)

    def gradients():
        y, log_det = block.forward_and_log_det(x)
        return torch.autograd.grad(y.sin().sum() - log_det.sum(), [x, *block.parameters()])

    with iz.mode(block, "store"):
        expected = gradients()
    with iz.mode(block, mode):
        found = gradients()
    assert any(g.dtype == half for g in found)
    assert_close(found, expected, rtol=2e-2, atol=2e-2)


# ---- GlowStep -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "shape", "mix"), [(1, (4, 3), iz.InvertibleConv1x1), (-1, (4,), iz.InvertibleLinear)])
def test_a_glow_step_is_its_layers(dim, shape, mix):
    step, x = glow(4, dim=dim, kind="cayley"), inputs(6, *shape)
    names = {name: type(layer) for name, layer in step.named_children()}
    assert names == {"act_norm": iz.ActNorm, "mix": mix, "coupling": iz.AffineCoupling}
    y = step(x)
    assert_close(y, step.coupling(step.mix(step.act_norm(x))))
    assert_close(iz.InvertibleSequential(*step.children())(x), y)


def test_the_first_batch_sets_the_norm():
    step, x = iz.GlowStep(4, Net(2, 4), dim=1, dtype=torch.float64), 3 + 2 * inputs(50, 4, 5)
    assert not step.act_norm.initialized
    step.forward_and_log_det(x)
    assert step.act_norm.initialized
    assert_close(step.act_norm(x).mean((0, 2)), torch.zeros(4, dtype=torch.float64))


def test_a_glow_step_that_starts_at_zero_is_linear():
    step, x = iz.GlowStep(4, Net32(2, 4), dim=-1), torch.randn(5, 4)
    assert_close(step(x), step.mix(step.act_norm(x)), rtol=0, atol=0)
    assert iz.GlowStep(4, Net32(2, 4), zero_init=False).coupling.f.outer.weight.any()
    assert glow(4, scale="exp", max_log_scale=1.0).coupling.map == iz.layers.maps.Affine("exp", 1.0)


def test_a_glow_step_says_which_layer_refuses():
    with pytest.raises(ValueError, match=r"ActNorm: Expected \w+ to have size 4 in dim 1") as info:
        glow(4)(inputs(2, 3))
    assert any("layer act_norm (ActNorm)" in note for note in info.value.__notes__)
    with pytest.raises(ValueError, match=r"InvertibleConv1x1: Expected kind to be one of"):
        glow(4, kind="lu")
    with pytest.raises(TypeError, match=r"AffineCoupling: Expected f to be a module or a function; got int"):
        iz.GlowStep(4, 3)


# ---- HINTCoupling ---------------------------------------------------------------------------------------------------


def recursion(layer, x):
    """The map of the paper, with the nets of a layer."""
    if not isinstance(layer, iz.HINTCoupling):
        return x
    n = -(-x.shape[1] // 2)
    x1, x2 = x[:, :n], x[:, n:]
    h, t = layer.coupling.f(x1).chunk(2, 1)
    x2 = x2 * torch.exp(2 * torch.tanh(0.05 * h)) + t
    halves = layer.halves.layers if hasattr(layer, "halves") else (None, None)
    return torch.cat([recursion(half, part) for half, part in zip(halves, (x1, x2))], 1)


@pytest.mark.parametrize("features", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("depth", [None, 1, 2, 9])
def test_hint_is_the_papers_recursion(features, depth):
    layer, x = hint(features, depth=depth), inputs(3, features)
    assert_close(layer(x), recursion(layer, x))


def test_a_deep_hint_has_a_full_triangular_jacobian():
    assert torch.equal(jacobian(hint(7), inputs(7)) != 0, torch.ones(7, 7).tril().bool())


@pytest.mark.parametrize(("depth", "couplings"), [(None, 7), (1, 1), (2, 3), (3, 7), (8, 7)])
def test_depth_is_how_often_features_are_halved(depth, couplings):
    layer = hint(8, depth=depth)
    assert sum(isinstance(m, iz.AffineCoupling) for m in layer.modules()) == couplings
    moved = jacobian(layer, inputs(8)) - torch.eye(8, dtype=torch.float64)
    assert moved.ne(0).any(1).sum() == {1: 4, 2: 6}.get(depth, 7)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.cats = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.cats += func.overloadpacket is torch.ops.aten.cat
        return func(*args, **(kwargs or {}))


def test_a_coupling_and_the_halves_behind_it_share_streams():
    with Count() as count:
        hint(8)(inputs(3, 8))
    assert count.cats == 7  # one for each coupling


def test_hint_starts_as_the_identity():
    x = torch.randn(3, 7)
    assert_close(iz.HINTCoupling(7, Net32)(x), x, rtol=0, atol=0)
    assert not torch.allclose(iz.HINTCoupling(7, Net32, zero_init=False)(x), x)
    assert all(m.map.scale == "unit" for m in hint(scale="unit").modules() if isinstance(m, iz.AffineCoupling))


# ---- long stacks ----------------------------------------------------------------------------------------------------
