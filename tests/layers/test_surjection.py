"""Surjections: their terms against the densities by hand, and their bounds against likelihoods that are known."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Beta, Distribution, Independent, MultivariateNormal, Normal

import invzoo as iz
from invzoo.layers.surjections.surjection import Surjection
from tests.layers.helpers import close, refused


class Gaussian(nn.Module):
    """Noise with a mean and a scale that depend on the rest, and on a context if there is one; with dropout."""

    def __init__(self, inputs: int, outputs: int, context: int = 0, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs + context, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 2 * outputs)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        loc, log_scale = self.net(x if context is None else torch.cat((x, context), 1)).chunk(2, 1)
        return Independent(Normal(loc, log_scale.tanh().exp()), 1)


class Coin(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.net = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Distribution:
        return Bernoulli(logits=self.net(x))


class Squashed(nn.Module):
    """Noise in (0, 1) that depends on the integers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.net = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Distribution:
        shape = self.net(x.double() / 8).exp()
        return Beta(shape + 1, 2 * torch.ones_like(shape))


# A layer, the shape of an input, and that of its output.
CASES: dict[str, tuple[Callable[[], Surjection], tuple[int, ...], tuple[int, ...]]] = {
    "slice": (lambda: iz.Slice(2), (3, 5), (3, 3)),
    "slice-pixels": (lambda: iz.Slice(1, -1), (3, 2, 4), (3, 2, 3)),
    "slice-net": (lambda: iz.Slice(2, distribution=Gaussian(3, 2)).double(), (3, 5), (3, 3)),
    "augment": (lambda: iz.Augment(2), (3, 4), (3, 6)),
    "augment-net": (lambda: iz.Augment(2, distribution=Gaussian(4, 2)).double(), (3, 4), (3, 6)),
    "abs": (iz.Abs, (3, 4), (3, 4)),
    "abs-net": (lambda: iz.Abs(distribution=Coin(4)).double(), (3, 4), (3, 4)),
}
every = pytest.mark.parametrize("name", CASES)
kinds = pytest.mark.parametrize("kind", ["store", "recompute", "invert"])


def case(name: str) -> tuple[Surjection, Tensor]:
    return CASES[name][0](), torch.randn(CASES[name][1], dtype=torch.float64)


def draw(function: Callable[[], Any]) -> Any:
    torch.manual_seed(5)
    return function()


# ---- every surjection -----------------------------------------------------------------------------------------------


@every
def test_one_direction_undoes_the_other(name: str) -> None:
    layer, x = case(name)
    before, y = x.clone(), layer(x)
    assert y.shape == CASES[name][2]
    assert y.dtype == x.dtype
    if layer.draws:
        assert torch.equal(layer.inverse(y), x)
        assert not torch.equal(layer(x), y)
    else:
        back = layer.inverse(y)
        assert torch.equal(layer(back), y)
        assert not torch.equal(back, x)
    assert torch.equal(x, before)
    assert layer.codomain.check(y.detach()).all()
    assert not layer.bijective
    assert not layer.volume_preserving


@every
def test_terms_of_both_directions_are_one_and_its_negative(name: str) -> None:
    layer, x = case(name)
    layer.eval()
    if layer.draws:
        y, log_det = layer.forward_and_log_det(x)
        back, inverse_log_det = layer.inverse_and_log_det(y)
        assert torch.equal(back, x)
    else:
        back, inverse_log_det = layer.inverse_and_log_det(x.abs() if isinstance(layer, iz.Abs) else layer(x))
        y, log_det = layer.forward_and_log_det(back)
    close(log_det, -inverse_log_det)
    assert log_det.shape == (3,)


@every
def test_a_draw_and_its_term_share_one_run_of_the_net(name: str) -> None:
    layer, x = case(name)
    runs = list[int]()
    if isinstance(layer.distribution, nn.Module):
        layer.distribution.register_forward_hook(lambda *_: runs.append(1))
        layer.forward_and_log_det(x)
        layer.inverse_and_log_det(layer(x))
        assert len(runs) == (3 if layer.draws else 2)


