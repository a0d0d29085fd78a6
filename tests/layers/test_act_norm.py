"""ActNorm: what its first batch does, when it does, and that nothing else does."""

import copy
import io
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.normalisation import act_norm

MODES = ("store", "recompute", "invert")


def data(*shape, dtype=torch.float64):
    scale = torch.linspace(0.5, 3, shape[1], dtype=dtype).view(-1, *[1] * (len(shape) - 2))
    return scale * torch.randn(shape, dtype=dtype) + 5 * scale


def act_norm_of(features=3, **options):
    return iz.ActNorm(features, **{"dim": 1, "dtype": torch.float64, **options})


def state_of(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


# ---- the first batch ----


@pytest.mark.parametrize(("dim", "shape"), [(1, (9, 3)), (1, (5, 3, 4, 2)), (-1, (5, 4, 3)), (1, (1, 3, 8))])
def test_the_first_batch_comes_out_standardised(dim, shape):
    x = data(*shape) if dim == 1 else data(*shape[:1], *shape[:0:-1]).transpose(1, -1)
    layer = act_norm_of(dim=dim)
    y, log_det = layer.forward_and_log_det(x)
    dims = act_norm.dims_but(x, dim)
    assert_close(y.mean(dims), torch.zeros(3, dtype=y.dtype), rtol=0, atol=1e-12)
    assert_close(y.std(dims, correction=0), torch.ones(3, dtype=y.dtype), rtol=1e-12, atol=1e-12)
    pixels = x[0].numel() // 3
    expected = -x.std(dims, correction=0).log().sum() * pixels
    assert_close(log_det, expected.expand(len(x)), rtol=1e-12, atol=1e-12)
    assert_close(layer.inverse(y), x, rtol=1e-12, atol=1e-12)


def test_what_is_learned_scales_and_shifts_what_is_standardised():
    layer, x = act_norm_of(max_log_scale=0.5), data(9, 3)
    layer(x)
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([-9.0, 0.1, 0.3]))
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    s = 0.5 * torch.tanh(layer.log_scale / 0.5)
    expected = s.exp() * (x - x.mean(0)) / x.std(0, correction=0) + layer.bias
    assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


