"""Half precisions: autocast, scaled losses, modules in bfloat16 and float16, and streams in float32 under them.

What counts as equal. In mode store and in mode recompute a layer does what a plain module does, to the bit. In mode
invert a rebuilt stream differs from the original by rounding in the stream's dtype. A subnet in half precision rounds
its input, so a difference of any size may move a value to the neighbouring half: gradients can differ by a few units
of the subnet's precision in single elements, and by much less in norm. `ULPS` is how many, relative to the largest
element of each gradient, on stacks as shallow as these.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from benchmarks import precision
from tests.reference import (
    BATCH,
    FEATURES,
    HALF,
    MODES,
    Called,
    Case,
    PlainAdditive,
    PlainAffine,
    assert_near,
    make,
    mlp,
    train_step,
)

HALVES = (torch.bfloat16, torch.float16)
ULPS = 8


def tolerance(mode: str, dtype: torch.dtype) -> float:
    return ULPS * torch.finfo(dtype).eps if mode == "invert" else 0.0


@pytest.fixture(params=HALVES, ids=str)
def half(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def case32(case: Case) -> Case:
    return Case(case.net.float(), case.plain.float(), case.x.float(), case.subject)


def both_outputs(net: nn.Module, x: Tensor) -> Tensor:
    y = net(x)
    return y + 0.5 * net(y).tanh() + y.square()


USES = {"once": lambda net, x: net(x), "twice": lambda net, x: net(net(x)), "output used twice": both_outputs}


@pytest.fixture(params=[*USES])
def use(request: pytest.FixtureRequest):
    return USES[request.param]


# ---- autocast -------------------------------------------------------------------------------------------------------


def test_autocast(case32: Case, half: torch.dtype, use):
    def call(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", half):
            return use(net, x)

    case32.holds(lambda net: train_step(net, case32.x, call), tolerance(case32.subject.mode, half))


@pytest.mark.parametrize("container", [iz.InvertibleSequential, nn.Sequential])
def test_a_deep_stack_under_autocast_passes_its_first_check(container):
    """A bfloat16 subnet of 50 may move by a half what the float32 streams lost; the check has to know of it."""
    torch.set_default_dtype(torch.float32)
    for seed in range(4):
        torch.manual_seed(seed)
        layers = (
            iz.AdditiveCoupling(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), swap=bool(i % 2))
            for i in range(50)
        )
        net, x = container(*layers), torch.randn(64, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        y.square().mean().backward()


# ---- scaled losses --------------------------------------------------------------------------------------------------


def test_grad_scaler(case32: Case):
    """Three steps in float16, one of them skipped for an overflow: the same scales, and the same weights."""

    def train(net: nn.Module) -> tuple[list[float], list[Tensor]]:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        scales = []
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = net(case32.x).square().mean()
            scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, [p.detach() for p in net.parameters()]

    before = [p.detach().clone() for p in case32.net.parameters()]
    (ours, weights), (theirs, expected) = train(case32.net), train(case32.plain)
    assert ours == theirs
    assert ours[1] < ours[0]
    assert any(not torch.equal(w, b) for w, b in zip(weights, before))
    assert_near(weights, expected, tolerance(case32.subject.mode, torch.float16))


# ---- modules in half precision --------------------------------------------------------------------------------------


def test_pure_half(case: Case, half: torch.dtype, use):
    for net in (case.net, case.plain):
        net.to(half)

    def program(net: nn.Module) -> list[Tensor]:
        return train_step(net, case.x.to(half), lambda net, x: use(net, x).float())

    case.holds(program, tolerance(case.subject.mode, half))


def test_pure_half_is_as_near_to_float64_as_a_plain_net(half: torch.dtype):
    """What mode invert adds to the error that half precision has anyway is of the same size."""
    errors = {}
    for mode in MODES:
        torch.manual_seed(0)
        case = make("streams")
        with iz.mode(case.net, mode):
            exact = train_step(case.plain, case.x)
            got = train_step(case.net.to(half), case.x.to(half), lambda net, x: net(x).double())
        errors[mode] = max((g.double() - e).norm().item() / e.norm().item() for g, e in zip(got, exact))
    assert errors["recompute"] == errors["store"]
    assert errors["invert"] < 2 * errors["store"]


# ---- streams in float32 under subnets in half precision -------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "plain", "outputs"),
    [(iz.AdditiveCoupling, PlainAdditive, HALF), (iz.AffineCoupling, PlainAffine, 2 * HALF)],
    ids=["additive", "affine"],
)
def test_subnet_dtype(ours, plain, outputs: int, mode: str, half: torch.dtype, use):
    """The plain way: a subnet in half precision between two casts."""
    torch.set_default_dtype(torch.float32)
    nets = [mlp(HALF, outputs).to(half) for _ in range(8)]
    cast = [Called(net, lambda net, x: net(x.to(half)).to(x.dtype)) for net in nets]
    net = iz.InvertibleSequential(*map(partial(ours, subnet_dtype=half), nets[::2], nets[1::2]), mode=mode)
    other = nn.Sequential(*map(plain, cast[::2], cast[1::2]))
    x = torch.randn(BATCH, FEATURES)
    for _ in range(2):
        actual = train_step(net, x, use)  # the weights are shared, and so are their gradients
        assert actual[0].dtype == torch.float32
        assert {g.dtype for g in actual[1:-1]} == {half}
        expected = train_step(other, x, use)
        assert_near(actual, expected, tolerance(mode, half))


def test_subnet_dtype_keeps_log_dets_and_the_inverse_in_float32(half: torch.dtype):
    torch.set_default_dtype(torch.float32)
    layer = iz.AffineCoupling(mlp(HALF, 6).to(half), mlp(HALF, 6).to(half), subnet_dtype=half)
    x = torch.randn(BATCH, FEATURES)
    y, log_det = layer.forward_and_log_det(x)
    assert y.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(layer.inverse(y), x)  # to float32, not to half
    torch.testing.assert_close(layer.inverse_and_log_det(y)[1], -log_det)


@pytest.mark.parametrize("build", [iz.RationalQuadraticCoupling, iz.MixtureLogisticCoupling, iz.GINCoupling])
@pytest.mark.parametrize(("inner", "outer"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_every_coupling_has_a_subnet_dtype(build, inner: torch.dtype, outer: torch.dtype, mode: str):
    """Whichever of the two is the coarser one, values come back in the stream's dtype."""
    parameters = build(nn.Identity()).map.parameters
    layer = build(mlp(HALF, 3 * parameters).to(inner), subnet_dtype=inner, mode=mode)
    x = torch.randn(BATCH, FEATURES, dtype=outer, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert (y.dtype, x.grad.dtype, layer.f[0].weight.grad.dtype) == (outer, outer, inner)
    if outer is torch.float32:
        torch.testing.assert_close(layer.inverse(y), x, rtol=1e-4, atol=1e-4)


def test_what_a_subnet_dtype_makes_no_sense_of_is_refused():
    for bad in (torch.int64, "bfloat16", torch.complex64):
        with pytest.raises(TypeError, match="AdditiveCoupling: Expected subnet_dtype to be a floating point dtype or"):
            iz.AdditiveCoupling(nn.Linear(2, 2), subnet_dtype=bad)
    layer = iz.AdditiveCoupling(lambda x: None, subnet_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Expected f to return a Tensor of shape"):
        layer(torch.randn(2, 4))


def test_streams_in_float32_are_rebuilt_as_float32_streams_are():
    """Fifty couplings: the input comes back from the output far better than if the streams were in bfloat16 too."""
    measured = {row["precision"]: row for row in precision.measure("additive", precision.Setting(depth=50, batch=16))}
    streams = measured["bfloat16 subnets, float32 streams"]
    assert measured["float32"]["gradient"] < 1e-5
    for name in ("input", "output", "gradient", "gradient in store"):
        assert streams[name] < measured["bfloat16"][name]
    assert streams["input"] < measured["bfloat16"]["input"] / 20


# ---- layers that compute in less than they take ---------------------------------------------------------------------


class Mixed(iz.InvertibleModule):
    """Float32 weights that take float64 inputs and return float64."""

    def __init__(self, error: float = 0.0, **options) -> None:
        super().__init__(**options)
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(FEATURES, FEATURES))[0].float())
        self.error = error

    def function(self, x: Tensor) -> Tensor:
        return (x.float() @ self.weight).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        return (y.float() @ self.weight.T * (1 + self.error)).to(y.dtype)


