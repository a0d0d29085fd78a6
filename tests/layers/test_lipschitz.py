"""Bounds on spectral norms."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import invzoo as iz
from invzoo.layers.residual.lipschitz import conv_norm_bound, norm_bound

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 4, 6), (40, 40), (100, 30)])
@pytest.mark.parametrize("scale", [1e-12, 1, 1e12])
def test_norms_are_bounded_closely(dtype, shape, scale):
    a = scale * torch.randn(shape, dtype=dtype)
    exact, bound = torch.linalg.matrix_norm(a, 2), norm_bound(a)
    assert (bound >= exact).all()
    assert (bound <= exact * min(shape[-2:]) ** (1 / 256) * (1 + 1e-5)).all()


def test_the_worst_matrix_is_orthogonal():
    q = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    assert_close(norm_bound(q).item(), 64 ** (1 / 256), rtol=1e-12, atol=0)


def test_wide_matrices_cost_no_more_than_tall_ones():
    counts = []
    for shape in ((2, 60), (60, 2)):
        with FlopCounterMode(display=False) as counter:
            norm_bound(torch.randn(shape))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_zero_has_norm_zero_and_a_gradient():
    a = torch.zeros(3, 3, requires_grad=True)
    norm_bound(a).backward()
    assert norm_bound(a) < 1e-30
    assert a.grad.isfinite().all()


def matrix_of(layer, *size):
    """The matrix of a convolution."""
    x = torch.zeros(layer.in_channels, *size, dtype=layer.weight.dtype)
    return torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())


CONVS = [
    lambda **k: nn.Conv1d(2, 3, 3, padding=1, **k),
    lambda **k: nn.Conv1d(2, 3, 4, padding=2, **k),
    lambda **k: nn.Conv1d(3, 3, 5, padding=2, padding_mode="circular", **k),
    lambda **k: nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=2, **k),
    lambda **k: nn.Conv2d(2, 3, 3, padding=1, **k),
    lambda **k: nn.Conv2d(2, 2, 3, padding=1, stride=2, **k),
    lambda **k: nn.Conv2d(4, 4, (1, 3), groups=4, padding="same", **k),
    lambda **k: nn.Conv2d(3, 2, 1, **k),
    lambda **k: nn.ConvTranspose2d(2, 3, 3, stride=2, **k),
    lambda **k: nn.ConvTranspose1d(4, 2, 3, groups=2, **k),
    lambda **k: nn.Conv3d(1, 2, 3, padding=1, **k),
]


@pytest.mark.parametrize("make", CONVS)
def test_convolutions_are_bounded_closely(make):
    layer = make(dtype=torch.float64)
    dims = layer.weight.ndim - 2
    for _ in range(5):
        nn.init.normal_(layer.weight)
        exact = max(
            torch.linalg.matrix_norm(matrix_of(layer, *[n] * dims), 2) for n in ((4, 5) if dims == 3 else (9, 12))
        )
        bound = conv_norm_bound(layer.weight, layer.groups)
        assert bound >= exact
        slack = {1: 1.15, 2: 1.25, 3: 1.8}[dims] * (1.6 if max(layer.stride) > 1 else 1)
        assert bound <= slack * exact


@pytest.mark.parametrize("make", [CONVS[3], CONVS[6], CONVS[9]])
def test_groups_are_bounded_each_for_itself(make):
    layer = make(dtype=torch.float64)
    nn.init.normal_(layer.weight, std=10)
    iz.lipschitz(layer, 0.5)
    exact = torch.linalg.matrix_norm(matrix_of(layer, *[9] * (layer.weight.ndim - 2)), 2)
    assert 0.4 < exact <= 0.5


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_transfer_function_is_bounded_between_its_samples(kernel, dims):
    # A plane wave off the sampled frequencies, at which the kernel's transfer function is largest.
    for phase in itertools.product(torch.linspace(0, 0.4, 5, dtype=torch.float64), repeat=dims):
        waves = [torch.polar(torch.ones(kernel, dtype=torch.float64), torch.arange(kernel) * p) for p in phase]
        wave = waves[0] if dims == 1 else torch.outer(*waves)
        weight = torch.stack((wave.real, wave.imag)).unsqueeze(1) / kernel ** (dims / 2)
        grid = torch.fft.fftn(weight, s=[256] * dims, dim=tuple(range(2, 2 + dims)))
        exact = torch.linalg.matrix_norm(grid.movedim((0, 1), (-2, -1)), 2).max()
        assert exact * 0.9999 <= conv_norm_bound(weight) <= 1.09 * exact


def norms(net, size=6):
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            yield torch.linalg.matrix_norm(layer.weight.double(), 2)
        elif isinstance(layer, nn.Conv2d):
            yield torch.linalg.matrix_norm(matrix_of(layer, size, size).double(), 2)


def make(dtype=torch.float32, coeff=0.9):
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ELU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 5)
    return iz.lipschitz(nn.Sequential(*layers).to(dtype), coeff)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coeff", [0.5, 0.97])
def test_norms_stay_below_the_bound_in_training(dtype, coeff):
    net = make(dtype, coeff)
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    for _ in range(4):
        net(torch.randn(3, 2, 6, 6, dtype=dtype)).square().sum().neg().backward()
        optimizer.step()
        for training in (True, False):
            assert all(norm <= coeff * (1 + 1e-6) for norm in norms(net.train(training)))
    assert max(norms(net)) > 0.8 * coeff


def test_small_weights_stay_as_they_are():
    net = iz.lipschitz(nn.Linear(3, 3), 0.9)
    net.weight = torch.eye(3) / 2
    assert torch.equal(net.weight, torch.eye(3) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net = make().to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(50)
    assert net[0].weight.dtype is dtype
    assert all(norm <= 0.9 * (1 + 4 * torch.finfo(dtype).eps) for norm in norms(net))


def test_gradients():
    layer = iz.lipschitz(nn.Conv1d(2, 2, 3, dtype=torch.float64), 0.5)
    parametrization = layer.parametrizations.weight[0]
    weight = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(parametrization, weight)
    assert torch.autograd.gradgradcheck(parametrization, weight)


def test_copies_and_states():
    net = make()
    other = copy.deepcopy(net)
    assert_close(other[0].weight, net[0].weight)
    fresh = make()
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(1, 2, 6, 6)
    assert_close(fresh(x), net(x))
    assert not [*net.buffers()]


@pytest.mark.parametrize("make", [lambda: nn.Linear(9, 9), lambda: nn.Conv2d(2, 4, 3)])
def test_autocast_leaves_the_bound_alone(make):
    layer = iz.lipschitz(make())
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(10)
    expected = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, expected)


def test_a_chain_is_a_contraction():
    net = make()
    x, y = torch.randn(2, 64, 2, 6, 6)
    assert ((net(x) - net(y)).norm(dim=1) <= 0.9**3 * (x - y).flatten(1).norm(dim=1)).all()


def test_a_refused_net_is_left_alone():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="LayerNorm"):
        iz.lipschitz(net)
    assert type(net[0]) is nn.Linear
