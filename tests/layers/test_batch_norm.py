"""InvertibleBatchNorm against torch's batch norm, in training and eval mode, and its two inverses."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz

MODES = ("store", "recompute", "invert")
CALLS = ("forward", "forward_and_log_det")


def randn(*shape, **options):
    return torch.randn(shape, dtype=torch.float64, **options)


def data(*shape):
    return 5 + 2 * randn(*shape)


def pair(features=3, *, seen=True, **options):
    """A layer and torch's, with the same weights and running statistics."""
    ours = iz.InvertibleBatchNorm(features, dtype=torch.float64, **options)
    options.pop("mode", None)
    options.pop("max_log_scale", None)
    torchs = nn.BatchNorm1d(features, dtype=torch.float64, **options)
    torchs._check_input_dim = lambda x: None
    with torch.no_grad():
        if ours.log_scale is not None:
            ours.log_scale.copy_(0.5 * randn(features))
            ours.bias.copy_(randn(features))
            torchs.weight.copy_(weight_of(ours))
            torchs.bias.copy_(ours.bias)
        if seen and ours.running_mean is not None:
            x = data(9, features)
            for layer in (ours, torchs):
                layer(x)
    return ours, torchs


def weight_of(layer):
    a = layer.max_log_scale
    return (a * torch.tanh(layer.log_scale / a)).exp()


def assert_same_statistics(ours, torchs):
    for name, value in torchs.named_buffers():
        assert_close(ours.get_buffer(name), value, rtol=1e-12, atol=1e-12)


def assert_same_derivatives(ours, torchs, x, call="forward"):
    """First and second derivatives by x and all parameters."""
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [ours(xs[0]) if call == "forward" else ours.forward_and_log_det(xs[0])[0], torchs(xs[1])]
    assert_close(*ys, rtol=1e-10, atol=1e-10)
    weights = [[] if ours.log_scale is None else [ours.log_scale, ours.bias], [*torchs.parameters()]]
    first = [
        torch.autograd.grad(y.sin().sum(), (z, *w), create_graph=True) for z, y, w in zip(xs, ys, weights, strict=True)
    ]
    second = [
        torch.autograd.grad(sum(g.cos().sum() for g in gs[:1]), (z, *w[:1]))
        for z, gs, w in zip(xs, first, weights, strict=True)
    ]
    for mine, theirs in (first, second):
        expected = [*theirs]
        if ours.log_scale is not None:
            (slope,) = torch.autograd.grad(weight_of(ours).sum(), ours.log_scale)
            expected[1] = expected[1] * slope
        assert_close([*mine], expected, rtol=1e-9, atol=1e-9)


# ---- as torch's ----


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 2, 3), (2, 3, 2, 1, 2)])
def test_values_derivatives_and_statistics_are_torchs(shape, training, mode, call):
    ours, torchs = pair(mode=mode)
    for layer in (ours, torchs):
        layer.train(training)
    for _ in range(2):
        assert_same_derivatives(ours, torchs, data(*shape), call)
        assert_same_statistics(ours, torchs)
    assert ours.num_batches_tracked == (3 if training else 1)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"momentum": 0.7}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_options_are_torchs(options, training, mode):
    ours, torchs = pair(mode=mode, **options)
    for layer in (ours, torchs):
        layer.train(training)
    for _ in range(3):
        assert_same_derivatives(ours, torchs, data(5, 3, 2))
        assert_same_statistics(ours, torchs)


def test_state_dict_has_the_keys_of_torchs_but_for_the_weight():
    ours, torchs = pair()
    theirs = {"log_scale" if name == "weight" else name for name in torchs.state_dict()}
    assert set(ours.state_dict()) == theirs
    other = iz.InvertibleBatchNorm(3).double()
    other.load_state_dict(ours.state_dict(), strict=True)
    x = data(4, 3)
    assert_close(other.eval()(x), ours.eval()(x), rtol=0, atol=0)
    other.reset_parameters()
    assert_close(other(x), x / (1 + 1e-5) ** 0.5, rtol=1e-12, atol=1e-12)


def test_eval_mode_between_forward_and_backward_changes_nothing():
    ours, torchs = pair()
    x = data(5, 3).requires_grad_()
    ys = [ours(x), torchs(x)]
    ours.eval()
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in ys]
    assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert_same_statistics(ours, torchs)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_move_once_a_step_in_a_chain(mode):
    chain = iz.InvertibleSequential(
        iz.InvertibleBatchNorm(4), iz.AffineCoupling(nn.Linear(2, 4)), iz.InvertibleBatchNorm(4), mode=mode
    ).double()
    for step in range(1, 4):
        y, log_det = chain.forward_and_log_det(data(6, 4).requires_grad_())
        before = [b.clone() for b in chain.buffers()]
        (y.sin().sum() + log_det.sum()).backward()
        assert_close([*chain.buffers()], before, rtol=0, atol=0)
        assert chain[0].num_batches_tracked == chain[2].num_batches_tracked == step


# ---- log-determinants and inverses ----


