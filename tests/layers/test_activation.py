"""Activations: values, gradients and domains, against PyTorch's own and by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import constraints
from torch.testing import assert_close

import invzoo as iz
from invzoo.testing.inputs import bounds
from tests.layers.helpers import refused

# Layers, and PyTorch's own functions.
PAIRED = {
    "identity": (iz.Identity(), lambda x: x),
    "leaky_relu": (iz.InvertibleLeakyReLU(), F.leaky_relu),
    "leaky_relu_steep": (iz.InvertibleLeakyReLU(3), lambda x: F.leaky_relu(x, 3)),
    "sigmoid": (iz.InvertibleSigmoid(), torch.sigmoid),
    "logit": (iz.InvertibleLogit(), torch.logit),
    "sigmoid_eps": (iz.InvertibleSigmoid(0.1), lambda x: (torch.sigmoid(x) - 0.1) / 0.8),
    "logit_eps": (iz.InvertibleLogit(0.1), lambda x: torch.logit(0.1 + 0.8 * x)),
    "tanh": (iz.InvertibleTanh(), torch.tanh),
    "atanh": (iz.InvertibleAtanh(), torch.atanh),
    "softplus": (iz.InvertibleSoftplus(), F.softplus),
    "exp": (iz.InvertibleExp(), torch.exp),
    "log": (iz.InvertibleLog(), torch.log),
    "elu": (iz.InvertibleELU(), F.elu),
    "elu_half": (iz.InvertibleELU(0.5), lambda x: F.elu(x, 0.5)),
    "sneaky_relu": (iz.SneakyReLU(0.25), lambda x: (x + 0.6 * ((1 + x**2).sqrt() - 1)) / 1.6),
}
LAYERS = {name: layer for name, (layer, _) in PAIRED.items()}
# The layers that look at values, the method that does, and the interval.
CHECKED = {
    "sigmoid": ("inverse", 0, 1),
    "logit": ("function", 0, 1),
    "tanh": ("inverse", -1, 1),
    "atanh": ("function", -1, 1),
    "softplus": ("inverse", 0, math.inf),
    "exp": ("inverse", 0, math.inf),
    "log": ("function", 0, math.inf),
    "elu": ("inverse", -1, math.inf),
}
OTHER = {"function": "inverse", "inverse": "function"}
PAIRS = [("sigmoid", "logit"), ("tanh", "atanh"), ("exp", "log")]

every = pytest.mark.parametrize("name", LAYERS)
checked = pytest.mark.parametrize("name", CHECKED)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)

shapes = st.lists(st.integers(0, 4), max_size=4)


def inside(constraint: constraints.Constraint, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw values well inside a layer's domain or codomain, none of them close to 0."""
    if constraint is constraints.real:
        x = torch.randn(shape, dtype=dtype)
        return (x + x.sign() / 10).requires_grad_()
    low, high = bounds(constraint)
    if high is None:
        y = low + torch.randn(shape, dtype=dtype).exp()
        return (y + (y.abs() < 0.1) / 5).requires_grad_()
    return (low + (high - low) * (0.05 + 0.9 * torch.rand(shape, dtype=dtype))).requires_grad_()


# ---- every activation -----------------------------------------------------------------------------------------------


@every
@given(shape=shapes)
def test_value_and_gradient_are_pytorchs(name: str, shape: list[int]) -> None:
    layer, reference = PAIRED[name]
    x = inside(layer.domain, *shape)
    y, expected = layer(x), reference(x)
    assert_close(y, expected)
    cotangent = torch.randn_like(y)
    assert_close(*(torch.autograd.grad(out, x, cotangent)[0] for out in (y, expected)))
    assert_close(layer.inverse(y), x)
    if shape:
        assert layer.log_det(x).shape == (shape[0],)


# ---- log-determinants -----------------------------------------------------------------------------------------------


def test_log_det_of_identity_takes_several_inputs() -> None:
    assert torch.equal(iz.Identity().log_det(torch.ones(2, 3), torch.ones(2)), torch.zeros(2))