@pytest.mark.parametrize("trains", [True, False])
def test_a_float32_layer_in_a_float64_stack(mode: str, trains: bool):
    net = nn.Sequential(*(layer for _ in range(3) for layer in (Mixed(mode=mode), iz.Reverse(mode=mode))))
    net.requires_grad_(trains)
    net(torch.randn(BATCH, FEATURES, dtype=torch.float64, requires_grad=True)).square().sum().backward()


@pytest.mark.parametrize("outer", [nn.Sequential, iz.InvertibleSequential])
def test_what_a_coarse_layer_lost_is_not_held_against_those_before_it(outer):
    """The exact Reverse gets back what the float32 layer behind it could rebuild."""
    net = outer(iz.Reverse(), iz.Reverse(), Mixed())
    net(torch.randn(BATCH, FEATURES, dtype=torch.float64, requires_grad=True)).square().sum().backward()


def test_the_tolerance_of_float64_layers_stays():
    """Neither behind a float32 layer nor alone may a float64 layer be wrong by what float32 would allow."""

    class Off(iz.InvertibleModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def function(self, x: Tensor) -> Tensor:
            return x * self.scale

        def inverse(self, y: Tensor) -> Tensor:
            return y / self.scale * (1 + 1e-5)

    x = torch.randn(BATCH, FEATURES, dtype=torch.float64, requires_grad=True)
    for net in (Off(), nn.Sequential(Mixed(), Off())):
        with pytest.raises(RuntimeError, match="Expected Off to be replayed within a relative error of 1.5e-08"):
            net(x).sum().backward()


def test_a_wrong_inverse_in_a_coarse_layer_is_still_seen():
    with pytest.raises(RuntimeError, match="Expected Mixed to be replayed within a relative error of 3.5e-04"):
        Mixed(error=0.01)(torch.randn(BATCH, FEATURES, dtype=torch.float64, requires_grad=True)).sum().backward()