@every
def test_draws_are_those_of_the_global_generator(name: str) -> None:
    layer, x = case(name)
    f = layer if layer.draws else lambda y: layer.inverse(layer(y).abs())
    assert torch.equal(draw(lambda: f(x)), draw(lambda: f(x)))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    layer, x = case(name)
    layer, x = layer.to(dtype), x.to(dtype)
    for call in (layer, layer.inv):
        x, log_det = call.forward_and_log_det(x)
        assert x.dtype == dtype
        assert log_det.dtype == torch.float32 or name.endswith("net")
        assert log_det.shape == (3,)
        assert log_det.isfinite().all()


@pytest.mark.slow
@every
def test_compiles(name: str) -> None:
    layer, x = case(name)
    torch.compiler.reset()
    if name in ("slice", "augment", "abs"):
        f = torch.compile(lambda x: layer.inverse(layer.function(x)), backend="eager", fullgraph=True)
        assert f(x).shape == x.shape


# ---- Slice and Augment ----------------------------------------------------------------------------------------------


def test_the_term_of_slice_is_the_density_of_what_it_drops() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    y, log_det = iz.Slice(2).forward_and_log_det(x)
    assert torch.equal(y, x[:, :3])
    close(log_det, Normal(0, 1).log_prob(x[:, 3:]).sum(1))
    noise = Gaussian(3, 2, dropout=0).double()
    close(iz.Slice(2, distribution=noise).log_det(x), noise(x[:, :3]).log_prob(x[:, 3:]))


def test_the_term_of_augment_is_minus_the_density_of_what_it_draws() -> None:
    x, noise = torch.randn(3, 4, dtype=torch.float64), Gaussian(4, 2, dropout=0).double()
    y, log_det = iz.Augment(2, distribution=noise).forward_and_log_det(x)
    assert torch.equal(y[:, :4], x)
    close(log_det, -noise(x).log_prob(y[:, 4:]))


def test_slice_and_augment_undo_each_other() -> None:
    """Augment and drop: the terms are those of the noise, so that they cancel."""
    noise = Gaussian(3, 2, dropout=0).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    y, log_det = iz.Augment(2, distribution=noise).forward_and_log_det(x)
    back, other = iz.Slice(2, distribution=noise).forward_and_log_det(y)
    assert torch.equal(back, x)
    close(log_det + other, torch.zeros(3, dtype=torch.float64))


def test_a_sliced_gaussian_has_its_likelihood() -> None:
    covariance = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    x = torch.randn(50, 2, dtype=torch.float64)
    layer = iz.Slice(1, distribution=lambda left: Normal(0.3 * left, math.sqrt(1 - 0.18)))
    y, log_det = layer.forward_and_log_det(x)
    bound = Normal(0.0, math.sqrt(2)).log_prob(y[:, 0]) + log_det
    close(bound, MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance).log_prob(x), 1e-6)


def test_augmentation_bounds_the_likelihood_and_reaches_it_with_the_posterior() -> None:
    """Joint N(0, [[2, .6], [.6, 1]]) of (x, e): with q(e | x) = p(e | x) every draw gives log p(x)."""
    covariance = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    joint = MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).repeat(2000).unsqueeze(1)
    likelihood = Normal(0.0, math.sqrt(2)).log_prob(x[:, 0])

    def bound(noise: Callable[[Tensor], Distribution]) -> Tensor:
        y, log_det = iz.Augment(1, distribution=noise).forward_and_log_det(x)
        return joint.log_prob(y) + log_det

    close(bound(lambda x: Normal(0.3 * x, math.sqrt(1 - 0.18))), likelihood, 1e-6)
    gap = (likelihood - bound(lambda x: Normal(torch.zeros_like(x), 1.2))).reshape(-1, 7).mean(0)
    posterior = Normal(0.3 * x[:7, 0], math.sqrt(1 - 0.18))
    expected = torch.distributions.kl_divergence(Normal(torch.zeros(7, dtype=torch.float64), 1.2), posterior)
    assert (gap > 0).all()
    torch.testing.assert_close(gap, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("layer", [iz.Slice, iz.Augment])
def test_a_context_reaches_the_distribution(layer: type[Any]) -> None:
    noise = Gaussian(3, 2, context=4, dropout=0).double()
    context = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5 if layer is iz.Slice else 3, dtype=torch.float64)
    surjection = layer(2, distribution=noise)
    y, log_det = surjection.forward_and_log_det(x, context=context)
    whole = x if layer is iz.Slice else y
    close(log_det.abs(), noise(whole[:, :3], context).log_prob(whole[:, 3:]).abs())
    assert torch.autograd.grad(log_det.sum(), context)[0].abs().sum() > 0
    net = iz.InvertibleSequential(surjection)
    close(draw(lambda: net(x, context=context)), draw(lambda: surjection(x, context=context)))


