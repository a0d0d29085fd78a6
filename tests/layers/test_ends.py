"""The ends of the numbers: what layers of each value make of infinities, the largest, the smallest, and of zeros."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.elementwise import Elementwise
from invzoo.layers.elementwise_map import PerFeatureMap
from invzoo.layers.maps import Map
from invzoo.layers.maps.curves import SnakeCurve
from invzoo.testing.catalogue import cases
from invzoo.testing.inputs import bounds
from tests.layers.helpers import perturbed


def layers() -> dict[str, iz.InvertibleModule]:
    """Every layer of the catalogue that is a function of each value, and every map that others move values by."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = {case.name: case.make() for case in cases()}
    maps = dict.fromkeys(getattr(layer, "map", None) for layer in found.values())
    alone = {name: layer for name, layer in found.items() if isinstance(layer, Elementwise)}
    return alone | {
        str(map_): PerFeatureMap(map_, 1, 1, None, {"dtype": torch.float64})
        for map_ in maps
        if isinstance(map_, Map) and not map_.volume_preserving
    }


LAYERS = layers()
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def bounds_of(domain: Constraint) -> tuple[float, float]:
    low, high = bounds(domain)
    return -math.inf if low is None else low, math.inf if high is None else high


def ends(domain: Constraint, dtype: torch.dtype) -> Tensor:
    """Values of a domain in order, (n, 1): its ends, those of the dtype, and what lies next to them."""
    info = torch.finfo(dtype)
    low, high = bounds_of(domain)
    x = torch.tensor([low, high, 0.0, info.tiny, 1.0, 30.0, 1e4, info.max], dtype=dtype)
    x = torch.cat([x, *(x.nextafter(torch.full_like(x, end)) for end in (-math.inf, math.inf))])
    x = torch.cat((x, -x)).sort()[0]
    low, high = torch.tensor((low, high), dtype=dtype)
    return x[(low <= x) & (x <= high)].unsqueeze(1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_log_dets_have_their_limits(name: str, direction: str, dtype: torch.dtype) -> None:
    layer = perturbed(copy.deepcopy(LAYERS[name]), 0.3).to(dtype)
    domain, codomain = (layer.domain, layer.codomain)[:: 1 if direction == "forward" else -1]
    x = ends(domain, dtype).requires_grad_()
    with iz.mode(layer, "store"):
        y, log_det = getattr(layer, f"{direction}_and_log_det")(x)
        wide = x.detach().double().clamp(*bounds_of(domain))
        exact_y, exact = getattr(copy.deepcopy(layer).double(), f"{direction}_and_log_det")(wide)
    assert log_det.dtype == torch.promote_types(dtype, torch.float32)
    rounding = (y[1:].abs() * torch.finfo(dtype).eps).nan_to_num(posinf=0)
    assert (y[:-1] <= y[1:] + rounding).all()  # nor is any NaN
    low, high = torch.tensor(bounds_of(codomain), dtype=dtype)
    assert ((low <= y) & (y <= high)).all()

    map_ = getattr(layer, "map", None)
    waves = isinstance(map_, SnakeCurve) or getattr(map_, "tails", None) == "circular"  # whose slopes have no limit
    values = x.detach().squeeze(1)
    finite, far = values.isfinite(), torch.finfo(dtype).max / 2  # beyond it, rounding makes some infinite
    known, tolerance = values.abs() < (1e3 if waves else math.inf), TOLERANCES[dtype]
    assert_close(log_det[known], exact[known].to(log_det.dtype), rtol=tolerance, atol=tolerance)
    known &= values.abs() < far
    assert_close(y[known], exact_y[known].to(dtype), rtol=tolerance, atol=tolerance)
    for end, before in ((-math.inf, log_det[finite][0]), (math.inf, log_det[finite][-1])):
        for limit in () if waves else log_det[values == end]:
            assert limit == before or (limit.isinf() and limit.sign() == before.sign())

    if log_det.requires_grad:
        (gradient,) = torch.autograd.grad(log_det.sum(), x, materialize_grads=True)
        assert not gradient.squeeze(1)[log_det.isfinite()].isnan().any()


@pytest.mark.parametrize(
    ("layer", "direction", "log_dets"),
    [
        (iz.InvertibleSigmoid, "forward", {-100.0: -100.0, 100.0: -100.0}),
        (iz.InvertibleSigmoid, "inverse", {0.0: math.inf, 1.0: math.inf}),
        (iz.InvertibleLogit, "inverse", {-1e4: -1e4, 100.0: -100.0}),
        (iz.InvertibleTanh, "forward", {x: 2 * math.log(2) - 2 * abs(x) for x in (-math.inf, -100.0, 100.0, math.inf)}),
        (iz.InvertibleTanh, "inverse", {-1.0: math.inf}),
        (iz.InvertibleAtanh, "inverse", {-50.0: math.log(4) - 100}),
        (iz.InvertibleSoftplus, "forward", {-100.0: -100.0, 100.0: 0.0}),
        (iz.InvertibleExp, "forward", {-100.0: -100.0, 100.0: 100.0}),
        (iz.InvertibleLog, "inverse", {-200.0: -200.0, 200.0: 200.0}),
        (iz.InvertibleELU, "forward", {-100.0: -100.0, 100.0: 0.0}),
        (iz.InvertibleLeakyReLU, "forward", {-100.0: math.log(0.01), 100.0: 0.0}),
        (iz.SneakyReLU, "forward", {-math.inf: math.log(0.1), -1e4: math.log(0.1), 1e4: 0.0}),
        (iz.SneakyReLU, "inverse", {-math.inf: -math.log(0.1)}),
    ],
)
def test_log_dets_by_hand(layer: type[iz.InvertibleModule], direction: str, log_dets: dict[float, float]) -> None:
    _, got = getattr(layer(), f"{direction}_and_log_det")(torch.tensor([*log_dets]))
    assert_close(got, torch.tensor([*log_dets.values()]))


@pytest.mark.parametrize(("log_tail", "limit"), [(0.5, math.inf), (-0.5, -math.inf), (0.0, 0.3)])
def test_sinh_arcsinh_at_infinity(log_tail: float, limit: float) -> None:
    layer = iz.SinhArcsinh(1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[math.atanh(0.3)], [0.5 * math.atanh(2 * log_tail * 0.99)]]))
    log_dets = layer.log_det(torch.tensor([[math.inf], [-math.inf]]))
    assert_close(log_dets, torch.tensor([limit, limit if log_tail else -limit]))


def test_softplus_is_never_minus_zero() -> None:
    y = iz.InvertibleSoftplus()(torch.tensor([-math.inf, -1e4]))
    assert y.tolist() == [0, 0]
    assert not y.signbit().any()


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_elu_takes_its_own_outputs_whatever_alpha_is_rounded_to(alpha: float, dtype: torch.dtype) -> None:
    layer = iz.InvertibleELU(alpha)
    y = layer(torch.tensor([-100.0], dtype=dtype))
    assert layer.inverse(y).item() == -math.inf
    with pytest.raises(ValueError, match=rf"InvertibleELU: Expected y to have values in \[{-alpha:g}, inf\]; got"):
        layer.inverse(y.nextafter(torch.tensor([-math.inf], dtype=dtype)))


def test_second_derivatives_of_log_dets_at_zero_and_far_out() -> None:
    x = torch.tensor([[-60.0], [0.0], [60.0]], requires_grad=True)
    log_det = iz.InvertibleTanh().log_det(x)
    (first,) = torch.autograd.grad(log_det.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_close(first.squeeze(1), torch.tensor([2.0, 0.0, -2.0]))
    assert_close(second.squeeze(1), torch.tensor([0.0, -2.0, 0.0]))