CALLS = {
    "layer": lambda layer, x: layer(x),
    "forward_and_log_det": lambda layer, x: layer.forward_and_log_det(x)[0],
    "inverse": lambda layer, x: layer.inverse(x),
    "inverse_and_log_det": lambda layer, x: layer.inverse_and_log_det(x)[0],
    "inv": lambda layer, x: layer.inv(x),
    "inv.forward_and_log_det": lambda layer, x: layer.inv.forward_and_log_det(x)[0],
    "inv.inverse": lambda layer, x: layer.inv.inverse(x),
    "Inverse": lambda layer, x: iz.Inverse(layer)(x),
    "Inverse twice": lambda layer, x: iz.Inverse(iz.Inverse(layer))(x),
    "Inverse.inverse_and_log_det": lambda layer, x: iz.Inverse(layer).inverse_and_log_det(x)[0],
    "container": lambda layer, x: iz.InvertibleSequential(iz.Reverse(dim=1), layer)(x),
    "container.inverse": lambda layer, x: iz.InvertibleSequential(layer, iz.Reverse(dim=1)).inverse(x),
    "container.inverse_and_log_det": lambda layer, x: iz.InvertibleSequential(layer).inverse_and_log_det(x)[0],
    "Inverse of a container": lambda layer, x: iz.Inverse(iz.InvertibleSequential(layer))(x),
    "Parallel.inverse": lambda layer, x: torch.cat(iz.Parallel(layer, iz.Identity()).inverse(x, x[:0]), 0),
    "MultiScale.inverse": lambda layer, x: iz.MultiScale(layer).inverse(x),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_the_first_call_in_any_direction_standardises_what_it_returns(call, mode):
    layer, x = act_norm_of(mode=mode, max_log_scale=0.5), data(9, 3, 2).requires_grad_()
    y = CALLS[call](layer, x)
    assert_close(y.mean((0, 2)), torch.zeros(3, dtype=y.dtype), rtol=0, atol=1e-12)
    assert_close(y.std((0, 2), correction=0), torch.ones(3, dtype=y.dtype), rtol=1e-12, atol=1e-12)
    before = state_of(layer)
    y.sin().sum().backward()
    for other in CALLS.values():
        other(layer, 7 * x)
    assert_close(state_of(layer), before, rtol=0, atol=0)


def test_an_inverse_that_starts_it_again_undoes_what_is_learned_first():
    layer, x = act_norm_of(max_log_scale=0.5), data(9, 3)
    nn.init.normal_(layer.log_scale)
    nn.init.normal_(layer.bias)
    y = layer.inverse(x)
    assert_close(y.mean(0), torch.zeros(3, dtype=y.dtype), rtol=0, atol=1e-12)
    assert_close(y.std(0, correction=0), torch.ones(3, dtype=y.dtype), rtol=1e-12, atol=1e-12)
    assert_close(layer(y), x, rtol=1e-12, atol=1e-12)


def test_a_constant_feature_of_an_inverse_stays_finite():
    layer, x = act_norm_of(min_std=0.01), data(9, 3)
    x[:, 1] = 4
    with pytest.warns(UserWarning, match=r"ActNorm: Expected every feature to vary .* min_std=0.01 in features \[1\]"):
        y = layer.inverse(x)
    assert_close(y[:, 1], torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(layer.std[1].item(), 100.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inverted", [False, True])
def test_backward_of_a_batch_that_says_too_little_does_not_initialise_it(mode, inverted, monkeypatch):
    layer, x = act_norm_of(mode=mode, check="always"), data(9, 3)
    net = iz.InvertibleSequential(iz.Reverse(dim=1), layer, iz.Reverse(dim=1), mode=mode)
    x[0, 0] = torch.nan
    x.requires_grad_()
    y = net.inverse(x) if inverted else net(x)
    monkeypatch.setattr(act_norm, "moments_of_all_ranks", None)  # other ranks would wait for this one
    layer.check = "never"
    y.sum().backward()
    assert not layer.initialized


def test_neither_eval_mode_nor_a_look_at_one_direction_initialises():
    layer, x = act_norm_of(), data(9, 3)
    layer.function(x)
    layer.log_det(x)
    assert layer.check_inverse(x)
    layer.eval()
    for call in CALLS.values():
        call(layer, x)
    assert_close(layer(x), x, rtol=0, atol=0)
    assert not layer.initialized
    layer.train()
    with torch.no_grad():
        layer(x)  # a training batch without gradients does
    assert layer.initialized


@pytest.mark.parametrize("call", ["forward", "forward_and_log_det"])
@pytest.mark.parametrize("mode", MODES)
def test_the_first_call_has_the_gradients_of_the_plain_formula(mode, call):
    x, layer = data(9, 3, 2).requires_grad_(), act_norm_of(mode=mode)
    y = layer(x) if call == "forward" else sum(t.sum() for t in layer.forward_and_log_det(x))
    y.sin().sum().backward()
    after = state_of(layer)
    z, s, b = (t.detach().clone().requires_grad_() for t in (x, layer.log_scale, layer.bias))
    mean, std = (f((0, 2)).view(-1, 1) for f in (x.detach().mean, lambda d: x.detach().std(d, correction=0)))
    plain = (z - mean) / std * s.view(-1, 1).exp() + b.view(-1, 1)
    plain = plain if call == "forward" else plain.sum() + 9 * (2 * (s.view(-1, 1) - std.log())).sum()
    plain.sin().sum().backward()
    for ours, theirs in ((x, z), (layer.log_scale, s), (layer.bias, b)):
        assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    assert_close(state_of(layer), after, rtol=0, atol=0)
    assert layer.initialized


def test_backward_in_eval_mode_after_a_training_forward():
    x, layer = data(9, 3).requires_grad_(), act_norm_of()
    y = layer(x)
    layer.eval()
    y.sin().sum().backward()
    with iz.mode(layer, "store"):
        expected = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    assert_close(x.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_inside_another_call_a_replay_initialises_it_as_forward_did(mode):
    def build():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 3), iz.ActNorm(3), nn.Tanh(), nn.Linear(3, 2))
        return iz.InvertibleSequential(iz.AdditiveCoupling(net), iz.Swap(), iz.ActNorm(4), mode=mode).double()

    plain, ours, x = build(), build(), data(9, 4)
    with iz.mode(plain, "store"):
        for net in (plain, ours):
            for _ in range(2):
                net(x).sin().sum().backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert_close(state_of(ours), state_of(plain), rtol=1e-12, atol=1e-12)
    assert all(layer.initialized for layer in ours.modules() if isinstance(layer, iz.ActNorm))


# ---- the flag ----


def test_a_state_that_was_loaded_stays():
    layer = act_norm_of()
    layer(data(9, 3))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = act_norm_of()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    other(7 * data(9, 3))
    assert_close(state_of(other), state_of(layer), rtol=0, atol=0)
    other.load_state_dict(act_norm_of().state_dict())
    other(7 * data(9, 3))
    assert not torch.equal(other.mean, layer.mean)


def test_it_can_be_initialised_again():
    layer, x = act_norm_of(), data(9, 3)
    layer(x)
    layer.reset_parameters()
    assert not layer.initialized
    layer(7 * x)
    assert_close(layer.mean, 7 * x.mean(0), rtol=1e-12, atol=1e-12)
    layer.initialized.fill_(False)
    layer(x)
    assert_close(layer.mean, x.mean(0), rtol=1e-12, atol=1e-12)


def test_a_copy_has_a_flag_of_its_own():
    layer, x = act_norm_of(), data(9, 3)
    early = copy.deepcopy(layer)
    layer(x)
    late = copy.deepcopy(layer)
    assert not early.initialized
    assert late.initialized
    late(7 * x)
    early(7 * x)
    assert_close(late.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    assert_close(early.mean, 7 * x.mean(0), rtol=1e-12, atol=1e-12)


def test_the_flag_is_read_no_more_once_it_was_seen(monkeypatch):
    layer, x = act_norm_of(), data(9, 3)
    layer(x)
    reads, plain = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: reads.append(self) or plain(self))
    layer(x)
    layer.forward_and_log_det(x)
    assert not any(read is layer.initialized for read in reads)
    copy.deepcopy(layer)(x)
    assert reads


# ---- batches that say too little ----


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (0, 3, 4)])
def test_a_batch_without_two_values_for_each_feature_leaves_it_as_it_is(shape):
    layer, x = act_norm_of(), torch.randn(shape, dtype=torch.float64)
    assert_close(layer(x), x, rtol=0, atol=0)
    assert not layer.initialized
    layer(data(9, 3))
    assert layer.initialized
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_it_as_it_is(value):
    layer, x = act_norm_of(), data(9, 3)
    layer(x.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(value, dtype=x.dtype)))
    assert not layer.initialized
    layer(x)
    assert_close(layer.mean, x.mean(0), rtol=1e-12, atol=1e-12)


