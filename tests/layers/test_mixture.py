"""Mixtures of logistics: the map, its inverse, and the coupling."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.maps.mixture import MixtureOfLogistics
from tests.layers.helpers import back, there


def draw(mixture, *shape, size=10.0, dtype=torch.float64):
    h = size * torch.randn(shape[0], mixture.parameters * shape[1], *shape[2:], dtype=dtype)
    return 2 * torch.randn(shape, dtype=dtype, requires_grad=True), h.requires_grad_()


def reference(mixture, x, h):
    """Value and derivative of one x, by plain sums of distribution functions and densities."""
    k, a = mixture.components, mixture.max_log_scale
    h = [mixture.gain * v for v in h.tolist()]
    weights = [math.exp(10 * math.tanh(v / 10)) for v in h[:k]]
    start = [0.3 * (2 * i / (k - 1) - 1) if k > 1 else 0 for i in range(k)]
    means = [mixture.max_mean * math.tanh((v + m) / mixture.max_mean) for v, m in zip(h[k : 2 * k], start)]
    scales = [math.exp(a * math.tanh(v / a)) for v in h[2 * k : 3 * k]]
    outer, shift = math.exp(a * math.tanh(h[3 * k] / a)), h[3 * k + 1]
    below = [1 / (1 + math.exp(-(x - m) / s)) for m, s in zip(means, scales)]
    total = sum(w * p for w, p in zip(weights, below)) / sum(weights)
    density = sum(w * p * (1 - p) / s for w, p, s in zip(weights, below, scales)) / sum(weights)
    return outer * math.log(total / (1 - total)) + shift, outer * density / (total * (1 - total))


# ---- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [MixtureOfLogistics(), MixtureOfLogistics(1), MixtureOfLogistics(3, 2.0, 0.5, 1.0)])
def test_agrees_with_plain_sums(mixture):
    x, h = draw(mixture, 60, 1, size=1 / mixture.gain)
    wanted = torch.tensor([reference(mixture, a, b) for a, b in zip(x.flatten().tolist(), h)], dtype=torch.float64)
    y, log_slope = there(mixture, x, h, 1)
    assert_close(y.flatten(), wanted[:, 0])
    assert_close(log_slope.exp().flatten(), wanted[:, 1])
    assert_close(there(mixture, x, h, 1)[0], y)
    assert_close(there(mixture, x, h, 1)[1], log_slope)
    assert_close(torch.autograd.grad(y.sum(), x)[0].log(), log_slope)
    assert_close(back(mixture, y, h, 1), x)


@pytest.mark.parametrize("components", [1, 2, 4, 16])
def test_zero_parameters_are_nearly_the_identity(components):
    mixture = MixtureOfLogistics(components)
    x = torch.linspace(-30, 30, 601, dtype=torch.float64).unsqueeze(1)
    h = torch.zeros(1, mixture.parameters, dtype=torch.float64)
    y, log_slope = there(mixture, x, h, 1)
    assert_close(y, x, rtol=0, atol=0.05)
    assert -0.03 < log_slope.min() <= log_slope.max() < 1e-12


def test_components_that_start_alike_become_different():
    layer = iz.MixtureLogisticCoupling(nn.Linear(1, 14), zero_init=True)
    layer(torch.randn(50, 2)).square().sum().backward()
    weights, means, scales = layer.f.bias.grad[:12].chunk(3)
    for block in (weights, means, scales):
        assert block.unique().numel() == 4


@pytest.mark.parametrize("size", [0.0, 1.0, 10.0, 100.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_comes_back_as_exactly_as_rounding_allows(size, dtype):
    mixture = MixtureOfLogistics()
    h = (torch.randn(2000, mixture.parameters, dtype=dtype) * size).nan_to_num(nan=0, posinf=size, neginf=-size)
    h[:, -1] = 0  # the shift alone has no bound
    x = 3 * torch.randn(2000, 1, dtype=dtype)
    x[:50] *= 1e5
    y, log_slope = there(mixture, x, h, 1)
    errors = (back(mixture, y, h, 1) - x).abs() * log_slope.exp() / y.abs().clamp(min=1)
    assert errors.max() < 32 * torch.finfo(dtype).eps
    assert -7.5 < log_slope.min() <= log_slope.max() <= 2 + 1e-5


def test_increases():
    mixture = MixtureOfLogistics()
    x = torch.linspace(-10, 10, 5001, dtype=torch.float64).expand(20, 1, -1)
    h = 100 * torch.randn(20, mixture.parameters, 1, dtype=torch.float64)
    assert (there(mixture, x, h, 1)[0].diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_values_have_the_slope_of_one_component(dtype):
    mixture = MixtureOfLogistics(2, gain=1.0)
    h = torch.tensor([[0.0, 0.0, 1.0, -1.0, 0.5, -0.5, 0.0, 0.0]], dtype=dtype)
    x = torch.tensor([[-1e6], [1e6], [-100.0], [100.0]], dtype=dtype, requires_grad=True)
    y, log_slope = there(mixture, x, h, 1)
    slow = torch.full_like(x, -math.tanh(0.5))  # the wider component fills both tails
    assert_close(log_slope, slow, rtol=0, atol=1e-5)
    assert_close(torch.autograd.grad(y.sum(), x)[0].log(), slow, rtol=0, atol=1e-3)
    assert_close(back(mixture, y, h, 1), x)


# ---- the coupling ---------------------------------------------------------------------------------------------------
