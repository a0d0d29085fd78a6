"""Layer, RMS and group norm against torch's, and what they keep to be inverted."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

import invzoo as iz
from tests.layers.helpers import kept_by, perturbed

MODES = ("store", "recompute", "invert")
F64 = {"dtype": torch.float64}

# ours, torch's, and the shape of the input
PAIRS = {
    "layer": (lambda **o: iz.InvertibleLayerNorm(4, **F64, **o), lambda: nn.LayerNorm(4, **F64), (2, 3, 4)),
    "layer, two dims": (
        lambda **o: iz.InvertibleLayerNorm((3, 4), 0.1, **F64, **o),
        lambda: nn.LayerNorm((3, 4), 0.1, **F64),
        (2, 3, 4),
    ),
    "layer, no bias": (
        lambda **o: iz.InvertibleLayerNorm(4, bias=False, **F64, **o),
        lambda: nn.LayerNorm(4, bias=False, **F64),
        (2, 3, 4),
    ),
    "layer, plain": (
        lambda **o: iz.InvertibleLayerNorm(4, elementwise_affine=False, **F64, **o),
        lambda: nn.LayerNorm(4, elementwise_affine=False, **F64),
        (5, 4),
    ),
    "rms": (lambda **o: iz.InvertibleRMSNorm(4, **F64, **o), lambda: nn.RMSNorm(4, **F64), (2, 3, 4)),
    "rms, two dims": (
        lambda **o: iz.InvertibleRMSNorm([3, 4], 0.1, **F64, **o),
        lambda: nn.RMSNorm([3, 4], 0.1, **F64),
        (2, 3, 4),
    ),
    "rms, plain": (
        lambda **o: iz.InvertibleRMSNorm(4, elementwise_affine=False, **F64, **o),
        lambda: nn.RMSNorm(4, elementwise_affine=False, **F64),
        (5, 4),
    ),
    "group": (lambda **o: iz.InvertibleGroupNorm(2, 4, **F64, **o), lambda: nn.GroupNorm(2, 4, **F64), (2, 4, 3, 2)),
    "group, plain": (
        lambda **o: iz.InvertibleGroupNorm(1, 4, eps=0.1, affine=False, **F64, **o),
        lambda: nn.GroupNorm(1, 4, eps=0.1, affine=False, **F64),
        (2, 4, 3),
    ),
    "instance": (
        lambda **o: iz.InvertibleGroupNorm(4, 4, **F64, **o),
        lambda: nn.InstanceNorm1d(4, affine=True, **F64),
        (2, 4, 5),
    ),
}
all_norms = pytest.mark.parametrize("name", PAIRS)
all_modes = pytest.mark.parametrize("mode", MODES)


def pair(name, **options):
    """A layer and torch's with the same weights, and an input."""
    make, torchs, shape = PAIRS[name]
    ours, torchs = make(**options), torchs()
    with torch.no_grad():
        if ours.log_scale is not None:
            ours.log_scale.copy_(0.5 * torch.randn_like(ours.log_scale))
            torchs.weight.copy_(ours.weight)
        if ours.bias is not None:
            ours.bias.copy_(torch.randn_like(ours.bias))
            torchs.bias.copy_(ours.bias)
    return ours, torchs, 3 + 2 * torch.randn(shape, **F64)


def derivatives(layer, x, parameters):
    """First and second ones of a loss."""
    x = x.clone().requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y.sin().sum(), (x, *parameters), create_graph=True)
    return y, first, torch.autograd.grad(first[0].cos().sum(), (x, *parameters[:1]))


@all_norms
@all_modes
def test_values_and_derivatives_are_torchs(name, mode):
    ours, torchs, x = pair(name, mode=mode)
    y, first, second = derivatives(ours, x, [*ours.parameters()])
    expected, *others = derivatives(torchs, x, [*torchs.parameters()])
    assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip((first, second), others, strict=True):
        expected = [*theirs]
        if ours.log_scale is not None:
            (slope,) = torch.autograd.grad(ours.weight.sum(), ours.log_scale)
            expected[1] = expected[1] * slope
        assert_close([*mine], expected, rtol=1e-8, atol=1e-8)


@all_norms
def test_the_function_returns_the_statistics_that_invert_it(name):
    ours, _, x = pair(name)
    y, *statistics = ours.function(x)
    assert len(statistics) == len(ours.statistics)
    assert_close(ours(x), y, rtol=0, atol=0)
    assert_close(ours.inverse(y, *statistics), x, rtol=1e-12, atol=1e-12)
    samples = x.numel() // 4 if "two" not in name else len(x)
    assert all(s.numel() <= samples for s in statistics)


