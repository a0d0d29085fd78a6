"""ElementwiseAffine and ConditionalAffine: their formulas, their conditioners, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.maps.affine import Affine
from tests.layers.helpers import perturbed, there

MODES = ("store", "recompute", "invert")


def randn(*shape, **options):
    return torch.randn(shape, dtype=torch.float64, **options)


def trained(layer, size=0.3):
    return perturbed(layer.double(), size)


# ---- the maps ----


@pytest.mark.parametrize("dim", [1, -1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_elementwise_affine_scales_and_shifts_each_feature(dim, bias):
    x = randn(2, 3, 4, 5)
    layer = trained(iz.ElementwiseAffine(x.shape[dim], dim=dim, bias=bias, max_log_scale=0.5), 2.0)
    shape = [1] * 4
    shape[dim] = -1
    s = 0.5 * torch.tanh(layer.log_scale / 0.5)
    b = layer.bias if bias else torch.zeros_like(s)
    y, log_det = layer.forward_and_log_det(x)
    assert_close(y, x * s.exp().view(shape) + b.view(shape), rtol=1e-12, atol=1e-12)
    assert_close(log_det, (s.sum() * (60 / x.shape[dim])).expand(2), rtol=1e-12, atol=1e-12)
    x_again, inverse_log_det = layer.inverse_and_log_det(y)
    assert_close(x_again, x, rtol=1e-12, atol=1e-12)
    assert_close(inverse_log_det, -log_det, rtol=1e-12, atol=1e-12)


def test_elementwise_affine_starts_as_the_identity_and_stays_bounded():
    layer, x = iz.ElementwiseAffine(3), torch.randn(4, 3)
    assert_close(layer(x), x, rtol=0, atol=0)
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([-1e9, 0.0, 1e9]))
    assert_close(layer.forward_and_log_det(torch.ones(1, 3))[0], torch.tensor([[-2.0, 0.0, 2.0]]).exp())
    layer.reset_parameters()
    assert_close(layer(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("scale", ["tanh", "softclip", "sigmoid", "unit", "exp", torch.sin])
def test_conditional_affine_is_the_map_of_the_couplings(scale):
    x, context = randn(2, 3, 4), randn(2, 5)
    layer = trained(iz.ConditionalAffine(nn.Linear(5, 6), dim=1, scale=scale, max_log_scale=1.5))
    h = layer.conditioner(context)[..., None]
    map_ = Affine(scale, 1.5)
    y, log_det = layer.forward_and_log_det(x, context=context)
    moved, log_slope = there(map_, x, h)
    assert_close(y, moved, rtol=1e-12, atol=1e-12)
    assert_close(log_det, log_slope.sum((1, 2)), rtol=1e-12, atol=1e-12)
    assert_close(layer.inverse(y, context=context), x, rtol=1e-9, atol=1e-9)


# ---- conditioners ----


@pytest.mark.parametrize(
    ("dim", "shape"),
    [(1, (2, 6)), (1, (2, 6, 4, 5)), (1, (2, 6, 1, 1)), (1, (1, 6, 4, 1)), (-1, (2, 10)), (-1, (2, 3, 4, 10))],
)
def test_a_conditioner_adds_to_the_parameters_in_any_shape_that_broadcasts(dim, shape):
    x, h = randn(2, 3, 4, 5), randn(*shape)
    layer = trained(iz.ElementwiseAffine(x.shape[dim], dim=dim, conditioner=nn.Identity()))
    blocks = h if len(shape) == 4 else (h[:, :, None, None] if dim == 1 else h[:, None, None, :])
    r, t = blocks.expand(*x.shape[: dim % 4], 2 * x.shape[dim], *x.shape[dim % 4 + 1 :]).chunk(2, dim)
    view = (1, -1, 1, 1) if dim == 1 else (-1,)
    s = 2 * torch.tanh((layer.log_scale.view(view) + r) / 2)
    y, log_det = layer.forward_and_log_det(x, context=h)
    assert_close(y, x * s.exp() + layer.bias.view(view) + t, rtol=1e-12, atol=1e-12)
    assert_close(log_det, s.sum((1, 2, 3)), rtol=1e-12, atol=1e-12)
    assert_close(layer.inverse(y, context=h), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [-1e9, 1e9])
def test_log_scales_stay_bounded_whatever_a_conditioner_returns(size):
    layer = iz.ElementwiseAffine(3, max_log_scale=0.5, conditioner=nn.Identity())
    context = torch.cat((torch.full((2, 3), size), torch.zeros(2, 3)), 1)
    y, log_det = layer.forward_and_log_det(torch.ones(2, 3), context=context)
    scale = 0.5 if size > 0 else -0.5
    assert_close(y, torch.full((2, 3), scale).exp())
    assert_close(log_det, torch.full((2,), 3 * scale))


@pytest.mark.parametrize("mode", MODES)
def test_a_function_as_conditioner_moves_the_buffers_of_its_modules_once(mode):
    norm = nn.BatchNorm1d(6, affine=False).double()
    layer = iz.ConditionalAffine(lambda context: norm(context), mode=mode)
    layer(randn(4, 3, requires_grad=True), context=randn(4, 6)).sum().backward()
    assert norm.num_batches_tracked == 1


# ---- precision ----


# ---- what they refuse ----


def test_a_coupling_takes_a_scale_of_ones_own():
    layer, x = trained(iz.AffineCoupling(nn.Linear(2, 4), scale=torch.sin)), randn(3, 4)
    h, shift = layer.f(x[:, 2:]).chunk(2, 1)
    y, log_det = layer.forward_and_log_det(x)
    assert_close(y[:, :2], x[:, :2] * h.sin().exp() + shift)
    assert_close(log_det, h.sin().sum(1))
    iz.testing.assert_invertible(layer, x)
