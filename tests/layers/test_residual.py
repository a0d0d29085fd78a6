"""Residual blocks of contractions: inverse, derivatives through it, log-determinants."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.residual.residual import exact_log_det, power_series, series_coefficients
from tests.layers.helpers import jacobian

ESTIMATORS = ["exact", "series", "roulette"]


class Net(nn.Module):
    """A contraction."""

    def __init__(self, features=3, coeff=0.9, hidden=8, dtype=torch.float64):
        super().__init__()
        inner, outer = nn.Linear(features, hidden, dtype=dtype), nn.Linear(hidden, features, dtype=dtype)
        self.net = iz.lipschitz(nn.ModuleList([inner, outer]), coeff)

    def forward(self, x):
        return self.net[1](torch.tanh(self.net[0](x)))


def trained(net, scale=5.0):
    """Blow up the weights, as training may."""
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


def block(features=3, **options):
    return iz.InvertibleResidual(trained(Net(features)), **options)


@pytest.mark.parametrize("slope", [0.5, 0.9, -0.9, 0.99])
@pytest.mark.parametrize("kind", ["linear", "abs", "relu"])
def test_the_hardest_contractions_are_undone(kind, slope):
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    act = {"linear": lambda h: h, "abs": torch.abs, "relu": torch.relu}[kind]
    layer = iz.InvertibleResidual(lambda x: slope * act(x @ q) @ q.mT.roll(1, 0))
    x = 10 ** torch.randn(32, 1, dtype=torch.float64) * torch.randn(32, 8, dtype=torch.float64)
    back = layer.inverse(layer(x))
    assert ((back - x).abs().amax(1) / x.abs().amax(1)).max() < 1e-11


def test_an_adjoint_that_does_not_come_to_rest():
    # At 0, which is its own inverse, the iteration ends at once; the equation for the gradient takes longer.
    layer = iz.InvertibleResidual(lambda x: 0.99 * torch.sin(x @ torch.triu(torch.ones(3, 3)) / 3), max_iterations=2)
    x = layer.inv(torch.zeros(2, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="InvertibleResidual: Expected iteration .* within 2 steps"):
        x.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [0, 1e-7, 1e-41, 1e-45, 1e-310])
def test_gradients_may_underflow(dtype, scale):
    layer, y = iz.InvertibleResidual(trained(Net(dtype=dtype))), torch.randn(4, 3, dtype=dtype, requires_grad=True)
    v = (scale * torch.randn(4, 3, dtype=torch.float64)).to(dtype)
    (got,) = torch.autograd.grad(layer.inv(y), y, v)
    assert got.isfinite().all()


def test_acceleration_saves_evaluations():
    calls = []
    net = trained(Net(16, 0.97, 64))
    net.register_forward_hook(lambda *_: calls.append(1))
    layer, x = iz.InvertibleResidual(net), torch.randn(8, 16, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        calls.clear()
        layer.inverse(y)
        accelerated = len(calls)
        z = y
        while (layer(z) - y).abs().max() > 1e-14:
            z = y - net(z)
            calls.append(1)
    assert 2 * accelerated < len(calls) - accelerated


def test_tolerances():
    assert block().tolerance_for(torch.float32) == 8 * torch.finfo(torch.float32).eps
    assert block().tolerance_for(torch.bfloat16) == 2 * torch.finfo(torch.bfloat16).eps
    assert block(tolerance=0.1).tolerance_for(torch.float32) == 0.1


def test_a_constant_branch_has_a_log_det_of_zero():
    layer, x = iz.InvertibleResidual(torch.ones_like), torch.randn(4, 3, requires_grad=True)
    y, log_det = layer.forward_and_log_det(x)
    assert_close((y, log_det), (x + 1, torch.zeros(4)))
    assert_close(layer.inverse(y), x)


def test_samples_do_not_see_each_other():
    layer = block()
    y = torch.randn(4, 3, dtype=torch.float64) * torch.tensor([[1e-6], [1.0], [1e6], [0.0]])
    assert_close(layer.inverse(y), torch.cat([layer.inverse(row) for row in y.split(1)]), rtol=1e-12, atol=1e-14)
    broken = torch.cat((y, torch.full((1, 3), math.nan), torch.full((1, 3), math.inf)))
    assert_close(layer.inverse(broken)[:4], layer.inverse(y), rtol=1e-12, atol=1e-14)
    assert layer.inverse(broken)[4].isnan().all()


@pytest.mark.parametrize("mode", iz.Mode)
def test_a_third_derivative_of_the_inverse_is_refused(mode):
    layer, y = block(mode=mode), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer.inv(y).square().sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="Expected at most two derivatives of an iterative inverse; got a third"):
        torch.autograd.grad(second.sum(), y)


@pytest.mark.parametrize("mode", iz.Mode)
def test_a_backward_through_the_inverse_replays_it_once(mode):
    layer, y, calls = block(mode=mode), torch.randn(2, 3, dtype=torch.float64, requires_grad=True), []
    layer.f.register_forward_pre_hook(lambda *_: calls.append(1))
    x = layer.inv(y)
    forward = len(calls)
    layer.f._forward_pre_hooks.clear()
    evaluate, replayed = layer.f.forward, []
    layer.f.forward = lambda *args, **side: (replayed.append(1), evaluate(*args, **side))[1]
    x.sum().backward()
    assert forward > 4
    # Where it inverts, f takes it back, and two evaluations give its derivatives: the solution is known.
    assert len(replayed) == {"store": 0, "recompute": forward, "invert": 3}[mode]


# Log-determinants


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3)])
def test_exact_log_det_of_other_shapes(shape):
    layer = iz.InvertibleResidual(lambda x: 0.5 * torch.sin(x + x.sum(-1, keepdim=x.ndim > 1) / 4))
    layer = iz.InvertibleResidual(lambda x: 0.5 * torch.sin(x)) if len(shape) == 1 else layer
    x = torch.randn(shape, dtype=torch.float64)
    expected = [torch.linalg.slogdet(jacobian(layer.function, sample)).logabsdet for sample in x]
    assert_close(layer.log_det(x), torch.stack(expected))


@pytest.mark.parametrize("estimator", ["series", "roulette"])
def test_estimates_have_the_right_mean(estimator):
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    matrix = q * torch.linspace(0.1, 0.7, 6, dtype=torch.float64) @ q.mT
    options = {"terms": 30} if estimator == "series" else {"terms": 2}
    layer = iz.InvertibleResidual(lambda x: x @ matrix, log_det=estimator, **options)
    estimates = torch.stack([layer.log_det(torch.zeros(64, 6, dtype=torch.float64)) for _ in range(400)]).mean(1)
    expected = torch.linalg.slogdet(torch.eye(6, dtype=torch.float64) + matrix).logabsdet
    error = estimates.std() / len(estimates) ** 0.5
    assert error < 0.05
    assert abs(estimates.mean() - expected) < 4 * error


def test_each_sample_has_noise_of_its_own():
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    layer = iz.InvertibleResidual(lambda x: 0.5 * x @ q, log_det="series")
    assert len(layer.log_det(torch.zeros(16, 8, dtype=torch.float64)).unique()) > 8


@pytest.mark.parametrize("terms", [1, 2, 9])
def test_the_series_of_a_diagonal_is_that_of_the_logarithm(terms):
    # With a diagonal Jacobian the noise, whose square is 1, drops out.
    slopes = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64)
    layer = iz.InvertibleResidual(lambda x: slopes * x, log_det="series", terms=terms)
    expected = sum(-((-slopes) ** k) / k for k in range(1, terms + 1)).sum()
    assert_close(layer.log_det(torch.zeros(2, 3, dtype=torch.float64)), expected.expand(2))


def test_the_roulette_weighs_a_term_by_its_probability():
    torch.manual_seed(0)
    drawn = torch.zeros(8, dtype=torch.float64)
    layer = iz.InvertibleResidual(lambda x: 0.0 * x + x / 2, log_det="roulette", terms=2, stop=0.4)
    for _ in range(4000):
        products = []
        layer._estimate("roulette", lambda v, products=products: products.append(v) or v, torch.ones(1, 1))
        drawn[: len(products)] += 1
    chance = torch.tensor([1, 1, *(0.6**k for k in range(1, 7))], dtype=torch.float64)
    assert_close(drawn / 4000, chance, rtol=0, atol=0.03)
    coefficients = torch.tensor(series_coefficients(8, 2, 0.6), dtype=torch.float64)
    plain = torch.tensor([(-1) ** (k + 1) / k for k in range(1, 9)], dtype=torch.float64)
    assert_close(coefficients * chance, plain)


def test_the_default_is_exact_for_few_values_and_random_for_many():
    few, many = torch.randn(2, 4, 8), torch.randn(2, 3, 11)
    layer = iz.InvertibleResidual(lambda x: torch.sin(x) / 2)
    assert torch.equal(layer.log_det(few), layer.log_det(few))
    q = torch.linalg.qr(torch.randn(11, 11))[0]
    layer = iz.InvertibleResidual(lambda x: torch.sin(x @ q) / 2)
    assert not torch.equal(layer.log_det(many), layer.log_det(many))
    torch.manual_seed(1)
    first = layer.log_det(many)
    torch.manual_seed(1)
    assert torch.equal(layer.log_det(many), first)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", iz.Mode)
def test_gradients_of_the_log_det_are_per_sample(estimator, mode):
    layer = block(log_det=estimator, mode=mode)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    _, log_det = layer.forward_and_log_det(x)
    (got,) = torch.autograd.grad(log_det[1], x)
    assert got[1].abs().sum() > 0
    assert torch.equal(got[[0, 2, 3]], torch.zeros(3, 3, dtype=torch.float64))
    if estimator == "exact":
        alone = x[1:2].detach().requires_grad_()
        expected = torch.autograd.grad(reference_graph(layer, alone), alone)[0]
        assert_close(got[1:2], expected)


def reference_graph(layer, x):
    jacobian = torch.autograd.functional.jacobian(lambda x: layer.function(x)[0], x, create_graph=True)
    return torch.linalg.slogdet(jacobian[:, 0]).logabsdet


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_log_det_needs_no_gradient_and_calls_no_hooks_of_the_input(estimator):
    layer, x, seen = block(log_det=estimator), torch.randn(4, 3, dtype=torch.float64, requires_grad=True), []
    with torch.no_grad():
        y, log_det = layer.forward_and_log_det(x)
        assert not any(t.requires_grad for t in (y, log_det, *layer.inverse_and_log_det(y)))
    x.register_hook(seen.append)
    y, log_det = layer.forward_and_log_det(x)
    assert not seen
    (y.sum() + log_det.sum()).backward()
    assert len(seen) == 1


@pytest.mark.parametrize("mode", iz.Mode)
@pytest.mark.parametrize("estimator", ["exact", "series"])
def test_power_iterations_move_once_a_step(mode, estimator):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        net[0], net[2] = spectral_norm(net[0]), spectral_norm(net[2])
        layer = iz.InvertibleResidual(lambda x: 0.8 * net(x), log_det=estimator, mode=mode)
        layer.add_module("net", net)
        return layer, net

    (layer, net), (_, plain) = make(), make()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y, log_det = layer.forward_and_log_det(x)
    (y.sum() + log_det.sum()).backward()
    plain(x)
    assert_close(dict(net.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision_has_a_log_det_in_float32(dtype, estimator):
    layer, x = block(log_det=estimator).to(dtype), torch.randn(4, 3, dtype=dtype)
    torch.manual_seed(1)
    y, log_det = layer.forward_and_log_det(x)
    assert (y.dtype, log_det.dtype) == (dtype, torch.float32)
    torch.manual_seed(1)
    assert_close(log_det, copy.deepcopy(layer).double().log_det(x.double()).float(), rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("call", ["forward", "forward_and_log_det", "inverse"])
def test_compiled(call):
    layer, x = block(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def outcome(run):
        values = iz.engine.tuple_of(run(x))
        return *values, *torch.autograd.grad(sum(v.square().sum() for v in values), [x, *layer.parameters()])

    torch.compiler.reset()
    torch.compiler.reset()  # layers share the code of these methods, and its limit of recompilations
    compiled = torch.compile(getattr(layer, call), backend="aot_eager", fullgraph=call == "forward")
    assert_close(outcome(compiled), outcome(getattr(layer, call)))


def test_products_of_the_pieces():
    jacobian = torch.randn(2, 3, 3, dtype=torch.float64) / 5

    def product(v):
        return (v.unsqueeze(1) @ jacobian).squeeze(1)

    x, noise = torch.zeros(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    expected = torch.linalg.slogdet(torch.eye(3, dtype=torch.float64) + jacobian).logabsdet
    assert_close(exact_log_det(product, x), expected)
    terms = [torch.einsum("bi,bij,bj->b", noise, torch.linalg.matrix_power(jacobian, k), noise) for k in (1, 2)]
    assert_close(power_series(product, noise, [2.0, -3.0]), 2 * terms[0] - 3 * terms[1])


@pytest.mark.parametrize("f", [lambda x: 1.5 * x.abs().roll(1, -1), lambda x: torch.rand_like(x) / 2])
def test_no_contraction(f):
    layer = iz.InvertibleResidual(f, max_iterations=50)
    message = r"InvertibleResidual: Expected iteration to come to .* within 50 steps; got .*Is the Lipschitz"
    with pytest.raises(RuntimeError, match=message):
        layer.inverse(torch.randn(3, 3, dtype=torch.float64))


def test_repr():
    text = "log_det='series', terms=5, solve=True"
    assert block(log_det="series", terms=5, solve=True).extra_repr() == text
    assert block().extra_repr() == ""
