"""Activations: values, gradients and domains, against PyTorch's own and by hand."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import constraints
from torch.testing import assert_close

from invzoo.layers.activation import Identity, InvertibleELU, InvertibleLeakyReLU, SneakyReLU
from invzoo.layers.squash import (
    InvertibleAtanh,
    InvertibleExp,
    InvertibleLog,
    InvertibleLogit,
    InvertibleSigmoid,
    InvertibleSoftplus,
    InvertibleTanh,
)
from invzoo.module import InvertibleModule, mode

LAYERS = {
    "identity": Identity(),
    "leaky_relu": InvertibleLeakyReLU(),
    "leaky_relu_steep": InvertibleLeakyReLU(3),
    "sigmoid": InvertibleSigmoid(),
    "logit": InvertibleLogit(),
    "sigmoid_eps": InvertibleSigmoid(0.1),
    "logit_eps": InvertibleLogit(0.1),
    "tanh": InvertibleTanh(),
    "atanh": InvertibleAtanh(),
    "softplus": InvertibleSoftplus(),
    "exp": InvertibleExp(),
    "log": InvertibleLog(),
    "elu": InvertibleELU(),
    "elu_half": InvertibleELU(0.5),
    "sneaky_relu": SneakyReLU(0.25),
}
REFERENCES = {
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "leaky_relu_steep": lambda x: F.leaky_relu(x, 3),
    "sigmoid": torch.sigmoid,
    "logit": torch.logit,
    "sigmoid_eps": lambda x: (torch.sigmoid(x) - 0.1) / 0.8,
    "logit_eps": lambda x: torch.logit(0.1 + 0.8 * x),
    "tanh": torch.tanh,
    "atanh": torch.atanh,
    "softplus": F.softplus,
    "exp": torch.exp,
    "log": torch.log,
    "elu": F.elu,
    "elu_half": lambda x: F.elu(x, 0.5),
    "sneaky_relu": lambda x: (x + 0.6 * ((1 + x**2).sqrt() - 1)) / 1.6,
}
# The layers that look at values, the method that does, and the interval.
CHECKED = {
    "sigmoid": (InvertibleSigmoid, "inverse", 0, 1),
    "logit": (InvertibleLogit, "function", 0, 1),
    "tanh": (InvertibleTanh, "inverse", -1, 1),
    "atanh": (InvertibleAtanh, "function", -1, 1),
}
# The same with one bound.
HALF_CHECKED = {
    "softplus": (InvertibleSoftplus, "inverse", 0),
    "exp": (InvertibleExp, "inverse", 0),
    "log": (InvertibleLog, "function", 0),
    "elu": (InvertibleELU, "inverse", -1.0),
}
REAL = [name for name in LAYERS if name != "identity"]
PAIRS = [("sigmoid", "logit"), ("tanh", "atanh"), ("exp", "log")]

every = pytest.mark.parametrize("name", LAYERS)
real = pytest.mark.parametrize("name", REAL)
half_checked = pytest.mark.parametrize("name", HALF_CHECKED)
checked = pytest.mark.parametrize("name", CHECKED)
directions = pytest.mark.parametrize("direction", ["function", "inverse"])
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)

shapes = st.lists(st.integers(0, 4), max_size=4)


def inside(constraint: constraints.Constraint, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw values well inside a layer's domain or codomain, none of them close to 0."""
    if constraint is constraints.real:
        x = torch.randn(shape, dtype=dtype)
        return (x + x.sign() / 10).requires_grad_()
    low, high = constraint.lower_bound, getattr(constraint, "upper_bound", None)
    if high is None:
        y = low + torch.randn(shape, dtype=dtype).exp()
        return (y + (y.abs() < 0.1) / 5).requires_grad_()
    return (low + (high - low) * (0.05 + 0.9 * torch.rand(shape, dtype=dtype))).requires_grad_()


