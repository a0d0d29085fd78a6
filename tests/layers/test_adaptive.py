"""Layers with a learned curve for each feature: what they share, and PReLU, SinhArcsinh and Snake by hand."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from invzoo.layers.activations.adaptive import InvertiblePReLU, SinhArcsinh, Snake
from invzoo.layers.elementwise_map import PerFeatureMap
from invzoo.layers.monotone.monotone import BernsteinPolynomial, SumOfSquares, UnconstrainedMonotonic
from invzoo.layers.monotone.spline import RationalQuadraticSpline
from tests.layers.helpers import perturbed

LAYERS: dict[str, Callable[..., PerFeatureMap]] = {
    "prelu": InvertiblePReLU,
    "sinh_arcsinh": SinhArcsinh,
    "snake": Snake,
    "spline": lambda *args, **options: RationalQuadraticSpline(*args, bins=4, **options),
    "net": lambda *args, **options: UnconstrainedMonotonic(*args, hidden=2, **options),
    "squares": lambda *args, **options: SumOfSquares(*args, degree=2, **options),
    "bernstein": lambda *args, **options: BernsteinPolynomial(*args, degree=4, **options),
}
every = pytest.mark.parametrize("name", LAYERS)


def build(name: str, features: int = 3, dtype: torch.dtype = torch.float64, **options: object) -> PerFeatureMap:
    return perturbed(LAYERS[name](features, dim=1, dtype=dtype, **options), 0.5)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape, dtype=dtype)).requires_grad_()


# ---- what they share ------------------------------------------------------------------------------------------------


@every
def test_conditioners_of_zeros_change_nothing_and_pixels_have_their_own_parameters(name: str) -> None:
    plain, x = build(name), inputs(2, 3, 4, 5)
    n = plain.weight.numel()
    layer = copy.deepcopy(plain)
    layer.conditioner = lambda context: context
    assert_close(layer(x, context=torch.zeros(2, n, dtype=torch.float64)), plain(x))
    given = torch.randn(2, n, 4, 5, dtype=torch.float64)
    y = layer.function(x, context=given)
    assert_close(y[:, :, 1:2, 3:4], layer.function(x[:, :, 1:2, 3:4], context=given[:, :, 1, 3]))
    assert_close(layer.inverse(y, context=given), x, rtol=1e-12, atol=1e-12)
    assert not torch.equal(y, plain(x))


@every
def test_features_may_be_in_any_dim_but_the_first(name: str) -> None:
    layer, x = build(name), inputs(2, 3, 4, 5)
    last = LAYERS[name](3, dim=-1, dtype=torch.float64)
    last.load_state_dict(layer.state_dict())
    assert_close(last(x.movedim(1, -1)).movedim(-1, 1), layer(x))
    assert list(layer.state_dict()) == ["weight"]
    layer.conditioner = last.conditioner = lambda context: context
    given = torch.randn(2, layer.weight.numel(), dtype=torch.float64)
    assert_close(last(x.movedim(1, -1), context=given).movedim(-1, 1), layer(x, context=given))


@every
def test_the_start_is_close_to_the_identity(name: str) -> None:
    layer, x = LAYERS[name](3, dtype=torch.float64), inputs(20, 3)
    expected = {"prelu": F.leaky_relu(x, 0.25), "snake": x + x.sin().square() / 2}.get(name, x)
    assert_close(layer(x), expected, rtol=0, atol=0.5 if name == "squares" else 1e-12)


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_prelu_by_hand() -> None:
    layer = InvertiblePReLU(2, 0.5, dtype=torch.float64)
    x = torch.tensor([[-4.0, 3.0], [0.0, -1.0]], dtype=torch.float64)
    assert_close(layer(x), torch.tensor([[-2.0, 3.0], [0.0, -0.5]], dtype=torch.float64))
    assert_close(layer.log_det(x), torch.tensor([0.5, 0.25], dtype=torch.float64).log())
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[100.0, 0.0], [0.0, -100.0]]))  # far beyond the bound of 2
    assert_close(layer(x), torch.tensor([[-4.0, 3.0], [0.0, -math.exp(-2)]], dtype=torch.float64))
    assert_close(layer(-x), torch.tensor([[4 * math.exp(2), -3 * math.exp(-2)], [0.0, 1.0]], dtype=torch.float64))


def test_sinh_arcsinh_by_hand() -> None:
    layer, x = build("sinh_arcsinh", 2), inputs(5, 2)
    skew, tail = layer.weight.detach()[0].tanh(), 0.5 * (2 * layer.weight.detach()[1]).tanh()
    assert_close(layer(x), ((x + (x**2 + 1).sqrt()).log() * tail.exp() + skew).sinh())


def test_snake_by_hand_has_slopes_between_a_half_and_three_halves() -> None:
    layer, x = build("snake", 2), inputs(1000, 2)
    a = (2 * (layer.weight.detach()[0] / 2).tanh()).exp()
    assert_close(layer(x), x + (a * x).sin() ** 2 / (2 * a))
    slopes = torch.autograd.grad(layer.function(x).sum(), x)[0]
    assert 0.5 <= slopes.min() < 0.51
    assert 1.49 < slopes.max() <= 1.5
