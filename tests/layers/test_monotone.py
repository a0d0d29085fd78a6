"""Numeric inverses: the solver, any increasing function, and integrals of positive functions against numpy's."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.engine import tuple_of
from invzoo.engine.eager.call import Call
from invzoo.layers.elementwise_map import PerFeatureMap
from invzoo.layers.maps import curves, mixture
from invzoo.layers.maps.integrals import clenshaw_curtis
from invzoo.layers.maps.mixture import MixtureOfLogistics
from invzoo.layers.maps.roots import bracket, newton, with_gradients
from invzoo.layers.monotone import monotone
from invzoo.layers.monotone.monotone import BernsteinPolynomial, Monotone, SumOfSquares, UnconstrainedMonotonic
from invzoo.layers.residual import residual
from tests.layers.helpers import inputs, perturbed


class Cubic(nn.Module):
    """x + a^2 x^3, shifted by the context."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x + self.a.square() * x**3 + (0 if context is None else context)


CURVES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "cubic": (Cubic(), (-math.inf, math.inf)),
    "sinh": (torch.sinh, (-math.inf, math.inf)),
    "logit": (torch.logit, (0, 1)),
    "log": (torch.log, (0, math.inf)),
    "steep": (lambda x: torch.tanh(50 * (x - 3)) + x / 1000, (-math.inf, math.inf)),
    "kinked": (lambda x: F.leaky_relu(x, 1e-3), (-math.inf, math.inf)),
    "far": (lambda x: x - 1e9, (-math.inf, math.inf)),
}
every = pytest.mark.parametrize("name", CURVES)
# ---- the solver -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_roots_are_found_to_the_precision_of_the_dtype(name: str, dtype: torch.dtype) -> None:
    curve, bounds = CURVES[name]
    layer, y = Monotone(curve, bounds).to(dtype), inputs(200, dtype=dtype).detach()
    x = layer.inverse(y)
    eps = torch.finfo(dtype).eps
    assert x.dtype is dtype
    below, above = (layer.curve(x + side * 4 * eps * x.abs()) for side in (-1, 1))
    noise = 8 * eps * (1e9 if name == "far" else 1)
    assert ((below <= y + noise) & (y - noise <= above)).all()
    Cubic.double(layer)


def test_newton_needs_few_steps_where_the_curve_is_smooth() -> None:
    steps = []

    def curve(x: Tensor) -> Tensor:
        steps.append(1)
        return x + x.sin() / 2

    y = inputs(100).detach().index_fill(0, torch.tensor([3]), torch.nan)
    newton(curve, lambda x: 1 + x.cos() / 2, y, y - 1, y + 1, y)
    assert len(steps) <= 10


@pytest.mark.parametrize(("slope", "error"), [(1e-9, 1e-12), (1e9, 1e-6), (math.nan, 1e-12)])
def test_newton_bisects_where_the_slope_is_useless(slope: float, error: float) -> None:
    y = torch.linspace(-1, 1, 11, dtype=torch.float64)
    x = newton(lambda x: x**3, lambda x: torch.full_like(x, slope), y, y - 10, y + 9, y)
    assert_close(x**3, y, rtol=0, atol=error)


def test_no_root_depends_on_how_long_others_take() -> None:
    def solve(y: Tensor) -> Tensor:
        return newton(lambda x: x**3 + x, lambda x: 3 * x**2 + 1, y, y - 9, y + 10, y)

    y = torch.tensor([0.0, 0.1, 2.0, 1.0, 1e-6], dtype=torch.float32)
    assert torch.equal(solve(y), torch.cat([solve(value) for value in y.split(1)]))


def test_a_root_that_is_met_stays_though_the_slope_is_none() -> None:
    y = torch.tensor([0.0, 8.0], dtype=torch.float64)
    x = newton(lambda x: x**3, lambda x: 3 * x**2, y, y - 1, y + 2, torch.zeros_like(y))
    assert x[0] == 0
    assert_close(x[1].item(), 2.0)


def test_bracket_doubles_until_it_holds_and_says_where_it_does_not() -> None:
    y = torch.tensor([0.0, 1000.0, 0.5, torch.nan], dtype=torch.float64)
    low, high = bracket(lambda x: x, y, -math.inf, math.inf)
    assert low.tolist() == [-1, -1024, -1, -1]
    assert high.tolist() == [1, 1024, 1, 1]
    low, _ = bracket(torch.tanh, y, -math.inf, math.inf)
    assert low.isnan().tolist() == [False, True, False, False]
    assert bracket(lambda x: x, y[2:3], 0.0, 2.0)[0] == 0


