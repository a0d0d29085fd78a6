"""Rational quadratic splines: the map, and the layers that move values by it."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.engine import tuple_of
from invzoo.layers.maps.mixture import MixtureOfLogistics
from invzoo.layers.maps.spline import RationalQuadratic, _Bin
from invzoo.protocol import moved
from tests.layers.helpers import back, there

TAILS = ["linear", "circular"]


def spline_of(*args, gain=1.0, **options):
    return RationalQuadratic(*args, gain=gain, **options)


NARROW = spline_of(5, 2.0)


def draw(spline, *shape, size=3.0, dtype=torch.float64):
    """Values on both sides of the bound, and parameters for them along dim 1."""
    x = spline.bound * torch.randn(shape, dtype=dtype) * 0.7
    h = size * torch.randn(shape[0], spline.parameters * shape[1], *shape[2:], dtype=dtype)
    return x.requires_grad_(), h.requires_grad_()


def knots_of(spline, h):
    """The knots (x, y, slope) for one value's parameters, one by one."""
    k, ratio = spline.bins, (1 / spline.min_bin - 1) / (spline.bins - 1)
    least, most = 1 / math.sqrt(ratio), math.sqrt(ratio)
    h = [spline.gain * v for v in h.tolist()]

    def places(block):
        sizes = [least + (most - least) / (1 + math.exp(math.log(most) - v)) for v in block]
        return [spline.bound * (2 * sum(sizes[:i]) / sum(sizes) - 1) for i in range(k + 1)]

    bound = -math.log(spline.min_slope)
    slopes = [math.exp(bound * math.tanh(v / bound)) for v in h[2 * k :]]
    if spline.tails == "linear":
        slopes = [1.0, *slopes, 1.0]
    elif spline.tails == "circular":
        slopes = [*slopes, slopes[0]]
    return places(h[:k]), places(h[k : 2 * k]), slopes


def reference(spline, x, h):
    """Value and derivative of one x, by the formulas (4) to (8) of Durkan et al., 2019."""
    if spline.tails == "linear" and abs(x) >= spline.bound:
        return x, 1.0
    turn = 2 * spline.bound * math.floor((x + spline.bound) / (2 * spline.bound))
    x = x - turn
    xs, ys, d = knots_of(spline, h)
    k = max(i for i in range(spline.bins) if xs[i] <= x)
    w, height = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, xi = height / w, (x - xs[k]) / w
    bottom = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
    y = ys[k] + height * (s * xi**2 + d[k] * xi * (1 - xi)) / bottom
    return y + turn, s**2 * (d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2) / bottom**2


def reference_inverse(spline, y, h):
    """The root -2c / (b + sqrt(b^2 - 4ac)) of the same paper, with the coefficients (25) to (27)."""
    if abs(y) >= spline.bound:
        return y
    xs, ys, d = knots_of(spline, h)
    k = max(i for i in range(spline.bins) if ys[i] <= y)
    w, height = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s = height / w
    common = (y - ys[k]) * (d[k + 1] + d[k] - 2 * s)
    a, b, c = height * (s - d[k]) + common, height * d[k] - common, -s * (y - ys[k])
    return xs[k] + w * 2 * c / (-b - math.sqrt(b**2 - 4 * a * c))


