"""EmergingConv: two masked convolutions, bounded whatever they learn, and back-substitution."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.linear.emerging import back_substitute, corner_offsets, corner_times, raster_offsets, raster_times
from invzoo.layers.linear.kernel_conv import contraction
from tests.layers.helpers import inputs, jacobian, perturbed

MASKS = ["raster", "corner"]
CASES = [
    (3, (2, 3, 4, 5)),
    ((5, 3), (2, 2, 3, 2)),
    ((1, 3), (2, 2, 3, 4)),
    ((3,), (2, 3, 6)),
    ((3, 1, 3), (2, 2, 3, 2, 4)),
    (5, (2, 2, 1, 1)),
    (1, (2, 3, 2, 3)),
]

all_masks = pytest.mark.parametrize("mask", MASKS)
all_cases = pytest.mark.parametrize(("kernel_size", "shape"), CASES, ids=str)


def conv(channels, kernel_size, std=1.0, dtype=torch.float64, **options):
    return perturbed(iz.EmergingConv(channels, kernel_size, dtype=dtype, **options), std)


def reference(layer, x):
    """The same with torch's own convolutions of kernels that are masked by hand."""
    ndim = len(layer.kernel_size)
    if layer.mask == "raster":
        sizes, centre = layer.kernel_size, [k // 2 for k in layer.kernel_size]
        pads = [k // 2 for k in reversed(layer.kernel_size) for _ in range(2)]
    else:
        sizes, centre = layer.kernel_size, [k - 1 for k in layer.kernel_size]
        pads = [pad for k in reversed(layer.kernel_size) for pad in (k - 1, 0)]
    taps = [t for t in itertools.product(*map(range, sizes)) if t <= tuple(centre)]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
    for raw, log_scale in zip(layer.weight, layer.log_scale):
        w = raw.clone()
        w[..., -1] = w[..., -1].tril(-1)
        w = w / math.sqrt(layer.channels * len(taps))
        rows, columns = w.abs().sum((1, 2)), w.abs().sum((0, 2))
        w = w / ((1 + rows[:, None, None] / layer.max_norm) * (1 + columns[:, None] / layer.max_norm)).sqrt()
        kernel = torch.zeros(layer.channels, layer.channels, *sizes, dtype=x.dtype)
        for i, tap in enumerate(taps):
            kernel[(..., *tap)] = w[..., i]
        kernel[(..., *centre)] += torch.eye(layer.channels, dtype=x.dtype)
        scale = torch.exp(layer.max_log_scale * torch.tanh(log_scale / layer.max_log_scale))
        x = convolve(F.pad(x, pads), kernel) * scale.view(-1, *[1] * ndim)
        x = x.flip(*range(1, x.ndim))
    return x + layer.bias.view(-1, *[1] * ndim)


@all_masks
@all_cases
def test_equals_masked_convolutions_of_torch(mask, kernel_size, shape):
    layer = conv(shape[1], kernel_size, mask=mask)
    x = inputs(*shape)
    assert_close(layer(x), reference(layer, x))
    assert_close(layer.inverse(layer(x)), x)
    assert_close(layer(layer.inverse(x)), x)


def test_starts_as_the_identity():
    layer, x = iz.EmergingConv(3, 3), torch.randn(2, 3, 4, 4)
    y, log_det = layer.forward_and_log_det(x)
    assert_close(y, x, rtol=0, atol=0)
    assert_close(log_det, torch.zeros(2))
    y.square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


@all_masks
def test_every_pixel_reaches_every_other_way(mask):
    """One map alone is triangular; both together have no order left."""
    reach = jacobian(conv(2, 3, mask=mask).function, inputs(2, 3, 3)) != 0
    centre, corner = 4, 8
    assert reach[centre].any()
    assert reach.view(2, 9, 2, 9)[0, centre, 0, 0]
    assert reach.view(2, 9, 2, 9)[0, centre, 0, corner]


@all_masks
@pytest.mark.parametrize("scale", [1.0, 3.0, 1e3])
def test_large_images_survive_training_in_float32(mask, scale):
    layer = conv(4, 3, dtype=torch.float32, mask=mask)
    with torch.no_grad():
        layer.weight.mul_(scale), layer.log_scale.mul_(scale)
        x = torch.randn(2, 4, 32, 32)
        assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-4)
        assert_close(layer(layer.inverse(x)), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 64, 4), (1, 3, 4, 64), (1, 3, 1, 64)], ids=str)