def test_distributions_over_events_and_of_single_values() -> None:
    x = torch.randn(3, 2, 4)
    y = torch.cat((x, x[..., :2]), -1)
    for noise in (
        lambda x: Normal(0.0, 1.0),
        lambda x: Normal(torch.zeros(2, 2), 1.0),
        lambda x: Independent(Normal(torch.zeros(2), 1.0), 1),
        lambda x: Independent(Normal(torch.zeros(3, 2, 2), 1.0), 2),
        lambda x: MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ):
        expected = Normal(0.0, 1.0).log_prob(y[..., 4:]).sum((1, 2))
        torch.testing.assert_close(iz.Slice(2, -1, distribution=noise).log_det(y), expected)
        assert iz.Augment(2, -1, distribution=noise)(x).shape == y.shape


@pytest.mark.parametrize(
    ("noise", "got"),
    [
        (lambda x: Normal(torch.zeros(3), 1.0), "batch shape (3,) and event shape ()"),
        (lambda x: MultivariateNormal(torch.zeros(3), torch.eye(3)), "batch shape () and event shape (3,)"),
        (lambda x: Independent(Normal(torch.zeros(5, 2), 1.0), 2), "batch shape () and event shape (5, 2)"),
        (lambda x: Normal(torch.zeros(1, 5, 2), 1.0), "batch shape (1, 5, 2) and event shape ()"),
    ],
)
def test_distributions_of_other_shapes_are_refused(noise: Callable[..., Distribution], got: str) -> None:
    with refused(f"Augment: Expected distribution to return one of values of shape (5, 2); got {got}"):
        iz.Augment(2, distribution=noise)(torch.zeros(5, 3))


# ---- Abs ------------------------------------------------------------------------------------------------------------


def test_zero_counts_as_minus() -> None:
    biased = iz.Abs(distribution=lambda y: Bernoulli(torch.tensor(0.25)))
    close(biased.log_det(torch.tensor([[0.0], [-0.0], [-1.0]])), torch.full((3,), math.log(0.75)), 1e-6)
    close(biased.log_det(torch.tensor([[1e-30]])), torch.tensor([math.log(0.25)]), 1e-6)


def test_abs_counts_signs() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]])
    close(iz.Abs().log_det(x), torch.tensor([-3 * math.log(2)]), 1e-6)
    biased = iz.Abs(distribution=lambda y: Bernoulli(torch.tensor(0.25)))
    close(biased.log_det(x), torch.tensor([2 * math.log(0.25) + math.log(0.75)]), 1e-6)
    assert (biased.inverse(torch.ones(10000, 1)) > 0).float().mean().sub(0.25).abs() < 0.02


def test_a_folded_gaussian_has_its_likelihood() -> None:
    x = torch.randn(20, 1, dtype=torch.float64)
    y, log_det = iz.Abs().forward_and_log_det(x)
    close(torch.distributions.HalfNormal(1.0).log_prob(y[:, 0]) + log_det, Normal(0.0, 1.0).log_prob(x[:, 0]))


# ---- Dequantize -----------------------------------------------------------------------------------------------------


def test_a_net_gets_integers_as_numbers_that_it_can_take() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Distribution:
            return Beta(self.linear(x).exp() + 1, 2.0)

    y = iz.Dequantize(8, distribution=Net())(torch.randint(8, (4, 3)))
    assert y.shape == (4, 3)