@pytest.mark.parametrize("mode", MODES)
def test_the_log_determinant_holds_statistics_fixed_and_passes_gradients_through_them(mode):
    ours, _ = pair(mode=mode)
    x = data(6, 3, 4).requires_grad_()
    _, log_det = ours.forward_and_log_det(x)
    std = (x.var((0, 2), correction=0) + ours.eps).sqrt()
    expected = (4 * (weight_of(ours).log() - std.log()).sum()).expand(6)
    assert_close(log_det, expected, rtol=1e-10, atol=1e-10)
    assert_close(ours.log_det(x), expected, rtol=1e-10, atol=1e-10)
    assert ours.num_batches_tracked == 2  # log_det alone moves nothing
    given = x, ours.log_scale
    gradients = [torch.autograd.grad(value.square().sum(), given) for value in (log_det, expected)]
    assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_the_function_returns_the_statistics_that_invert_it():
    ours, _ = pair()
    x = data(6, 3, 4)
    y, mean, std = ours.function(x)
    assert_close(mean, x.mean((0, 2)), rtol=1e-12, atol=1e-12)
    assert_close(std, (x.var((0, 2), correction=0) + 1e-5).sqrt(), rtol=1e-12, atol=1e-12)
    assert_close(ours.inverse(y, mean, std), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_inverse_uses_running_statistics(mode, training):
    ours, torchs = pair(mode=mode)
    ours.train(training)
    torchs.eval()
    y = data(4, 3, 2).requires_grad_()
    x, log_det = ours.inverse_and_log_det(y)
    assert_close(torchs(x), y, rtol=1e-10, atol=1e-10)
    slopes = weight_of(ours) / (ours.running_var + ours.eps).sqrt()
    assert_close(log_det, (-2 * slopes.log().sum()).expand(4), rtol=1e-10, atol=1e-10)
    for other in (ours.inverse(y), ours.inv(y), iz.Inverse(ours)(y), iz.InvertibleSequential(ours).inverse(y)):
        assert_close(other, x, rtol=0, atol=0)
    other, other_log_det = iz.Inverse(ours).forward_and_log_det(y)
    assert_close(other_log_det, log_det, rtol=1e-12, atol=1e-12)
    assert_close(ours.inv.forward_and_log_det(y), (x, log_det), rtol=1e-12, atol=1e-12)
    got, expected = (torch.autograd.grad(z.sin().sum() + w.sum(), y) for z, w in ((other, other_log_det), (x, log_det)))
    assert_close(got, expected, rtol=1e-10, atol=1e-10)
    x, log_det = ours.inverse_and_log_det(y)
    plain = (y - ours.bias.view(-1, 1)) / slopes.view(-1, 1) + ours.running_mean.view(-1, 1)
    given = y, ours.log_scale, ours.bias
    gradients = [torch.autograd.grad(value.sin().sum(), given) for value in (x, plain)]
    assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert ours.num_batches_tracked == 1
    with torch.no_grad():
        assert_close(ours.inv.inv(x), y, rtol=1e-10, atol=1e-10)


# ---- precision and batches ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_statistics_in_single(dtype):
    layer, x = iz.InvertibleBatchNorm(3, dtype=dtype), torch.randn(64, 3).to(dtype).requires_grad_()
    y, mean, std = layer.function(x)
    assert (y.dtype, mean.dtype, std.dtype) == (dtype, torch.float32, torch.float32)
    assert_close(layer.inverse(y, mean, std), x, rtol=1e-2, atol=2e-2)
    y, log_det = layer.forward_and_log_det(x)
    (y.float().sin().sum() + log_det.sum()).backward()
    assert x.grad.isfinite().all()
    wide = copy.deepcopy(layer).double()
    log_dets = [each.inverse_and_log_det(y)[1].double() for each, y in ((layer, x), (wide, x.double()))]
    assert_close(*log_dets, rtol=1e-5, atol=1e-5)


def test_the_inverse_is_in_the_mode_of_its_layer_and_compiled_with_it():
    layer, graphs = iz.InvertibleBatchNorm(3).eval(), []
    assert not layer.inv.training
    assert layer.train().inv.training
    torch.compiler.reset()
    layer.compile(backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad():
        layer.inv(torch.randn(4, 3))
    assert graphs


def test_autocast():
    layer, x = iz.InvertibleBatchNorm(3), torch.randn(64, 3).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_moves_nothing(mode, training):
    layer = iz.InvertibleBatchNorm(3, mode=mode).train(training)
    before = [b.clone() for b in layer.buffers()]
    x = torch.randn(0, 3, 2, requires_grad=True)
    y, log_det = layer.forward_and_log_det(x)
    (y.sum() + log_det.sum()).backward()
    assert layer.log_scale.grad.isfinite().all()
    assert log_det.shape == (0,)
    assert_close([*layer.buffers()], before, rtol=0, atol=0)


def test_a_constant_feature_comes_back():
    layer, x = iz.InvertibleBatchNorm(3), torch.randn(8, 3)
    x[:, 1] = 7
    x.requires_grad_()
    layer(x).sin().sum().backward()
    assert x.grad.isfinite().all()
    assert_close(layer.inverse(*layer.function(x)), x, rtol=1e-5, atol=1e-5)
