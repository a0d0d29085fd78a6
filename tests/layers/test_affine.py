"""ElementwiseAffine and ConditionalAffine: their formulas, their conditioners, and what they refuse."""

import copy

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


def test_a_conditioner_of_zeros_changes_nothing():
    plain, x = trained(iz.ElementwiseAffine(3, dim=1)), randn(2, 3, 4)
    conditioned = iz.ElementwiseAffine(
        3, dim=1, conditioner=lambda context: context.new_zeros(len(context), 6)
    ).double()
    conditioned.load_state_dict(plain.state_dict())
    assert_close(conditioned(x, context=randn(2, 1)), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_function_as_conditioner_moves_the_buffers_of_its_modules_once(mode):
    norm = nn.BatchNorm1d(6, affine=False).double()
    layer = iz.ConditionalAffine(lambda context: norm(context), mode=mode)
    layer(randn(4, 3, requires_grad=True), context=randn(4, 6)).sum().backward()
    assert norm.num_batches_tracked == 1


def test_a_chain_gives_the_context_to_the_layers_that_take_it():
    conditioned = iz.ElementwiseAffine(3, dim=1, conditioner=nn.Linear(2, 6))
    chain = trained(iz.InvertibleSequential(iz.ElementwiseAffine(3), conditioned, iz.Reverse()))
    x, context = randn(2, 3), randn(2, 2)
    y, log_det = chain.forward_and_log_det(x, context=context)
    assert_close(chain.inverse(y, context=context), x, rtol=1e-10, atol=1e-10)
    assert_close(log_det, chain[0].log_det(x) + chain[1].log_det(x, context=context), rtol=1e-10, atol=1e-10)
    with pytest.raises(TypeError, match="Expected side inputs among"):
        iz.InvertibleSequential(iz.ElementwiseAffine(3))(x.float(), context=context)


# ---- precision ----


def test_a_deep_stack_comes_back_in_float32():
    layers = [iz.ElementwiseAffine(3, dim=1, max_log_scale=0.3, conditioner=nn.Linear(2, 6)) for _ in range(16)]
    chain = trained(iz.InvertibleSequential(*layers)).float()
    x, context = torch.randn(5, 3, 4), torch.randn(5, 2)
    assert_close(chain.inverse(chain(x, context=context), context=context), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    layer, x = trained(iz.ElementwiseAffine(3, dim=1)).to(dtype), torch.randn(4, 3, 2).to(dtype)
    y, log_det = layer.forward_and_log_det(x)
    assert y.dtype == dtype
    assert log_det.dtype == torch.float32
    wide = copy.deepcopy(layer).float()
    assert_close(y, wide(x.float()).to(dtype), rtol=0, atol=0)
    assert_close(log_det, wide.log_det(x.float()), rtol=0, atol=0)


def test_autocast_leaves_scales_in_single_precision():
    layer, x = iz.ConditionalAffine(nn.Linear(2, 6)), torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, context=torch.randn(4, 2))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.isfinite().all()


# ---- what they refuse ----


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: iz.ElementwiseAffine(0), ValueError, "ElementwiseAffine: Expected features to be at least 1; got 0"),
        (lambda: iz.ElementwiseAffine(3, max_log_scale=0.0), ValueError, "Expected max_log_scale to be positive"),
        (lambda: iz.ElementwiseAffine(3, conditioner=3), TypeError, "Expected conditioner to be a module or a fun"),
        (lambda: iz.ConditionalAffine(None), TypeError, "ConditionalAffine: Expected conditioner to be a module or a"),
        (lambda: iz.ConditionalAffine(nn.Identity(), scale="no"), ValueError, "Expected scale to be one of 'tanh'"),
        (lambda: iz.ElementwiseAffine(3)(torch.ones(2, 4)), ValueError, r"have size 3 in dim 1; got shape \(2, 4\)"),
        (lambda: iz.ElementwiseAffine(3)(torch.ones(3)), ValueError, r"have size 3 in dim 1; got shape \(3,\)"),
        (lambda: iz.ElementwiseAffine(3)(torch.ones(2, 3).double()), TypeError, "be of the layer's dtype torch.float3"),
        (lambda: iz.ElementwiseAffine(3)(torch.ones(2, 3).int()), TypeError, "be real floating point; got torch.int32"),
        (lambda: iz.ElementwiseAffine(3)(torch.ones(2, 3) * 1j), TypeError, "be real floating point; got torch.comp"),
        (lambda: iz.ElementwiseAffine(3)([1.0]), TypeError, "Expected x to be a Tensor; got list"),
        (
            lambda: iz.ElementwiseAffine(3)(torch.ones(2, 3), context=1),
            TypeError,
            r"side inputs among \[\]; got \['con",
        ),
        (
            lambda: iz.ElementwiseAffine(3, conditioner=nn.Identity())(torch.ones(2, 3)),
            TypeError,
            "Expected context to be what the conditioner takes; got None",
        ),
        (
            lambda: iz.ElementwiseAffine(3, conditioner=nn.Identity())(torch.ones(2, 3), context=torch.ones(2, 3)),
            ValueError,
            r"Expected conditioner to return shape \(2, 6\); got \(2, 3\)",
        ),
        (
            lambda: iz.ConditionalAffine(nn.Identity(), dim=1)(torch.ones(2, 3, 4), context=torch.ones(2, 6, 3)),
            ValueError,
            r"return shape \(2, 6\) or \(2, 6, 4\); got \(2, 6, 3\)",
        ),
        (
            lambda: iz.ConditionalAffine(nn.Identity(), dim=1)(torch.ones(2, 3, 4), context=torch.ones(3, 6)),
            ValueError,
            r"return shape \(2, 6\) or \(2, 6, 4\); got \(3, 6\)",
        ),
        (
            lambda: iz.ConditionalAffine(lambda c: [c])(torch.ones(2, 3), context=torch.ones(2, 6)),
            TypeError,
            "Expected conditioner to return a Tensor; got list",
        ),
        (
            lambda: iz.ConditionalAffine(lambda c: c + 0j)(torch.ones(2, 3), context=torch.ones(2, 6)),
            TypeError,
            "Expected conditioner to return real numbers; got torch.complex64",
        ),
        (lambda: iz.ConditionalAffine(nn.Identity())(torch.ones(2, 3).int()), TypeError, "real floating point; got"),
        (
            lambda: iz.ConditionalAffine(nn.Identity(), dim=3)(torch.ones(2, 3), context=torch.ones(2, 6)),
            ValueError,
            r"Expected x to have a dim 3; got shape \(2, 3\)",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_coupling_takes_a_scale_of_ones_own():
    layer, x = trained(iz.AffineCoupling(nn.Linear(2, 4), scale=torch.sin)), randn(3, 4)
    h, shift = layer.f(x[:, 2:]).chunk(2, 1)
    y, log_det = layer.forward_and_log_det(x)
    assert_close(y[:, :2], x[:, :2] * h.sin().exp() + shift)
    assert_close(log_det, h.sin().sum(1))
    iz.testing.assert_invertible(layer, x)