def test_layer_norms_statistics_are_those_of_each_token():
    layer, x = iz.InvertibleLayerNorm(4, **F64), torch.randn(2, 3, 4, **F64)
    _, mean, rstd = layer.function(x)
    assert_close(mean, x.mean(-1, keepdim=True))
    assert_close(rstd, (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt())
    _, rrms = iz.InvertibleRMSNorm(4, 0.1, **F64).function(x)
    assert_close(rrms, (x.square().mean(-1, keepdim=True) + 0.1).rsqrt())


@all_norms
def test_derivatives_of_the_inverse_by_outputs_and_statistics(name):
    ours, _, x = pair(name)
    given = [t.detach().requires_grad_() for t in ours.function(x)]
    given[0] = (given[0] + 0.5).detach().requires_grad_()  # not what the statistics belong to
    for mode in MODES:
        with iz.mode(ours, mode):
            assert gradcheck(ours.inv, given)
            assert gradcheck(iz.Inverse(ours), given)
    assert gradcheck(lambda x: ours.inverse(*ours.function(x)), x.requires_grad_())


@all_norms
def test_there_is_no_log_determinant(name):
    ours, _, x = pair(name)
    kind = type(ours).__name__
    for call in (ours.log_det, ours.forward_and_log_det):
        with pytest.raises(TypeError, match=f"{kind}: Expected layer to be a bijection with a log-determinant"):
            call(x)
    with pytest.raises(TypeError, match=kind):
        iz.InvertibleSequential(ours).forward_and_log_det(x)
    with pytest.raises(TypeError, match=kind):
        ours.inverse_and_log_det(*ours.function(x))


@all_norms
def test_there_is_no_inverse_without_statistics(name):
    ours, _, x = pair(name)
    names = "y, rrms" if name.startswith("rms") else "y, mean, rstd"
    message = f"{type(ours).__name__}: Expected inverse to be given {names}, as function returns them; got y and 0 stat"
    chain = iz.InvertibleSequential(iz.Identity(), ours)
    for call in (ours.inverse, ours.inv, chain.inverse, chain.inv):
        with pytest.raises(TypeError, match=message) as raised:
            call(x)
    assert any("layer 1 (" in note for note in raised.value.__notes__)


@all_modes
def test_a_chain_with_couplings_has_the_gradients_of_a_plain_one(mode):
    def build(mode):
        torch.manual_seed(3)
        layers = [iz.AdditiveCoupling(nn.Linear(2, 2), dim=-1), iz.InvertibleLayerNorm(4), iz.InvertibleRMSNorm(4)]
        return iz.InvertibleSequential(*layers, iz.InvertibleLinear(4), iz.InvertibleLayerNorm(4), mode=mode).double()

    x, results = torch.randn(2, 3, 4, **F64), []
    for net in (build("store"), build(mode)):
        z = x.clone().requires_grad_()
        y = net(z)
        y.sin().sum().backward()
        results.append((y, z.grad, *(p.grad for p in net.parameters())))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [iz.InvertibleLayerNorm, iz.InvertibleRMSNorm])
def test_a_chain_keeps_the_statistics_alone(kind):
    def held(depth, mode):
        return kept_by((kind(64) for _ in range(depth)), mode, 8, 16, 64)

    token = 8 * 16 * 4
    grown = held(8, "invert") - held(4, "invert")
    assert grown == 4 * token * (2 if kind is iz.InvertibleLayerNorm else 1)
    assert held(8, "store") - held(4, "store") >= 4 * 64 * token


# ---- precision and batches ----


@pytest.mark.parametrize(
    ("kind", "mean", "atol"),
    [
        (iz.InvertibleLayerNorm, 0.0, 1e-4),
        (iz.InvertibleRMSNorm, 0.0, 1e-4),
        (iz.InvertibleBatchNorm, 0.0, 1e-3),
        (iz.InvertibleBatchNorm, 1e3, 1e-3),
    ],
)
def test_a_deep_chain_has_the_gradients_of_a_plain_one_in_float32(kind, mean, atol):
    chain = perturbed(iz.InvertibleSequential(*(kind(8) for _ in range(16))), 0.1)
    x, gradients = (mean + torch.randn(32, 8)).requires_grad_(), []
    for mode in ("invert", "store"):
        with iz.mode(chain, mode):
            gradients.append(torch.autograd.grad(chain(x).sin().sum(), [x, *chain.parameters()]))
    assert_close(*gradients, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [iz.InvertibleLayerNorm, iz.InvertibleRMSNorm])
def test_half_precision_keeps_its_statistics_in_single(kind, dtype):
    layer, x = kind(8, dtype=dtype), torch.randn(64, 8).to(dtype).requires_grad_()
    y, *statistics = layer.function(x)
    assert y.dtype == dtype
    assert all(s.dtype == torch.float32 for s in statistics)
    assert_close(layer.inverse(y, *statistics), x, rtol=1e-2, atol=3e-2)
    layer(x).float().sin().sum().backward()
    assert x.grad.isfinite().all()


@all_norms
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_small_batches_of_constants(name, batch, value):
    ours, _, x = pair(name)
    x = torch.full_like(x[:1], value).expand(batch, *x.shape[1:]).clone().requires_grad_()
    y = ours(x)
    y.sin().sum().backward()
    assert y.shape == x.shape
    assert x.grad.isfinite().all()
    assert_close(ours.inverse(*ours.function(x)), x, rtol=1e-9, atol=1e-9)


def test_scales_stay_bounded():
    layer = iz.InvertibleRMSNorm(3, max_log_scale=0.5)
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([-1e9, 0.0, 1e9]))
    assert_close(layer.weight, torch.tensor([-0.5, 0.0, 0.5]).exp())
    layer.reset_parameters()
    assert_close(layer.weight, torch.ones(3))