# ---- bad input ------------------------------------------------------------------------------------------------------


# ---- Identity -------------------------------------------------------------------------------------------------------


def test_identity_returns_what_it_gets() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.zeros(3, dtype=torch.long)
    layer = iz.Identity()
    assert layer(a) is a
    assert layer.inverse(b) is b
    assert all(got is given for got, given in zip(layer(a, b), (a, b), strict=True))
    assert all(got is given for got, given in zip(layer.inverse(a, b), (a, b), strict=True))
    assert layer.exact
    assert layer.volume_preserving


# ---- LeakyReLU ------------------------------------------------------------------------------------------------------


@given(x=st.floats(-1e30, 1e30), slope=st.floats(1e-3, 1e3))
def test_leaky_relu_by_hand(x: float, slope: float) -> None:
    layer, value = iz.InvertibleLeakyReLU(slope), torch.tensor(x, dtype=torch.float64)
    y = layer(value)
    assert y.item() == (x if x > 0 else x * slope)
    assert_close(layer.inverse(y), value, rtol=1e-15, atol=1e-320)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_leaky_relu_gradients_at_zero(zero: float) -> None:
    layer, x = iz.InvertibleLeakyReLU(0.25), torch.tensor(zero, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(layer(x), x)[0] == 0.25 == torch.autograd.grad(F.leaky_relu(x, 0.25), x)[0]
    assert torch.autograd.grad(layer.inverse(x), x)[0] == 4


def test_leaky_relu_keeps_the_slope_of_what_underflows() -> None:
    x = torch.tensor([-1e-45, 1e-45], requires_grad=True)
    y = iz.InvertibleLeakyReLU(check="never")(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([0.01, 1]))


# ---- SneakyReLU and ELU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("slope", [0.01, 0.5, 0.999])
def test_sneaky_relu_cancels_nothing(slope: float, dtype: torch.dtype) -> None:
    size = 10.0 ** torch.arange(-30, 17, dtype=dtype)
    layer, x = iz.SneakyReLU(slope), torch.cat((-size, torch.zeros(1, dtype=dtype), size))
    assert_close(layer.inverse(layer.function(x)), x, rtol=1000 * torch.finfo(dtype).eps, atol=0)


def test_sneaky_relu_is_smooth_where_its_inverse_changes_form() -> None:
    layer = iz.SneakyReLU(0.25)
    y = torch.tensor([-0.375, -0.375 - 1e-9, -0.375 + 1e-9, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(layer.inverse(y).sum(), y)[0].isfinite().all()
    assert gradcheck(layer.inverse, y)
    assert gradgradcheck(layer.inverse, y)


def test_sneaky_relu_has_gradients_where_the_form_that_is_not_taken_is_singular() -> None:
    y = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(iz.SneakyReLU(0.5).inverse(y).sum(), y)
    assert_close(gradient, iz.SneakyReLU(0.5).log_det(iz.SneakyReLU(0.5).inverse(y)).neg().exp())


def test_softplus_has_all_digits_far_out() -> None:
    x = torch.tensor([-700.0, -30.0, 0.0, 25.0, 30.0, 700.0], dtype=torch.float64, requires_grad=True)
    y = iz.InvertibleSoftplus().function(x)
    assert_close(y, torch.logaddexp(x, torch.zeros_like(x)), rtol=1e-15, atol=0)
    assert_close(iz.InvertibleSoftplus().inverse(y), x, rtol=1e-15, atol=1e-15)


# ---- saturating activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("squash", "stretch"), PAIRS)
def test_one_is_the_inverse_of_the_other(squash: str, stretch: str) -> None:
    there, back = LAYERS[squash], LAYERS[stretch]
    x, y = inside(there.domain, 50), inside(there.codomain, 50)
    assert torch.equal(there.function(x), back.inverse(x))
    assert torch.equal(there.inverse(y), back.function(y))
    assert back.domain is there.codomain


OUTSIDE = [
    (torch.float64, [0.5, -1.2, 1.3], "values from -1.2 to 1.3"),
    (torch.float32, [0.5, -1.2, 1.3], "values from -1.2 to 1.3"),
    (torch.float32, [0.5, 1 + 2**-23], "values from 0.5 to 1.0000001"),
    (torch.float64, [0.5, 1 + 2**-52], "values from 0.5 to 1.0000000000000002"),
    (torch.float32, [0.5, -1 - 2**-23], "values from -1.0000001 to 0.5"),
    (torch.bfloat16, [0.5, -2], "values from -2 to 0.5"),
    (torch.float16, [0.5, float("inf")], "values from 0.5 to inf"),
    (torch.float32, [0.5, float("-inf")], "values from -inf to 0.5"),
]


@pytest.mark.parametrize(
    ("name", "dtype", "values", "got"),
    [
        (name, *outside)
        for name, (_, low, high) in CHECKED.items()
        for outside in OUTSIDE
        if min(outside[1]) < low or max(outside[1]) > high
    ],
)
def test_values_outside_are_refused(name: str, dtype: torch.dtype, values: list[float], got: str) -> None:
    layer, (direction, low, high) = LAYERS[name], CHECKED[name]
    argument, called = ("y", layer.inv) if direction == "inverse" else ("x", layer)
    for call in (getattr(layer, direction), called):
        with refused(f"{type(layer).__name__}: Expected {argument} to have values in [{low}, {high}]; got {got}"):
            call(torch.tensor(values, dtype=dtype, requires_grad=True))


@pytest.mark.parametrize("name", ["sigmoid", "logit", "exp", "log"])
def test_slightly_negative_values_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"got values from -1e-40 to 0.5$"):
        getattr(LAYERS[name], CHECKED[name][0])(torch.tensor([0.5, -1e-40], dtype=torch.float64))


@checked
@dtypes
def test_the_bounds_go_to_infinity_and_come_back(name: str, dtype: torch.dtype) -> None:
    layer, (direction, *ends) = LAYERS[name], CHECKED[name]
    ends = torch.tensor(ends, dtype=dtype)
    stretched = getattr(layer, direction)(ends)
    assert torch.equal(stretched, torch.tensor([-torch.inf, torch.inf], dtype=dtype))
    assert torch.equal(getattr(layer, OTHER[direction])(stretched), ends)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
@dtypes
@given(x=st.lists(st.floats(-6e4, 6e4), max_size=5))
def test_no_output_is_refused_by_the_inverse(name: str, dtype: torch.dtype, x: list[float]) -> None:
    layer, x = LAYERS[name], torch.tensor(x, dtype=dtype)
    y = layer(x)
    assert torch.equal(layer(layer.inverse(y)).isnan(), torch.zeros_like(y, dtype=torch.bool))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_a_flow_trains_through_saturated_values(name: str) -> None:
    x = torch.tensor([[-1e4, -100.0, -0.3, 0.0, 0.7, 100.0, 1e4]], requires_grad=True)
    layers = [iz.InvertibleLeakyReLU(0.5), LAYERS[name], iz.InvertibleLeakyReLU(2.0)]
    grads = []
    for kind in ("invert", "store"):
        net = nn.Sequential(*copy.deepcopy(layers))
        with iz.mode(net, kind):
            grads.append(torch.autograd.grad(net(x).square().sum(), x)[0])
    assert torch.equal(*grads)
    assert grads[0].isfinite().all()
    assert grads[0].count_nonzero() >= 2


@pytest.mark.parametrize("name", [*CHECKED, "logit_eps"])
def test_where_values_cannot_be_read_they_give_nan(name: str) -> None:
    direction, low, high = CHECKED[name.removesuffix("_eps")]
    f, x = getattr(LAYERS[name], direction), torch.tensor([0.5, low - 0.2, min(high, 2.0) + 0.2])
    torch.compiler.reset()
    for run in (torch.func.vmap(f), torch.compile(f, backend="eager", fullgraph=True)):
        assert run(x).isnan().tolist() == [False, True, high < math.inf]


@checked
def test_a_trace_does_not_read_values(name: str) -> None:
    f, x = getattr(LAYERS[name], CHECKED[name][0]), torch.tensor([0.5, 0.25])
    with pytest.warns(
        (DeprecationWarning, FutureWarning), match=r"torch\.jit"
    ):  # and no TracerWarning, which would be an error
        traced = torch.jit.trace(lambda v: 1 * f(v), x, check_trace=False)  # the bare method would be refused
    assert_close(traced(x), f(x))


@pytest.mark.parametrize(("name", "reads"), [("logit", 1), ("atanh", 1), ("sigmoid", 0), ("tanh", 0)])
def test_training_reads_values_that_may_be_refused_once(name: str, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count, aminmax = [], Tensor.aminmax
    monkeypatch.setattr(Tensor, "aminmax", lambda self, **options: count.append(1) or aminmax(self, **options))
    y = LAYERS[name](inside(LAYERS[name].domain, 5))
    assert len(count) == reads
    y.sum().backward()
    assert len(count) == reads


@pytest.mark.parametrize("name", ["logit", "atanh"])
def test_values_and_gradients_are_accurate_near_the_bounds(name: str) -> None:
    near = 2.0 ** -torch.arange(2, 24, dtype=torch.float32)
    x = torch.cat((1 - near, near, 0.5 + near[2:], *([] if name == "logit" else [near - 1, -near])))
    results = []
    for dtype in (torch.float32, torch.float64):
        value = x.to(dtype).requires_grad_()
        y = LAYERS[name].function(value)
        results.append((y.detach().double(), torch.autograd.grad(y.sum(), value)[0].double()))
    (y, gradient), (expected_y, expected_gradient) = results
    assert_close(gradient, expected_gradient, rtol=3e-7, atol=0)  # torch.atanh's is off by 9e-5
    assert_close(y, expected_y, rtol=3e-7, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logit_has_digits_near_a_half(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5 - 2.0**-9, 0.5 + 2.0**-8], dtype=dtype)
    assert_close(iz.InvertibleLogit()(x).double(), torch.logit(x.double()), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("name", "limit"), [("sigmoid", 17.4), ("tanh", 9.1)])
def test_where_float32_saturates(name: str, limit: float) -> None:
    """The docstrings say where."""
    layer = LAYERS[name]
    assert layer(torch.tensor(limit)) == 1
    assert layer(torch.tensor(limit - 1)) < 1


# ---- eps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.25, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_eps_keeps_the_unit_interval_finite_and_brings_it_back(eps: float, dtype: torch.dtype) -> None:
    layer, end = iz.InvertibleLogit(eps), math.log(1 / eps - 1)
    x = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)
    y = layer(x)
    rtol = 2 * torch.finfo(dtype).eps
    assert_close(y, torch.tensor([-end, 0.0, end], dtype=dtype), rtol=rtol, atol=0)
    assert_close(layer.inverse(y), x, rtol=0, atol=rtol * (1 + end))
    log_det = math.log(1 - 2 * eps) - math.log(eps) - math.log1p(-eps)
    assert_close(layer.log_det(x[:1]).item(), log_det, rtol=1e-6, atol=0)


def test_eps_has_an_inverse_for_every_real_number() -> None:
    layer = iz.InvertibleLogit(0.25)  # of [-1/2, 3/2]
    y = torch.tensor([-math.inf, -100.0, 0.0, 100.0, math.inf])
    assert layer.inverse(y).tolist() == [-0.5, -0.5, 0.5, 1.5, 1.5]
    assert layer(torch.tensor([-0.5, 1.5])).tolist() == [-math.inf, math.inf]
    assert layer.domain.check(layer.inverse(y)).all()


@pytest.mark.parametrize("eps", [0.05, 0.3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sigmoid_with_eps_takes_its_own_outputs(eps: float, dtype: torch.dtype) -> None:
    layer = iz.InvertibleSigmoid(eps)
    back = layer.inverse(layer(torch.tensor([-1e4, 0.0, 1e4], dtype=dtype)))
    assert not back.isnan().any()