@pytest.mark.parametrize("levels", [1, 2, 3, 7, 49, 255, 256, 1000, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 2**-24, 0.5, 1 - 2**-24, 1.0])
def test_floors_give_the_levels_back_whatever_the_noise(levels: int, dtype: torch.dtype, noise: float) -> None:
    layer = iz.Dequantize(levels, distribution=lambda x: _Constant(x, noise), dtype=torch.int32)
    x = torch.arange(levels).unsqueeze(0)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(layer.inverse(y), x.int())
    assert (y >= 0).all()
    assert (y < 1).all()


class _Constant(Distribution):
    has_rsample = True
    arg_constraints: ClassVar[dict] = {}

    def __init__(self, like: Tensor, value: float) -> None:
        super().__init__(like.shape)
        self.value = torch.full_like(like, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.value


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_dequantize_takes_integers_of_any_dtype(dtype: torch.dtype) -> None:
    x = torch.randint(256, (4, 3, 8, 8)).to(dtype)
    layer = iz.Dequantize()
    y, log_det = layer.forward_and_log_det(x)
    assert y.dtype == torch.float32
    assert torch.equal(layer.inverse(y), x.to(torch.uint8))
    close(log_det, torch.full((4,), -192 * math.log(256)))
    back, log_det = layer.inverse_and_log_det(y)
    assert torch.equal(back, x.to(torch.uint8))
    close(log_det, torch.full((4,), 192 * math.log(256)))
    assert layer(x[:0]).shape == (0, 3, 8, 8)


def test_the_noise_is_uniform() -> None:
    y = iz.Dequantize(4)(torch.full((100000, 1), 2))
    edges = torch.histc(y * 4 - 2, 10, 0, 1) / len(y)
    torch.testing.assert_close(edges, torch.full((10,), 0.1), rtol=0, atol=0.01)


def test_samples_outside_the_unit_interval_go_to_the_nearest_level() -> None:
    y = torch.tensor([[-0.3, 0.0, 0.26, 1.0, 7.0]])
    assert iz.Dequantize(4).inverse(y).tolist() == [[0, 0, 1, 3, 3]]


@kinds
def test_variational_dequantization_trains(kind: str) -> None:
    layer = iz.Dequantize(8, distribution=Squashed(4).double(), mode=kind, check="always")
    x = torch.randint(8, (5, 4))
    with iz.mode(layer, kind):
        y, log_det = draw(lambda: layer.forward_and_log_det(x))
        gradients = torch.autograd.grad(y.cos().sum() + log_det.sum(), [*layer.parameters()])
    noise = layer.distribution(x)
    close(log_det, -noise.log_prob(y * 8 - x).sum(1) - 4 * math.log(8), 1e-6)
    u = draw(noise.rsample)
    loss = ((x + u) / 8).cos().sum() - noise.log_prob(u).sum()
    for actual, expected in zip(gradients, torch.autograd.grad(loss, [*layer.parameters()])):
        close(actual, expected, 1e-9)


def test_dequantization_bounds_the_likelihood() -> None:
    """A density that is constant on each level: the bound is tight with uniform noise."""
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    x = torch.arange(4).unsqueeze(1)
    layer = iz.Dequantize(4)
    y, log_det = layer.forward_and_log_det(x.double())
    density = (4 * probabilities)[(y * 4).long()][:, 0]
    close(density.log() + log_det, probabilities.log())


# ---- flows ----------------------------------------------------------------------------------------------------------


def test_a_flow_of_surjections_trains_alike_in_every_mode() -> None:
    def run(value: str) -> list[Tensor]:
        torch.manual_seed(0)
        net = iz.InvertibleSequential(
            iz.Dequantize(8),
            iz.Augment(2, distribution=Gaussian(4, 2)),
            iz.AffineCoupling(nn.Linear(3, 6), nn.Linear(3, 6)),
            iz.Abs(distribution=Coin(6)),
            iz.InvertibleLinear(6),
            iz.Slice(3, distribution=Gaussian(3, 3)),
        )
        net.mode = value
        z, log_det = net.forward_and_log_det(torch.randint(8, (16, 4)))
        loss = -(Normal(0.0, 1.0).log_prob(z).sum(1) + log_det).mean()
        return [loss, *torch.autograd.grad(loss, [*net.parameters()])]

    expected = run("store")
    for value in ("recompute", "invert"):
        for actual, wanted in zip(run(value), expected):
            close(actual, wanted, 1e-4)