def test_gradients_are_those_of_the_implicit_function() -> None:
    a, y = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), inputs(4)

    def solve(y: Tensor, a: Tensor) -> Tensor:
        root = (y / a).sinh().detach()
        return with_gradients(lambda x: a * x.asinh(), lambda x: a / (1 + x**2).sqrt(), y, root)

    results = [solve(y, a), (y / a).sinh()]
    firsts = [torch.autograd.grad(x.sin().sum(), (y, a), create_graph=True) for x in results]
    seconds = [torch.autograd.grad(first[0].exp().sum() + first[1] ** 2, (y, a)) for first in firsts]
    for got, expected in zip((*firsts[0], *seconds[0]), (*firsts[1], *seconds[1]), strict=True):
        assert_close(got, expected)


# ---- Monotone -------------------------------------------------------------------------------------------------------


def test_nothing_needs_a_gradient() -> None:
    layer = Monotone(Cubic())
    with torch.no_grad():
        y, log_det = layer.forward_and_log_det(inputs(2, 3))
        assert not any(t.requires_grad for t in (y, log_det, layer.inverse(y)))


def test_where_values_cannot_be_read_missing_roots_are_nan() -> None:
    layer = Monotone(torch.tanh)
    assert torch.func.vmap(layer.inverse)(torch.tensor([0.5, 2.0])).isnan().tolist() == [False, True]


# ---- searches in replays --------------------------------------------------------------------------------------------