# ---- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tails", [*TAILS, None])
@pytest.mark.parametrize(("bins", "bound", "gain"), [(2, 1.0, 1.0), (5, 3.0, 1.0), (8, 2.5, 0.3)])
def test_agrees_with_the_papers_formulas(tails, bins, bound, gain):
    spline = spline_of(bins, bound, tails, gain=gain)
    x, h = draw(spline, 60, 1)
    x = x if tails else (x.detach() / 2).clamp(-bound, bound).requires_grad_()
    wanted = [reference(spline, a, b) for a, b in zip(x.flatten().tolist(), h)]
    y, log_slope = there(spline, x, h, 1)
    assert_close(y.flatten(), torch.tensor([v for v, _ in wanted], dtype=torch.float64))
    assert_close(log_slope.exp().flatten(), torch.tensor([v for _, v in wanted], dtype=torch.float64))
    assert_close(there(spline, x, h, 1)[0], y)
    assert_close(there(spline, x, h, 1)[1], log_slope)
    assert_close(torch.autograd.grad(y.sum(), x)[0].log(), log_slope)
    if tails != "circular":
        wanted = [reference_inverse(spline, a, b) for a, b in zip(x.flatten().tolist(), h)]
        assert_close(back(spline, x, h, 1).flatten(), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("spline", [spline_of(3), spline_of(3, tails="circular"), MixtureOfLogistics(2, gain=1.0)])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_blocks_lie_along_dim_and_broadcast(spline, dim):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    shape = [1, 1, 1]
    shape[dim] = spline.parameters * x.shape[dim]
    h = torch.randn(shape, dtype=torch.float64)
    y, log_slope = there(spline, x, h, dim)
    blocks = h.flatten().view(spline.parameters, -1)
    for i in range(x.shape[dim]):
        each = blocks[:, i].expand(x.select(dim, i).numel(), -1)
        inputs = x.select(dim, i).reshape(-1, 1)
        assert_close(y.select(dim, i).reshape(-1, 1), there(spline, inputs, each, 1)[0])
        assert_close(log_slope.select(dim, i).reshape(-1, 1), there(spline, inputs, each, 1)[1])
    assert_close(back(spline, y, h, dim), x)


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("bins", [2, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_parameters_are_the_identity(tails, bins, dtype):
    spline = spline_of(bins, tails=tails)
    x = torch.linspace(-4, 4, 201, dtype=dtype).view(-1, 1)
    h = torch.zeros(1, spline.parameters, dtype=dtype)
    rounding = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    y, log_slope = there(spline, x, h, 1)
    assert_close(y, x, **rounding)
    assert_close(back(spline, x, h, 1), x, **rounding)
    assert_close(log_slope, torch.zeros_like(x), **rounding)


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("size", [1.0, 5.0, 1e30, math.inf])
def test_increases_and_comes_back_whatever_the_parameters(tails, size):
    spline = spline_of(tails=tails)
    h = (torch.randn(4, spline.parameters, 1, dtype=torch.float64) * size).nan_to_num(
        nan=0.0, posinf=size, neginf=-size
    )
    x = torch.linspace(-4, 4, 3001, dtype=torch.float64).expand(4, 1, -1)
    y, log_slope = there(spline, x, h, 1)
    assert (y.diff() > 0).all()
    assert log_slope.isfinite().all()
    errors = (back(spline, y, h, 1) - x).abs() * log_slope.exp()
    assert errors.max() < 1e-13  # it is the rounding of y that comes back
    if tails == "linear":
        assert torch.equal(y[x.abs() >= spline.bound], x[x.abs() >= spline.bound])


def test_the_inverse_has_no_cancellation():
    # A flat bin between steep knots: there the papers' coefficients and discriminant lose their digits in float32.
    height, slope, theta = 2**-7, 100.0, torch.linspace(0, 1, 1001)
    single, double = (
        _Bin(*(torch.tensor(v, dtype=dtype) for v in (0.0, 1.0, 0.0, height, slope, slope)))
        for dtype in (torch.float32, torch.float64)
    )
    exact = double.inverse(theta.double() * height)
    rounding = 1.2e-7 * (1 + height * torch.exp(-double.log_slope(exact)))  # of the result, and of theta before
    assert ((single.inverse(theta * height) - exact).abs() < rounding).all()
    common = theta * (2 * slope - 2 * height)
    a, b, c = height - slope + common, slope - common, -height * theta
    textbook = 2 * c / (-b - (b**2 - 4 * a * c).clamp(min=0).sqrt())
    assert ((textbook - exact).abs() > 1000 * rounding).any()


@pytest.mark.parametrize("tails", TAILS)
def test_the_derivative_is_continuous_at_knots_and_ends(tails):
    spline = spline_of(5, 2.0, tails)
    h = 2 * torch.randn(1, spline.parameters, dtype=torch.float64)
    knots, _, slopes = knots_of(spline, h[0])
    at = torch.tensor(knots, dtype=torch.float64).unsqueeze(1)
    for side in (-1e-10, 0, 1e-10):
        slope = there(spline, at + side, h, 1)[1].exp()
        assert_close(slope.flatten(), torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=0)


def test_circular_tails_map_the_circle():
    spline = spline_of(4, math.pi, "circular")
    x, h = draw(spline, 50, 1)
    x = x.detach().remainder(2 * math.pi) - math.pi
    y, log_slope = there(spline, x, h, 1)
    assert y.abs().max() <= math.pi
    for turns in (-3, 1, 2):
        further = x + 2 * math.pi * turns
        assert_close(there(spline, further, h, 1)[0], y + 2 * math.pi * turns)
        assert_close(there(spline, further, h, 1)[1], log_slope)
        assert_close(back(spline, y + 2 * math.pi * turns, h, 1), further)


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_values_and_knots_have_finite_gradients(tails, dtype):
    spline = spline_of(8, 3.0, tails)
    knots = torch.linspace(-3, 3, 9, dtype=dtype)  # of h = 0
    beside = torch.cat(
        (knots.nextafter(torch.tensor(9.0, dtype=dtype)), knots.nextafter(torch.tensor(-9.0, dtype=dtype)))
    )
    x = torch.cat((knots, beside, torch.tensor([-1e6, 1e6, -0.0], dtype=dtype))).unsqueeze(1).requires_grad_()
    for size in (0, 1):
        h = (size * torch.randn(1, spline.parameters, dtype=dtype)).requires_grad_()
        y, log_slope = there(spline, x, h, 1)
        found = back(spline, y, h, 1)
        assert_close(found, x, rtol=1e-5 if dtype is torch.float32 else 1e-12, atol=1e-5)
        for outputs in (y, log_slope, found):
            gradients = torch.autograd.grad(outputs.sum(), (x, h), create_graph=True)
            assert all(g.isfinite().all() for g in gradients)
            seconds = torch.autograd.grad(sum(g.sum() for g in gradients), (x, h), retain_graph=True)
            assert all(g.isfinite().all() for g in seconds)


def test_nan_and_infinity_pass():
    h = torch.randn(1, NARROW.parameters)
    x = torch.tensor([[math.nan], [math.inf], [-math.inf]])
    for y in (there(NARROW, x, h, 1)[0], back(NARROW, x, h, 1)):
        assert_close(y, x, equal_nan=True)
    assert_close(there(NARROW, x, h, 1)[1], torch.tensor([[math.nan], [0.0], [0.0]]), equal_nan=True)


def test_autograd_keeps_two_numbers_for_each_bin():
    spline = spline_of(64)
    x, h = draw(spline, 10, 20)
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = moved(spline, x, *spline.parts(h * 1.0, x, 1))[0]
    assert sum(sizes.values()) < (2 * 64 + 4 * 64 / 8 + 45) * x.numel() * 8
    assert kept.shape == x.shape


# ---- no tails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [3.0, 3.31])  # the latter rounded up in halves
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_tails_the_ends_stay_and_have_free_slopes(bound, dtype):
    spline = spline_of(4, bound, None)
    h = 2 * torch.randn(50, spline.parameters, dtype=dtype)
    for end in (-bound, bound):
        x = torch.full((50, 1), end, dtype=dtype).requires_grad_()
        for function in (there, back):
            y = tuple_of(function(spline, x, h))[0]
            assert_close(y, x, rtol=0, atol=0)
            gradient = torch.autograd.grad(y.sum(), x)[0]
            assert (gradient > 0).all()
            if dtype is torch.float64:
                slope = there(spline, x, h, 1)[1].exp()
                assert_close(gradient, slope if function is there else 1 / slope)
                assert slope.std() > 0.1


LAYERS_WITHOUT_TAILS = {
    "RationalQuadraticSpline": lambda: iz.RationalQuadraticSpline(4, tails=None, bound=2.0),
    "RationalQuadraticCoupling": lambda: iz.RationalQuadraticCoupling(nn.Linear(2, 50), tails=None, bound=2.0),
    "MaskedAutoregressive": lambda: iz.MaskedAutoregressive(4, (8,), map=RationalQuadratic(bound=2.0, tails=None)),
}


@pytest.mark.parametrize("name", LAYERS_WITHOUT_TAILS)
def test_without_tails_values_outside_are_refused(name):
    layer = LAYERS_WITHOUT_TAILS[name]()
    assert layer(torch.tensor([[-2.0, 2.0, 0.5, 1.0]]))[0, :2].tolist() == [-2, 2]
    for end in (layer.domain, layer.codomain):
        assert (end.lower_bound, end.upper_bound) == (-2, 2)
    message = rf"{name}: Expected \w+ to have values in \[-2, 2\]; got values from -2 to 2.5$"
    for call in (layer, layer.inverse, layer.forward_and_log_det, layer.inverse_and_log_det):
        with pytest.raises(ValueError, match=message):
            call(torch.tensor([[-2.0, 2.5, 0.0, 0.0]]))


def test_without_tails_values_that_cannot_be_read_give_nan():
    layer = iz.RationalQuadraticSpline(1, tails=None)
    x = torch.tensor([[3.5], [0.5], [-3.5]])
    assert torch.func.vmap(layer.function)(x[:, None]).isnan().flatten().tolist() == [True, False, True]
    log_det = torch.func.vmap(layer.log_det)(x[:, None])
    assert log_det.isnan().flatten().tolist() == [True, False, True]


# ---- the layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (iz.RationalQuadraticCoupling, {"bins": 4, "bound": 2.0}),
        (iz.RationalQuadraticCoupling, {"bins": 4, "tails": "circular"}),
        (iz.MixtureLogisticCoupling, {"components": 3}),
    ],
)
def test_coupling_moves_each_half_by_the_other(kind, options):
    parameters = kind(nn.Identity(), **options).map.parameters
    f, g = (nn.Linear(2, 2 * parameters).double() for _ in range(2))
    layer, x = kind(f, g, **options), torch.randn(5, 4, dtype=torch.float64)
    x1, x2 = x.chunk(2, 1)
    y1 = there(layer.map, x1, f(x2), 1)[0]
    assert_close(layer(x), torch.cat((y1, there(layer.map, x2, g(y1), 1)[0]), 1))


def test_zero_init_starts_at_the_identity():
    layer = iz.RationalQuadraticCoupling(nn.Linear(2, 46), nn.Linear(2, 46), zero_init=True)
    x = torch.randn(5, 4)
    assert_close(layer(x), x, rtol=0, atol=1e-6)
