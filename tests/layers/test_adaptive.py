"""Layers with a learned curve for each feature: what they share, and PReLU, SinhArcsinh and Snake by hand."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from invzoo.containers import InvertibleSequential
from invzoo.layers.activations.adaptive import InvertiblePReLU, SinhArcsinh, Snake
from invzoo.layers.elementwise_map import PerFeatureMap
from invzoo.layers.monotone.monotone import BernsteinPolynomial, SumOfSquares, UnconstrainedMonotonic
from tests.layers.helpers import perturbed

LAYERS: dict[str, Callable[..., PerFeatureMap]] = {
    "prelu": InvertiblePReLU,
    "sinh_arcsinh": SinhArcsinh,
    "snake": Snake,
    "net": lambda *args, **options: UnconstrainedMonotonic(*args, hidden=2, **options),
    "squares": lambda *args, **options: SumOfSquares(*args, degree=2, **options),
    "bernstein": lambda *args, **options: BernsteinPolynomial(*args, degree=4, **options),
}
every = pytest.mark.parametrize("name", LAYERS)
directions = pytest.mark.parametrize("direction", ["function", "inverse"])


def build(name: str, features: int = 3, dtype: torch.dtype = torch.float64, **options: object) -> PerFeatureMap:
    return perturbed(LAYERS[name](features, dim=1, dtype=dtype, **options), 0.5)


def conditioned(name: str, features: int = 3) -> PerFeatureMap:
    size = build(name, features).weight.numel()
    return build(name, features, conditioner=nn.Linear(2, size).double())


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_once(name: str, dtype: torch.dtype) -> None:
    layer, x = build(name, dtype=dtype), inputs(50, 3, dtype=dtype)
    y, log_det = layer.forward_and_log_det(x)
    wide = copy.deepcopy(layer).double()
    expected, expected_log_det = wide.forward_and_log_det(x.double())
    assert (y.dtype, log_det.dtype) == (dtype, torch.float32)
    assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert_close(log_det.double(), expected_log_det, rtol=1e-4, atol=1e-4)
    assert layer.inverse(y).dtype is dtype


@every
def test_sixteen_layers_come_back_in_float32(name: str) -> None:
    net = InvertibleSequential(*(build(name, dtype=torch.float32) for _ in range(16)))
    x = inputs(100, 3, dtype=torch.float32).div(3)
    assert_close(net.inverse(net(x)), x, rtol=0, atol=2e-3)


@every
def test_values_far_out(name: str) -> None:
    layer = build(name, dtype=torch.float32)
    x = torch.tensor([-1e6, -100.0, 0.0, 100.0, 1e6])[:, None].expand(5, 3).requires_grad_()
    y, log_det = layer.forward_and_log_det(x)
    gradient = torch.autograd.grad(log_det.sum() + y.sum(), x)[0]
    assert y.isfinite().all() and log_det.isfinite().all() and gradient.isfinite().all()  # noqa: PT018 - all three
    assert_close(layer.inverse(y), x, rtol=1e-4, atol=1e-4)


@every
def test_nan_passes_and_harms_no_other(name: str) -> None:
    layer = build(name)
    x = inputs(3, 3).detach()
    spoilt = x.index_fill(0, torch.tensor([1]), torch.nan)
    for f in (layer.function, layer.inverse):
        assert_close(f(spoilt)[::2], f(x)[::2], rtol=0, atol=0)
        assert f(spoilt)[1].isnan().all()


@every
def test_no_batch(name: str) -> None:
    layer = conditioned(name)
    x, context = torch.randn(0, 3, 2, dtype=torch.float64), torch.randn(0, 2, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x, context=context)
    assert (y.shape, log_det.shape) == (x.shape, (0,))
    assert layer.inverse(y, context=context).shape == x.shape


@every
@directions
def test_transforms_of_torch_func_and_compilation(name: str, direction: str) -> None:
    layer, x = build(name), inputs(4, 3).detach()
    f = getattr(layer, direction)
    assert_close(torch.func.vmap(lambda v: f(v[None])[0])(x), f(x))
    expected = x.clone().requires_grad_()
    f(expected).sum().backward()
    assert_close(torch.func.grad(lambda v: f(v).sum())(x), expected.grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prelu", "sinh_arcsinh", "net", "squares", "bernstein"])
def test_functions_compile_without_a_graph_break(name: str) -> None:
    layer, x = build(name), inputs(4, 3).detach()
    torch.compiler.reset()
    torch.compiler.reset()  # layers share the code of these methods, and its limit of recompilations
    assert_close(torch.compile(layer.function, backend="eager", fullgraph=True)(x), layer.function(x))


@every
def test_the_start_is_close_to_the_identity(name: str) -> None:
    layer, x = LAYERS[name](3, dtype=torch.float64), inputs(20, 3)
    expected = {"prelu": F.leaky_relu(x, 0.25), "snake": x + x.sin().square() / 2}.get(name, x)
    assert_close(layer(x), expected, rtol=0, atol=0.5 if name == "squares" else 1e-12)


@every
def test_bad_input_is_refused(name: str) -> None:
    layer, kind = build(name), type(build(name)).__name__
    for call, argument in ((layer, "x"), (layer.inverse, "y")):
        with pytest.raises(
            ValueError, match=rf"^{kind}: Expected {argument} to have size 3 in dim 1; got shape \(2, 4\)$"
        ):
            call(torch.zeros(2, 4, dtype=torch.float64))
        with pytest.raises(
            TypeError, match=rf"^{kind}: Expected {argument} to be of the layer's dtype torch.float64; got"
        ):
            call(torch.zeros(2, 3))
        with pytest.raises(
            TypeError, match=rf"^{kind}: Expected {argument} to be real floating point; got torch.int64$"
        ):
            call(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"batch dim before dim -1, for a log-determinant; got shape \(3,\)$"):
        LAYERS[name](3, dim=-1).log_det(torch.zeros(3))


@every
def test_a_context_and_a_conditioner_belong_together(name: str) -> None:
    x = inputs(2, 3)
    with pytest.raises(TypeError, match=r"Expected side inputs among \[\]; got \['context'\]$"):
        build(name)(x, context=x)
    with pytest.raises(TypeError, match=r"Expected context to be what the conditioner takes; got None$"):
        conditioned(name)(x)
    layer = build(name, conditioner=lambda context: context)
    with pytest.raises(ValueError, match=r"Expected conditioner to return shape \(2, \d+\); got \(2, 1\)$"):
        layer(x, context=x[:, :1])
    with pytest.raises(TypeError, match=r"Expected conditioner to be a module or a function; got int$"):
        build(name, conditioner=3)


@every
def test_features_are_a_number(name: str) -> None:
    with pytest.raises(ValueError, match=r"Expected features to be at least 1; got 0$"):
        LAYERS[name](0)


@pytest.mark.parametrize(
    ("layer", "option", "value", "message"),
    [
        (InvertiblePReLU, "negative_slope", 0.1, "have abs(log) below max_log_slope=2.0; got 0.1"),
        (InvertiblePReLU, "negative_slope", -1, "be positive and finite; got -1"),
        (InvertiblePReLU, "max_log_slope", 0, "be positive and finite; got 0"),
        (SinhArcsinh, "max_skew", 0, "be positive and finite; got 0"),
        (SinhArcsinh, "max_log_tail", -1, "be positive and finite; got -1"),
        (Snake, "max_log_frequency", 0, "be positive and finite; got 0"),
    ],
)
def test_options_are_refused(layer: type[PerFeatureMap], option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        layer(3, **{option: value})
    assert str(error.value) == f"{layer.__name__}: Expected {option} to {message}"


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