def test_weights_of_one_sign_survive_on_long_images(shape):
    """The worst case: unbounded, each step would multiply the error by what all taps add up to."""
    layer = iz.EmergingConv(3, 3)
    torch.nn.init.constant_(layer.weight, -50.0)
    x = torch.randn(shape)
    with torch.no_grad():
        assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", ["normal", "constant", "one", "row", "column"])
@pytest.mark.parametrize("shape", [(3, 3, 4), (4, 4, 9), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("bound", [0.5, 0.95])
def test_contraction_bounds_the_norm(weights, shape, bound):
    w = torch.zeros(shape, dtype=torch.float64)
    {
        "normal": lambda: w.normal_(),
        "constant": lambda: w.fill_(1),
        "one": lambda: w[0, -1, 1:2].fill_(1),
        "row": lambda: w[:1].fill_(1),
        "column": lambda: w[:, :1].fill_(1),
    }[weights]()
    for size in (1e-3, 1.0, 1e6):
        n = contraction(size * w, bound)
        # the norm of a convolution along an endless line is that of its response at the worst frequency
        angles = torch.outer(torch.arange(64.0).double() * (torch.pi / 32), torch.arange(shape[-1]).double())
        response = torch.einsum("oit,ft->foi", n.cdouble(), torch.polar(torch.ones_like(angles), angles))
        norms = torch.linalg.matrix_norm(response, 2)
        assert norms.max() < bound
        if weights != "normal" and size > 1:  # and it is tight
            assert norms.max() > 0.9 * bound


@all_masks
def test_condition_number_is_bounded(mask):
    layer = conv(2, 3, 100.0, mask=mask)
    singular = torch.linalg.svdvals(jacobian(layer.function, inputs(2, 4, 4)))
    assert singular.max() / singular.min() < 9 * math.exp(2)


@all_masks
@pytest.mark.parametrize("kernel_size", [(1,), (3,), (5, 3), (3, 3), (5, 5), (3, 3, 3), (1, 5, 3)], ids=str)
def test_all_taps_lead_back_in_time(mask, kernel_size):
    offsets, times = {"raster": (raster_offsets, raster_times), "corner": (corner_offsets, corner_times)}[mask]
    *before, centre = offsets(kernel_size)
    assert centre == (0,) * len(kernel_size)
    assert times(kernel_size)[-1] == 1
    for offset in before:
        assert sum(o * t for o, t in zip(offset, times(kernel_size))) < 0
    taps = math.prod(kernel_size)
    assert len(before) == len(set(before)) == (taps - 1 if mask == "corner" else (taps - 1) // 2)


def test_the_steps_are_few(monkeypatch):
    steps, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: steps.append(1) or addmm(*args, **options))
    y = torch.randn(2, 3, 7, 11)
    kernel = torch.cat([0.1 * torch.randn(3, 3, 4), torch.eye(3)[..., None]], -1)
    back_substitute(y, kernel, raster_offsets((3, 3)), raster_times((3, 3)))
    assert len(steps) == 11 + 2 * 6
    steps.clear()
    kernel = torch.cat([0.1 * torch.randn(3, 3, 8), torch.eye(3)[..., None]], -1)
    back_substitute(y, kernel, corner_offsets((3, 3)), corner_times((3, 3)))
    assert len(steps) == 11 + 6