def argument(layer: InvertibleModule, direction: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return inside(layer.domain if direction == "function" else layer.codomain, *shape, dtype=dtype)


# ---- every activation -----------------------------------------------------------------------------------------------


@every
@given(shape=shapes)
def test_value_and_gradient_are_pytorchs(name: str, shape: list[int]) -> None:
    layer = LAYERS[name]
    x = inside(layer.domain, *shape)
    y, expected = layer(x), REFERENCES[name](x)
    assert_close(y, expected)
    cotangent = torch.randn_like(y)
    assert_close(*(torch.autograd.grad(out, x, cotangent)[0] for out in (y, expected)))


@every
@given(shape=shapes)
def test_round_trips(name: str, shape: list[int]) -> None:
    layer = LAYERS[name]
    x, y = inside(layer.domain, *shape), inside(layer.codomain, *shape)
    assert_close(layer.inverse(layer.function(x)), x)
    assert_close(layer.function(layer.inverse(y)), y)


@every
def test_outputs_are_in_the_codomain(name: str) -> None:
    layer = LAYERS[name]
    assert layer.codomain.check(layer(inside(layer.domain, 100))).all()
    assert layer.domain.check(layer.inverse(inside(layer.codomain, 100))).all()


@every
@directions
@dtypes
def test_dtype_is_kept_and_precision_is_the_dtypes(name: str, direction: str, dtype: torch.dtype) -> None:
    f = getattr(LAYERS[name], direction)
    x = argument(LAYERS[name], direction, 500).detach().to(dtype)
    y = f(x)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(y.double(), f(x.double()), rtol=2 * eps, atol=2 * eps)


@every
@directions
def test_the_input_is_not_changed(name: str, direction: str) -> None:
    x = argument(LAYERS[name], direction, 3, 4).detach()
    before = x.clone()
    getattr(LAYERS[name], direction)(x)
    assert_close(x, before, rtol=0, atol=0)


@every
@directions
def test_transforms_of_torch_func(name: str, direction: str) -> None:
    f, x = getattr(LAYERS[name], direction), argument(LAYERS[name], direction, 3, 4).detach()
    assert_close(torch.func.vmap(f)(x), f(x))
    assert_close(torch.func.vmap(torch.func.grad(lambda v: f(v).sum()))(x), torch.func.grad(lambda v: f(v).sum())(x))


@pytest.mark.slow
@every
@directions
def test_compiles_without_a_graph_break(name: str, direction: str) -> None:
    f, x = getattr(LAYERS[name], direction), argument(LAYERS[name], direction, 3, 4).detach()
    torch.compiler.reset()
    assert_close(torch.compile(f, backend="eager", fullgraph=True)(x), f(x))


# ---- log-determinants -----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", [(3,), (0, 2), (1, 2), (2, 3, 4, 5)], ids=str)
@dtypes
def test_log_det_is_one_number_a_sample(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inside(LAYERS[name].domain, *shape).detach()
    got = LAYERS[name].log_det(x.to(dtype))
    assert got.shape == shape[:1]
    assert got.dtype is torch.float32
    assert_close(got.double(), LAYERS[name].log_det(x.to(dtype).double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", [-100.0, -100.0]),
        ("tanh", [2 * math.log(2) - 200] * 2),
        ("softplus", [-100.0, 0.0]),
        ("exp", [-100.0, 100.0]),
        ("elu", [-100.0, 0.0]),
        ("leaky_relu", [math.log(0.01), 0.0]),
        ("sneaky_relu", [math.log(0.25), 0.0]),
    ],
)
def test_log_det_far_out(name: str, expected: list[float]) -> None:
    x = torch.tensor([-100.0, 100.0], requires_grad=True)
    log_det = LAYERS[name].log_det(x)
    assert_close(log_det, torch.tensor(expected), rtol=1e-6, atol=1e-4)
    if log_det.requires_grad:
        assert torch.autograd.grad(log_det.sum(), x)[0].isfinite().all()


def test_log_det_of_identity_takes_several_inputs() -> None:
    assert torch.equal(Identity().log_det(torch.ones(2, 3), torch.ones(2)), torch.zeros(2))


@real
def test_log_det_refuses_a_scalar_and_integers(name: str) -> None:
    with pytest.raises(ValueError, match=r"Expected input to have a batch dim, for a log-determinant; got a scalar$"):
        LAYERS[name].log_det(torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"Expected x to be real floating point; got torch.int64$"):
        LAYERS[name].log_det(torch.ones(3, dtype=torch.long))


# ---- bad input ------------------------------------------------------------------------------------------------------


@real
@directions
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_other_dtypes_are_refused(name: str, direction: str, dtype: torch.dtype) -> None:
    layer, argument = LAYERS[name], "x" if direction == "function" else "y"
    message = rf"^{type(layer).__name__}: Expected {argument} to be real floating point; got {dtype}$"
    with pytest.raises(TypeError, match=message):
        getattr(layer, direction)(torch.ones(3).to(dtype))


@real
@directions
def test_what_is_no_tensor_is_refused(name: str, direction: str) -> None:
    with pytest.raises(TypeError, match=r"Expected [xy] to be a Tensor; got float$"):
        getattr(LAYERS[name], direction)(0.5)


@pytest.mark.parametrize("name", CHECKED)
def test_class_data(name: str) -> None:
    layer = LAYERS[name]
    assert layer.saturating
    assert layer.inv.saturating
    assert not layer.volume_preserving
    bounded = layer.codomain if CHECKED[name][1] == "inverse" else layer.domain
    assert (bounded.lower_bound, bounded.upper_bound) == CHECKED[name][2:]


# ---- Identity -------------------------------------------------------------------------------------------------------


def test_identity_returns_what_it_gets() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.zeros(3, dtype=torch.long)
    layer = Identity()
    assert layer(a) is a
    assert layer.inverse(b) is b
    assert all(got is given for got, given in zip(layer(a, b), (a, b), strict=True))
    assert all(got is given for got, given in zip(layer.inverse(a, b), (a, b), strict=True))
    assert layer.exact
    assert layer.volume_preserving


# ---- LeakyReLU ------------------------------------------------------------------------------------------------------


@given(x=st.floats(-1e30, 1e30), slope=st.floats(1e-3, 1e3))
def test_leaky_relu_by_hand(x: float, slope: float) -> None:
    layer, value = InvertibleLeakyReLU(slope), torch.tensor(x, dtype=torch.float64)
    y = layer(value)
    assert y.item() == (x if x > 0 else x * slope)
    assert_close(layer.inverse(y), value, rtol=1e-15, atol=1e-320)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_leaky_relu_gradients_at_zero(zero: float) -> None:
    layer, x = InvertibleLeakyReLU(0.25), torch.tensor(zero, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(layer(x), x)[0] == 0.25 == torch.autograd.grad(F.leaky_relu(x, 0.25), x)[0]
    assert torch.autograd.grad(layer.inverse(x), x)[0] == 4


def test_leaky_relu_keeps_the_slope_of_what_underflows() -> None:
    x = torch.tensor([-1e-45, 1e-45], requires_grad=True)
    y = InvertibleLeakyReLU(check="never")(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([0.01, 1]))


def test_leaky_relu_stays_close_through_a_thousand_layers() -> None:
    net = nn.Sequential(*(InvertibleLeakyReLU(slope) for slope in (0.3, 1 / 0.3) * 500))
    x = torch.randn(50)
    y = net(x)
    for layer in reversed(net):
        y = layer.inverse(y)
    assert_close(y, x, rtol=2e-4, atol=0)


@pytest.mark.parametrize("slope", [0, 0.0, -0.1, float("inf"), float("nan")])
def test_leaky_relu_refuses_a_slope(slope: float) -> None:
    with pytest.raises(
        ValueError, match=r"^InvertibleLeakyReLU: Expected negative_slope to be positive and finite; got"
    ):
        InvertibleLeakyReLU(slope)


def test_leaky_relu_refuses_a_slope_that_is_no_number() -> None:
    with pytest.raises(TypeError, match=r"^InvertibleLeakyReLU: Expected negative_slope to be a number; got '0.1'$"):
        InvertibleLeakyReLU("0.1")


def test_leaky_relu_repr() -> None:
    assert repr(InvertibleLeakyReLU(0.2)) == "InvertibleLeakyReLU(negative_slope=0.2)"


# ---- SneakyReLU and ELU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("slope", [0.01, 0.5, 0.999])
def test_sneaky_relu_cancels_nothing(slope: float, dtype: torch.dtype) -> None:
    size = 10.0 ** torch.arange(-30, 17, dtype=dtype)
    layer, x = SneakyReLU(slope), torch.cat((-size, torch.zeros(1, dtype=dtype), size))
    assert_close(layer.inverse(layer.function(x)), x, rtol=1000 * torch.finfo(dtype).eps, atol=0)


def test_sneaky_relu_is_smooth_where_its_inverse_changes_form() -> None:
    layer = SneakyReLU(0.25)
    y = torch.tensor([-0.375, -0.375 - 1e-9, -0.375 + 1e-9, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(layer.inverse(y).sum(), y)[0].isfinite().all()
    assert gradcheck(layer.inverse, y)
    assert gradgradcheck(layer.inverse, y)


def test_sneaky_relu_has_gradients_where_the_form_that_is_not_taken_is_singular() -> None:
    y = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(SneakyReLU(0.5).inverse(y).sum(), y)
    assert_close(gradient, SneakyReLU(0.5).log_det(SneakyReLU(0.5).inverse(y)).neg().exp())


@pytest.mark.parametrize(("slope", "message"), [(0, "positive and finite; got 0"), (1, "below 1; got 1")])
def test_sneaky_relu_refuses_a_slope(slope: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^SneakyReLU: Expected negative_slope to be {message}$"):
        SneakyReLU(slope)


def test_elu_refuses_an_alpha() -> None:
    with pytest.raises(ValueError, match=r"^InvertibleELU: Expected alpha to be positive and finite; got -1$"):
        InvertibleELU(-1)


def test_smooth_kinked_reprs() -> None:
    assert repr(SneakyReLU(0.2)) == "SneakyReLU(negative_slope=0.2)"
    assert repr(InvertibleELU(0.2)) == "InvertibleELU(alpha=0.2)"


# ---- activations with one bound -------------------------------------------------------------------------------------


@half_checked
def test_values_below_are_refused(name: str) -> None:
    layer, direction, low = HALF_CHECKED[name]
    argument = "y" if direction == "inverse" else "x"
    message = rf"^{layer.__name__}: Expected {argument} to have values in \[{low:g}, inf\]; got values from -2 to 0.5$"
    with pytest.raises(ValueError, match=message):
        getattr(layer(), direction)(torch.tensor([0.5, -2.0], requires_grad=True))


@half_checked
@dtypes
def test_the_lower_bound_goes_to_infinity_and_comes_back(name: str, dtype: torch.dtype) -> None:
    cls, direction, low = HALF_CHECKED[name]
    layer, other = cls(), {"function": "inverse", "inverse": "function"}[direction]
    stretched = getattr(layer, direction)(torch.tensor([low], dtype=dtype))
    assert torch.equal(stretched, torch.tensor([-torch.inf], dtype=dtype))
    assert torch.equal(getattr(layer, other)(stretched), torch.tensor([low], dtype=dtype))


@half_checked
def test_these_saturate_too(name: str) -> None:
    assert LAYERS[name].saturating
    assert getattr(LAYERS[name], HALF_CHECKED[name][1])(torch.tensor([torch.nan])).isnan().all()


def test_softplus_has_all_digits_far_out() -> None:
    x = torch.tensor([-700.0, -30.0, 0.0, 25.0, 30.0, 700.0], dtype=torch.float64, requires_grad=True)
    y = InvertibleSoftplus().function(x)
    assert_close(y, torch.logaddexp(x, torch.zeros_like(x)), rtol=1e-15, atol=0)
    assert_close(InvertibleSoftplus().inverse(y), x, rtol=1e-15, atol=1e-15)


# ---- saturating activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("squash", "stretch"), PAIRS)
def test_one_is_the_inverse_of_the_other(squash: str, stretch: str) -> None:
    there, back = LAYERS[squash], LAYERS[stretch]
    x, y = inside(there.domain, 50), inside(there.codomain, 50)
    assert torch.equal(there.function(x), back.inverse(x))
    assert torch.equal(there.inverse(y), back.function(y))
    assert back.domain is there.codomain


@checked
@pytest.mark.parametrize(
    ("dtype", "values", "got"),
    [
        (torch.float64, [0.5, -1.2, 1.3], "values from -1.2 to 1.3"),
        (torch.float32, [0.5, -1.2, 1.3], "values from -1.2 to 1.3"),
        (torch.float32, [0.5, 1 + 2**-23], "values from 0.5 to 1.0000001"),
        (torch.float64, [0.5, 1 + 2**-52], "values from 0.5 to 1.0000000000000002"),
        (torch.bfloat16, [0.5, -2], "values from -2 to 0.5"),
        (torch.float16, [0.5, float("inf")], "values from 0.5 to inf"),
        (torch.float32, [0.5, float("-inf")], "values from -inf to 0.5"),
    ],
)
def test_values_outside_are_refused(name: str, dtype: torch.dtype, values: list[float], got: str) -> None:
    layer, direction, low, high = CHECKED[name]
    argument = "y" if direction == "inverse" else "x"
    message = rf"^{layer.__name__}: Expected {argument} to have values in \[{low}, {high}\]; got {got}$"
    with pytest.raises(ValueError, match=message):
        getattr(layer(), direction)(torch.tensor(values, dtype=dtype, requires_grad=True))


@pytest.mark.parametrize("name", ["sigmoid", "logit"])
def test_slightly_negative_values_are_no_probabilities(name: str) -> None:
    layer, direction, *_ = CHECKED[name]
    with pytest.raises(ValueError, match=r"got values from -1e-40 to 0.5$"):
        getattr(layer(), direction)(torch.tensor([0.5, -1e-40], dtype=torch.float64))


@checked
def test_forward_of_the_layer_refuses_too(name: str) -> None:
    layer, direction, *_ = CHECKED[name]
    layer = layer() if direction == "function" else layer().inv
    with pytest.raises(ValueError, match=r"got values from 2 to 2$"):
        layer(torch.full((3,), 2.0, requires_grad=True))


@checked
@dtypes
def test_the_bounds_go_to_infinity_and_come_back(name: str, dtype: torch.dtype) -> None:
    cls, direction, low, high = CHECKED[name]
    layer, other = cls(), {"function": "inverse", "inverse": "function"}[direction]
    bounds = torch.tensor([low, high], dtype=dtype)
    stretched = getattr(layer, direction)(bounds)
    assert torch.equal(stretched, torch.tensor([-torch.inf, torch.inf], dtype=dtype))
    assert torch.equal(getattr(layer, other)(stretched), bounds)


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
    layers = [InvertibleLeakyReLU(0.5), LAYERS[name], InvertibleLeakyReLU(2.0)]
    grads = []
    for kind in ("invert", "store"):
        net = nn.Sequential(*copy.deepcopy(layers))
        with mode(net, kind):
            grads.append(torch.autograd.grad(net(x).square().sum(), x)[0])
    assert torch.equal(*grads)
    assert grads[0].isfinite().all()
    assert grads[0].count_nonzero() >= 2


@checked
def test_nan_passes(name: str) -> None:
    cls, direction, *_ = CHECKED[name]
    y = getattr(cls(), direction)(torch.tensor([0.5, torch.nan]))
    assert y.isnan().tolist() == [False, True]


@checked
def test_where_values_cannot_be_read_they_give_nan(name: str) -> None:
    cls, direction, *_ = CHECKED[name]
    f, x = getattr(cls(), direction), torch.tensor([0.5, 2.0, -2.0])
    torch.compiler.reset()
    for run in (torch.func.vmap(f), torch.compile(f, backend="eager", fullgraph=True)):
        assert run(x).isnan().tolist() == [False, True, True]


@checked
def test_a_trace_does_not_read_values(name: str) -> None:
    cls, direction, *_ = CHECKED[name]
    f, x = getattr(cls(), direction), torch.tensor([0.5, 0.25])
    with pytest.warns(
        (DeprecationWarning, FutureWarning), match=r"torch\.jit"
    ):  # and no TracerWarning, which would be an error
        traced = torch.jit.trace(lambda v: 1 * f(v), x, check_trace=False)  # the bare method would be refused
    assert_close(traced(x), f(x))


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often values are looked at."""
    count, aminmax = [0], Tensor.aminmax

    def counted(self: Tensor, **options: Any) -> Any:
        count[0] += 1
        return aminmax(self, **options)

    monkeypatch.setattr(Tensor, "aminmax", counted)
    return count


@pytest.mark.parametrize("name", ["logit", "atanh"])
def test_a_replay_does_not_read_values_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = reads(monkeypatch)
    y = LAYERS[name](inside(LAYERS[name].domain, 5))
    assert count == [1]
    y.sum().backward()
    assert count == [1]


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_training_never_reads_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = reads(monkeypatch)
    LAYERS[name](inside(constraints.real, 5)).sum().backward()
    assert count == [0]


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
    assert_close(InvertibleLogit()(x).double(), torch.logit(x.double()), rtol=2 * torch.finfo(dtype).eps, atol=0)


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
    layer, end = InvertibleLogit(eps), math.log(1 / eps - 1)
    x = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)
    y = layer(x)
    rtol = 2 * torch.finfo(dtype).eps
    assert_close(y, torch.tensor([-end, 0.0, end], dtype=dtype), rtol=rtol, atol=0)
    assert_close(layer.inverse(y), x, rtol=0, atol=rtol * (1 + end))
    log_det = math.log(1 - 2 * eps) - math.log(eps) - math.log1p(-eps)
    assert_close(layer.log_det(x[:1]).item(), log_det, rtol=1e-6, atol=0)


def test_eps_has_an_inverse_for_every_real_number() -> None:
    layer = InvertibleLogit(0.25)  # of [-1/2, 3/2]
    y = torch.tensor([-math.inf, -100.0, 0.0, 100.0, math.inf])
    assert layer.inverse(y).tolist() == [-0.5, -0.5, 0.5, 1.5, 1.5]
    assert layer(torch.tensor([-0.5, 1.5])).tolist() == [-math.inf, math.inf]
    assert layer.domain.check(layer.inverse(y)).all()
    with pytest.raises(
        ValueError, match=r"InvertibleLogit: Expected x to have values in \[-0.5, 1.5\]; got values from"
    ):
        layer(torch.tensor([1.6]))
    with pytest.raises(ValueError, match=r"InvertibleSigmoid: Expected y to have values in \[-0.5, 1.5\]; got values"):
        InvertibleSigmoid(0.25).inverse(torch.tensor([1.6]))


@pytest.mark.parametrize("eps", [0.05, 0.3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sigmoid_with_eps_takes_its_own_outputs(eps: float, dtype: torch.dtype) -> None:
    layer = InvertibleSigmoid(eps)
    back = layer.inverse(layer(torch.tensor([-1e4, 0.0, 1e4], dtype=dtype)))
    assert not back.isnan().any()


def test_where_values_cannot_be_read_eps_gives_nan() -> None:
    x = torch.tensor([0.5, 1.2, -0.2])
    assert torch.func.vmap(InvertibleLogit(0.1).function)(x).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("layer", [InvertibleLogit, InvertibleSigmoid])
def test_eps_is_checked_and_shown(layer: type[InvertibleModule]) -> None:
    assert repr(layer()) == f"{layer.__name__}()"
    assert repr(layer(eps=1e-6)) == f"{layer.__name__}(eps=1e-06)"
    for eps in (0.5, -1e-6, math.nan):
        with pytest.raises(ValueError, match=rf"{layer.__name__}: Expected eps to be in \[0, 0.5\); got {eps}"):
            layer(eps)
    with pytest.raises(TypeError, match=rf"{layer.__name__}: Expected eps to be a number; got None"):
        layer(None)