def test_a_constant_feature_warns_and_stays_finite():
    layer, x = act_norm_of(min_std=0.01), data(9, 3)
    x[:, 1] = 4
    with pytest.warns(UserWarning, match=r"ActNorm: Expected every feature to vary .* min_std=0.01 in features \[1\]"):
        y = layer(x)
    assert_close(y[:, 1], torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(layer.std[1].item(), 0.01)
    assert_close(layer.inverse(y), x, rtol=1e-10, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)  # once


# ---- precision, other surroundings ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer, x = iz.ActNorm(3, dtype=dtype), data(200, 3).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y.float().std(0, correction=0), torch.ones(3), rtol=2e-2, atol=2e-2)
    assert_close(layer.inverse(y), x, rtol=2e-2, atol=2e-1)


def test_all_ranks_batches_count_as_one(monkeypatch):
    """Two threads stand for two ranks, whose batches differ in size."""
    sums, barrier = {}, threading.Barrier(2, timeout=20)

    def all_reduce(x):
        barrier.wait()
        sums[threading.get_ident()] = x.clone()
        barrier.wait()
        x.copy_(sum(sums.values()))

    monkeypatch.setattr(act_norm.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(act_norm.distributed, "all_reduce", all_reduce)
    x, layers = data(9, 3), [act_norm_of(), act_norm_of()]
    threads = [threading.Thread(target=la, args=(part,)) for la, part in zip(layers, x.split([8, 1]), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layer in layers:
        assert layer.initialized
        assert_close(layer.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        assert_close(layer.std, x.std(0, correction=0), rtol=1e-12, atol=1e-12)


def test_without_data_there_is_nothing_to_read():
    layer = iz.ActNorm(3, device="meta")
    assert layer(torch.randn(4, 3, device="meta")).shape == (4, 3)