class Gradient(nn.Module):
    """The gradient of a convex potential, half the slope of which is left where it is no curve for itself."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            potential = point.square().sum() / 2 + (point.cosh().log()).sum() / 2
            return self.scale * torch.autograd.grad(potential, point, create_graph=True)[0]


SEARCHES: dict[str, Callable[[], Any]] = {
    "monotone": lambda: Monotone(Cubic()),
    "monotone, differentiating": lambda: Monotone(Gradient(1.0)),
    "snake": lambda: perturbed(iz.Snake(4).double(), 0.3),
    "net integral": lambda: perturbed(UnconstrainedMonotonic(4).double(), 0.3),
    "squares": lambda: perturbed(SumOfSquares(4).double(), 0.3),
    "bernstein": lambda: perturbed(BernsteinPolynomial(4).double(), 0.3),
    "mixture coupling": lambda: perturbed(iz.MixtureLogisticCoupling(nn.Linear(2, 28)).double(), 0.3),
    "autoregressive": lambda: perturbed(iz.MaskedAutoregressive(4, (8,), map=MixtureOfLogistics(2)).double(), 0.3),
    "residual": lambda: iz.InvertibleResidual(lambda x: x.sin() / 2),
    "residual, differentiating": lambda: iz.InvertibleResidual(Gradient(0.4)),
}
searches = pytest.mark.parametrize("name", SEARCHES)


@searches
@pytest.mark.parametrize("kind", iz.Mode)
@pytest.mark.parametrize("with_log_det", [False, True])
def test_what_is_saved_does_not_depend_on_how_long_a_search_takes(
    name: str, kind: str, with_log_det: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, saved, pack = SEARCHES[name](), list[int](), Call.pack
    monkeypatch.setattr(Call, "pack", lambda self, tensor: saved.append(1) or pack(self, tensor))
    layer.mode = kind
    counts = set()
    for y in (torch.zeros(3, 4, dtype=torch.float64), 5 * inputs(3, 4).detach(), inputs(3, 4).detach() / 100):
        saved.clear()
        values = tuple_of((layer.inv.forward_and_log_det if with_log_det else layer.inv)(y.requires_grad_()))
        sum(v.sum() for v in values).backward()
        counts.add(len(saved))
    assert len(counts) == 1


@searches
@pytest.mark.parametrize("with_log_det", [False, True])
def test_a_replay_that_knows_the_root_does_not_search(
    name: str, with_log_det: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, y = SEARCHES[name](), inputs(3, 4)
    call = layer.inv.forward_and_log_det if with_log_det else layer.inv
    expected = torch.autograd.grad(sum(v.sin().sum() for v in tuple_of(call(y * 1))), y)
    values = tuple_of(call(y * 1))
    for module in (curves, mixture, monotone, residual):
        for search in ("newton", "bracket", "_search", "fixed_point"):
            if hasattr(module, search):
                monkeypatch.delattr(module, search)
    assert_close(torch.autograd.grad(sum(v.sin().sum() for v in values), y), expected)


def test_the_log_determinant_calls_no_hooks_of_the_input() -> None:
    x, seen = inputs(2, 3), list[Tensor]()
    x.register_hook(seen.append)
    y, log_det = Monotone(Cubic()).forward_and_log_det(x)
    assert not seen
    (y.sum() + log_det.sum()).backward()
    assert len(seen) == 1


# ---- integrals ------------------------------------------------------------------------------------------------------


def fill(layer: PerFeatureMap) -> np.ndarray:
    with torch.no_grad():
        layer.weight.normal_()
    return layer.weight.detach().numpy()


def assert_is_integral(layer: PerFeatureMap, density: Callable[[np.ndarray], np.ndarray], c: float) -> None:
    """Compare a layer of one feature with a fine quadrature of ``density``, whose tails are constant."""
    points, weights = np.polynomial.legendre.leggauss(200)
    for x in (-7.0, -3.0, 0.0, 0.5, 4.0, 9.0):
        end = max(-5.0, min(5.0, x))
        area = (weights * density((points + 1) / 2 * end)).sum() * end / 2 + (x - end) * density(np.array([end]))[0]
        value = torch.tensor([[x]], dtype=torch.float64)
        assert_close(layer(value), torch.tensor([[c + area]], dtype=torch.float64), rtol=1e-6, atol=1e-6)
        slope = torch.tensor(np.log(density(np.array([end]))))
        assert_close(layer.log_det(value), slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 32])
def test_the_quadrature_integrates_polynomials_exactly(n: int) -> None:
    nodes, weights = clenshaw_curtis(n, torch.zeros((), dtype=torch.float64))
    powers = nodes ** torch.arange(n + 1)[:, None]
    assert_close(powers @ weights, 1 / torch.arange(1, n + 2, dtype=torch.float64), rtol=1e-13, atol=0)


def test_unconstrained_monotonic_is_the_integral_of_its_net() -> None:
    layer = UnconstrainedMonotonic(1, hidden=3, order=64, dtype=torch.float64)
    c, d, *rest = fill(layer)[:, 0]
    w, b, v = np.array(rest).reshape(3, 3)
    assert_is_integral(layer, lambda t: np.exp(3 * np.tanh((d + np.tanh(np.outer(t, w) + b) @ v) / 3)), c)


def test_sum_of_squares_is_the_integral_of_its_squares() -> None:
    layer = SumOfSquares(1, degree=2, polynomials=2, min_slope=0.1, dtype=torch.float64)
    c, *rest = fill(layer)[:, 0]
    a = np.tanh(np.array(rest).reshape(3, 2))  # highest power first
    assert_is_integral(
        layer, lambda t: 0.1 + 0.9 * np.mean([(1 + np.polyval(a[:, k], t / 5)) ** 2 for k in (0, 1)], 0), c
    )


def test_bernstein_polynomial_is_the_integral_of_one() -> None:
    layer = BernsteinPolynomial(1, degree=4, dtype=torch.float64)
    c, *rest = fill(layer)[:, 0]
    d = np.exp(3 * np.tanh(np.array(rest) / 3))

    def density(t: np.ndarray) -> np.ndarray:
        u = (t / 5 + 1) / 2
        return sum(d[k] * math.comb(3, k) * u**k * (1 - u) ** (3 - k) for k in range(4))

    assert_is_integral(layer, density, c)


@pytest.mark.parametrize(
    ("layer", "size"),
    [(UnconstrainedMonotonic, 3.0), (SumOfSquares, 3.0), (SumOfSquares, 100.0), (BernsteinPolynomial, 100.0)],
)
def test_wild_weights_leave_it_invertible(layer: type[PerFeatureMap], size: float) -> None:
    built, x = layer(3, dtype=torch.float64), 5 * inputs(100, 3)
    with torch.no_grad():
        built.weight.normal_(std=size)
    y = built(x)
    assert_close(built(built.inverse(y)), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [iz.BernsteinPolynomial, iz.SumOfSquares, iz.UnconstrainedMonotonic])
def test_the_default_dtype_is_nothing_to_a_layer_of_another(make) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        layer, x = make(3, dtype=torch.float32).inv, torch.randn(2, 3, dtype=torch.float32, requires_grad=True)
        y, log_det = layer.forward_and_log_det(x)
        (y.sum() + log_det.sum()).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == log_det.dtype == x.dtype
