"""PeriodicConv: a convolution around the edges, and a solve per frequency."""

import math

import pytest
import torch
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.linear.periodic import frequency_response, multiplicity
from tests.layers.helpers import inputs, jacobian, perturbed

CASES = [
    (3, (2, 3, 4, 5)),
    (3, (2, 3, 5, 4)),
    ((5, 2), (2, 2, 6, 3)),
    ((3,), (2, 3, 6)),
    ((4,), (2, 3, 7)),
    ((3, 1, 2), (2, 2, 3, 2, 4)),
    (1, (2, 3, 2, 3)),
]
SMALL = [(3, (2, 2, 1, 1)), (5, (2, 2, 2, 3)), ((7,), (2, 2, 2)), ((3, 3), (2, 2, 2, 1))]

all_cases = pytest.mark.parametrize(("kernel_size", "shape"), CASES + SMALL, ids=str)


def conv(channels, kernel_size, std=1.0, dtype=torch.float64, **options):
    return perturbed(iz.PeriodicConv(channels, kernel_size, dtype=dtype, **options), std)


def rolled(x, kernel, bias):
    """The convolution as a sum of rolled images, which may be smaller than the kernel."""
    dims, y = tuple(range(2, x.ndim)), bias.view(-1, *[1] * (x.ndim - 2))
    for tap in torch.cartesian_prod(*(torch.arange(k) for k in kernel.shape[2:])).reshape(-1, len(dims)).tolist():
        offset = [t - (k - 1) // 2 for t, k in zip(tap, kernel.shape[2:])]
        moved = torch.roll(x, [-o for o in offset], dims)
        y = y + torch.einsum("oi,bi...->bo...", kernel[(..., *tap)], moved)
    return y


@all_cases
def test_equals_a_sum_of_rolled_images(kernel_size, shape):
    layer, x = conv(shape[1], kernel_size), inputs(*shape)
    y = layer(x)
    assert_close(y, rolled(x, layer.kernel, layer.bias))
    assert_close(layer.inverse(y), x)


@pytest.mark.parametrize("kernel_size", [1, 3, (3, 5), (5, 1), (2, 4)])
def test_equals_a_circular_convolution_of_torch(kernel_size):
    layer, x = conv(3, kernel_size), inputs(2, 3, 6, 7)
    other = torch.nn.Conv2d(3, 3, kernel_size, padding="same", padding_mode="circular", dtype=torch.float64)
    other.load_state_dict({"weight": layer.kernel, "bias": layer.bias})
    assert_close(layer(x), other(x))


@pytest.mark.parametrize("sizes", [(1,), (2,), (5,), (6,), (3, 4), (4, 3), (1, 1), (2, 3, 4)], ids=str)
def test_frequencies_are_those_of_the_full_transform(sizes):
    image = torch.zeros(sizes, dtype=torch.float64)
    assert multiplicity(sizes, image.device).sum() == math.prod(sizes)
    kernel = torch.randn(2, 2, *[3] * len(sizes), dtype=torch.float64)
    half = torch.linalg.slogdet(frequency_response(kernel, sizes)).logabsdet * multiplicity(sizes, image.device)
    matrix = jacobian(lambda x: rolled(x, kernel, kernel.new_zeros(2)), torch.zeros(2, *sizes, dtype=torch.float64))
    assert_close(half.sum(), torch.linalg.slogdet(matrix).logabsdet)


def test_starts_as_the_identity():
    layer, x = iz.PeriodicConv(3, 3), torch.randn(2, 3, 4, 5)
    y, log_det = layer.forward_and_log_det(x)
    assert_close(y, x, rtol=0, atol=1e-6)
    assert_close(log_det, torch.zeros(2))
    y.square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("sizes", [(6, 6), (1, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("weights", ["normal", "constant"])
def test_condition_number_is_bounded(sizes, weights):
    layer = conv(3, 3, 100.0, max_norm=0.8)
    if weights == "constant":
        torch.nn.init.constant_(layer.weight, -1e4)
    singular = torch.linalg.svdvals(jacobian(layer.function, inputs(3, *sizes)))
    assert singular.max() / singular.min() < 9 * math.exp(2)


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e3])
def test_large_images_survive_training_in_float32(scale):
    layer = conv(4, 3, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.mul_(scale), layer.log_scale.mul_(scale)
        x = torch.randn(2, 4, 32, 32)
        assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-4)
        single = layer.log_det(x)
        assert_close(single, layer.double().log_det(x.double()).float(), rtol=1e-5, atol=1e-3)
