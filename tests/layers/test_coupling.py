"""Additive and affine couplings, their splits, and the layers that split and merge."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz


class Net(nn.Module):
    """A small subnet between any two numbers of features in ``dim`` 1."""

    def __init__(self, features, out_features):
        super().__init__()
        self.inner, self.outer = nn.Linear(features, 5).double(), nn.Linear(5, out_features).double()

    def forward(self, x, context=None):
        h = self.outer(self.inner(x.movedim(1, -1)).tanh()).movedim(-1, 1)
        return h if context is None else h * context


def coupling(kind, split="half", n=7, two_sided=True, swap=False, **options):
    sizes = (n, n) if split == "checkerboard" else iz.layers.rearrangements.split.Partition(split).sizes(n)
    first, second = sizes[::-1] if swap else sizes
    factor = 1 if kind is iz.AdditiveCoupling else 2
    g = Net(first, second * factor) if two_sided else None
    return kind(Net(second, first * factor), g, dim=1, split=split, swap=swap, **options)


@pytest.mark.parametrize("split", ["half", 0.25])
def test_maps_are_the_documented_ones(split):
    x = torch.randn(3, 7, dtype=torch.float64)
    x1, x2 = iz.Split(split=split)(x)
    additive, affine = coupling(iz.AdditiveCoupling, split), coupling(iz.AffineCoupling, split)
    y1 = x1 + additive.f(x2)
    assert_close(additive(x), torch.cat((y1, x2 + additive.g(y1)), 1))
    assert_close(additive(x1, x2), (y1, x2 + additive.g(y1)))
    h, t = affine.f(x2).chunk(2, 1)
    y1 = x1 * torch.exp(2 * torch.tanh(0.1 * h / 2)) + t
    assert_close(affine(x)[:, : x1.shape[1]], y1)


def test_halves_are_those_of_chunk_and_the_first_is_larger():
    x1, x2 = iz.Split()(torch.arange(7).unsqueeze(0))
    assert_close((x1, x2), torch.arange(7).unsqueeze(0).chunk(2, 1))


@pytest.mark.parametrize("scale", ["tanh", "softclip", "sigmoid", "unit", "exp"])
def test_log_scales_are_bounded(scale):
    h = torch.linspace(-1e4, 1e4, 101, dtype=torch.float64)
    log_scale = iz.layers.maps.affine._LOG_SCALES[scale](h, 2.0)
    bounds = {"tanh": (-2, 2), "softclip": (-2, 2), "sigmoid": (-2.31, 0), "unit": (-0.694, 0), "exp": (-1e4, 1e4)}
    assert bounds[scale][0] <= log_scale.min() <= log_scale.max() <= bounds[scale][1]


def test_zero_init_starts_at_the_identity():
    x = torch.randn(5, 7, dtype=torch.float64)
    layer = coupling(iz.AffineCoupling, zero_init=True)
    assert torch.equal(layer(x), x)
    assert not torch.equal(coupling(iz.AffineCoupling)(x), x)


def test_a_subnet_without_the_argument_gets_no_condition():
    layer = iz.AdditiveCoupling(Net(3, 4), nn.Linear(4, 3).double())
    x, context = torch.randn(3, 7, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    x1, x2 = x.split((4, 3), 1)
    y1 = x1 + layer.f(x2, context=context)
    assert_close(layer(x, context=context), torch.cat((y1, x2 + layer.g(y1)), 1))
    with pytest.raises(TypeError, match=r"AdditiveCoupling: Expected side inputs among .*context.*; got \['mask'\]"):
        layer(x, mask=context)


class With(nn.Module):
    """A subnet that takes a condition of 3 features."""

    def __init__(self, context=5):
        super().__init__()
        self.net = nn.Linear(context, 2)

    def forward(self, x, context):
        return self.net(torch.cat((x, context), 1))


class May(nn.Linear):
    """A subnet that may take one."""

    def forward(self, x, context=None, *, mask=None):
        return super().forward(x)


NARROW = {
    r"Coupling: Expected f to take .*\(5, 3\) on cpu; got RuntimeError: mat1 .* has 3 of 7 features in dim 1$": (
        lambda: iz.AdditiveCoupling(nn.Linear(4, 4)),
        (5, 7),
    ),
    r"to return a Tensor of shape \(5, 6\); got shape \(5, 3\)\. The second half has 3 of 7 features": (
        lambda: iz.AffineCoupling(nn.Linear(4, 3), swap=True),
        (5, 7),
    ),
    "Expected f to take .* The second stream has 3 of 5 features in dim 1": (
        lambda: iz.AdditiveCoupling(nn.Linear(2, 3), nn.Linear(4, 2), split=0.4),
        (5, 5),
    ),
    r"Tensor of shape \(5, 3, 2\); got tuple. Let a module of your own return the one .*\[0\]`. The first": (
        lambda: iz.AdditiveCoupling(lambda x: (x, None), dim=-1),
        (5, 3, 4),
    ),
    r"Expected f to take torch.float32 of shape \(5, 2, 4, 4\) on cpu; got RuntimeError": (
        lambda: iz.AdditiveCoupling(nn.Conv2d(3, 2, 1), split="checkerboard"),
        (5, 2, 4, 4),
    ),
}


@pytest.mark.parametrize("mode", iz.Mode)
@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize("message", NARROW)
def test_errors_say_how_features_were_split(message, mode, log_det):
    make, shape = NARROW[message]
    layer = make()
    layer.mode = mode
    with pytest.raises(ValueError, match=message):
        (layer.forward_and_log_det if log_det else layer)(torch.randn(shape))


@pytest.mark.parametrize(
    ("x", "weights", "said"),
    [
        (torch.ones(3, 4, dtype=torch.complex64), {}, "take torch.complex64 of shape .* on cpu; got RuntimeError"),
        (torch.ones(3, 4, device="meta"), {}, "take torch.float32 of shape .* on meta; got RuntimeError"),
        (torch.ones(3, 4), {"device": "meta"}, "take torch.float32 of shape .* on cpu; got RuntimeError"),
        (torch.ones(3, 4, dtype=torch.float64), {}, "take torch.float64 of shape .* on cpu; got RuntimeError"),
    ],
)
def test_errors_say_what_the_subnet_was_given(x, weights, said):
    with pytest.raises(ValueError, match=f"AdditiveCoupling: Expected f to {said}: .*The second half has 2 of 4"):
        iz.AdditiveCoupling(nn.Linear(2, 2, **weights))(x)


def test_what_a_subnet_raises_itself_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"(?s)size of tensor.*f was given .*shape \(5, 3\).* has 3 of 7 features"):
        iz.AdditiveCoupling(lambda x: x + torch.ones(4))(torch.randn(5, 7))
    inner = iz.AdditiveCoupling(iz.AdditiveCoupling(nn.Linear(4, 4)), dim=1)
    with pytest.raises(ValueError, match="The second half has 2 of 4 features") as raised:
        inner(torch.randn(5, 8))
    assert not getattr(raised.value, "__notes__", ())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, c: iz.AdditiveCoupling(nn.Sequential(nn.Linear(2, 2)))(x, context=c),
            r"among \[\]; got \['context'\]\. An nn.Sequential passes none on: write a module whose forward takes them",
        ),
        (
            lambda x, c: iz.AdditiveCoupling(With())(x, mask=c),
            r"side inputs among \['context'\]; got \['mask'\]$",
        ),
        (
            lambda x, c: iz.AdditiveCoupling(With())(x, c),
            "got TypeError: .*missing 1 .*'context'.* Pass `context=` by name: tensors by position are streams",
        ),
        (lambda x, c: iz.AdditiveCoupling(With())(x), "missing 1 .*'context'.* Pass `context=` by name"),
        (
            lambda x, c: iz.InvertibleSequential(iz.AdditiveCoupling(With()), iz.Swap())(x, c),
            r"(?s)Pass `context=` by name.*in layer 0 \(AdditiveCoupling\)",
        ),
        (lambda x, c: iz.AdditiveCoupling(May(2, 2))(x, c), "Pass `context=` and `mask=` by name"),
        (
            lambda x, c: iz.AdditiveCoupling(May(3, 2))(x, c),
            r"return .*\(5, 4\); got .* first half has 4 of 7.*Pass",
        ),
        (lambda x, c: iz.AdditiveCoupling(lambda x, context: x)(x), "Pass `context=` by name"),
        (
            lambda x, c: iz.ConditionalAffine(nn.Linear(3, 8))(x, c),
            "ConditionalAffine: Expected inputs to be 1 by position; got 2. Pass `context=` by name",
        ),
        (lambda x, c: iz.ElementwiseAffine(4)(x, c), "ElementwiseAffine: Expected inputs to be 1 by position; got 2$"),
        (
            lambda x, c: iz.InvertibleLinear(4, conditioner=nn.Linear(3, 20)).inv(x, c),
            "Expected inputs to be 1 by position; got 2. Pass `context=` by name",
        ),
        (
            lambda x, c: iz.MaskedAutoregressive(4, context_features=3).forward_and_log_det(x, c),
            "Expected inputs to be 1 by position; got 2. Pass `context=` by name",
        ),
        (lambda x, c: iz.Reverse()(x, context=c), r"Reverse: Expected side inputs among \[\]; got \['context'\]$"),
        (
            lambda x, c: iz.ConditionalAffine(nn.Bilinear(3, 3, 8))(x, context=c),
            r"ConditionalAffine: Expected conditioner to take torch.float32 of shape \(5, 3\) on cpu; got TypeError",
        ),
    ],
)
def test_side_inputs_come_by_name(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(5, 4), torch.randn(5, 3))


def test_state_dict_is_that_of_the_subnets():
    layer = coupling(iz.AffineCoupling)
    wanted = nn.ModuleDict({"f": layer.f, "g": layer.g}).state_dict()
    assert layer.state_dict().keys() == wanted.keys()
    assert copy.deepcopy(layer).state_dict().keys() == wanted.keys()


def test_gin_couplings_keep_volumes():
    layer = iz.GINCoupling(nn.Linear(3, 8), nn.Linear(4, 6), max_log_scale=0.1).double()
    with torch.no_grad():
        layer.f.weight.normal_(std=100)
    x = torch.randn(5, 7, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    assert_close(log_det, torch.zeros(5, dtype=torch.float64))
    assert_close(layer.inverse(y), x)
    scales = layer.map.parts(layer.f(x[:, 4:]), x, 1)[0]
    assert scales.std() > 0.05


def test_an_affine_log_det_evaluates_the_subnet_once(monkeypatch):
    calls = []
    layer = iz.AffineCoupling(nn.Linear(2, 4))
    layer.f.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(layer.f, "forward", lambda x, f=layer.f.forward: calls.append(0) or f(x))
    y, log_det = layer.forward_and_log_det(torch.randn(3, 4))
    assert calls == [0, 1]
    (y.sum() + log_det.sum()).backward()
    assert calls == [0, 1, 0]  # hooks fire in forward alone


# ---- dtypes ----


def stacked(blocks, dtype=None):
    """A subnet that returns ``blocks`` copies of what it sees, in a dtype."""
    return lambda x: torch.cat([x] * blocks, 1).to(dtype or x.dtype)


MAPS_OF_FLOATS = {
    "affine": lambda: iz.AffineCoupling(stacked(2, torch.float32)),
    "gin": lambda: iz.GINCoupling(stacked(2, torch.float32)),
    "spline": lambda: iz.RationalQuadraticCoupling(stacked(23, torch.float32)),
    "mixture": lambda: iz.MixtureLogisticCoupling(stacked(14, torch.float32)),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", MAPS_OF_FLOATS)
def test_what_is_computed_in_floats_takes_no_other_numbers(name, dtype):
    layer = MAPS_OF_FLOATS[name]()
    x = torch.ones(3, 4, dtype=dtype)
    message = f"{type(layer).__name__}: Expected input to be real floating point; got {dtype}"
    for call in (layer, layer.inverse, layer.inv, layer.forward_and_log_det, layer.inverse_and_log_det):
        with pytest.raises(TypeError, match=message):
            call(x)
        with pytest.raises(TypeError, match=message):
            call(*x.chunk(2, 1))
    moved = layer(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.uint8))  # of what does not move any dtype will do
    assert [y.dtype for y in moved] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("mode", iz.Mode)
def test_additive_couplings_keep_integers(dtype, mode):
    layer = iz.AdditiveCoupling(lambda x: 3 * x, lambda x: x // 2, mode=mode)
    x = torch.randint(0, 255, (5, 4), dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(layer.inverse(y), x)


@pytest.mark.parametrize("mode", iz.Mode)
@pytest.mark.parametrize(
    ("stream", "subnet", "additive"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.int64, torch.float32),
    ],
)
def test_a_sum_is_promoted_as_in_pytorch_and_an_affine_map_keeps_the_streams_dtype(mode, stream, subnet, additive):
    x1, x2 = (torch.tensor([[v, 2 * v]], dtype=stream) for v in (1.0, 2.0))
    y1, _ = iz.AdditiveCoupling(stacked(1, subnet), mode=mode)(x1, x2)
    assert_close(y1, x1 + x2.to(subnet), rtol=0, atol=0)
    assert y1.dtype == additive
    layer = iz.AffineCoupling(stacked(2, subnet), mode=mode)
    y1, _ = layer(x1, x2)
    assert y1.dtype == stream
    assert_close(layer.inverse(y1, x2)[0], x1)


@pytest.mark.parametrize("inverted", [False, True])
def test_halves_are_rebuilt_with_one_rounding(inverted):
    # The gradient of a layer's log-scale is what it rebuilds times the scale: as exact as the inverse is.
    torch.manual_seed(0)
    h = torch.randn(64, 4).mul(3).requires_grad_()
    layers = [iz.AffineCoupling(lambda _: h), iz.AffineCoupling(lambda _: 0.3 - h.detach())]
    first, last = (layer.inv if inverted else layer for layer in layers)
    x, passed = (1 + torch.rand(64, 2)).bfloat16(), torch.zeros(64, 2).bfloat16()
    y = last(*first(x, passed))[0].detach()
    rebuilt = first.inverse(*last.inverse(y, passed))[0].detach()
    (got,) = torch.autograd.grad(last(*first(x, passed))[0].sum(), h)
    for layer in layers:
        layer.mode = "store"
    (expected,) = torch.autograd.grad(last(*first(rebuilt, passed))[0].sum(), h)
    assert_close(got, expected, rtol=0, atol=0)


class Bounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, h):
        return self.weight.to(h.dtype) * torch.tanh(h)


@pytest.mark.parametrize(
    "make",
    [
        lambda scale: iz.AffineCoupling(nn.Linear(2, 4), scale=scale),
        lambda scale: iz.MaskedAutoregressive(4, map=iz.layers.maps.Affine(scale=scale)),
    ],
    ids=["coupling", "autoregressive"],
)
def test_a_module_as_scale_is_the_layers_own(make):
    layer = make(scale := Bounded())
    iz.testing.assert_invertible(copy.deepcopy(layer), torch.randn(3, 4))
    assert any(p is scale.weight for p in layer.parameters())
    layer(torch.randn(3, 4)).sum().backward()
    assert scale.weight.grad is not None
    y = layer(torch.randn(3, 4))
    with torch.no_grad():
        scale.weight.mul_(2)
    with pytest.raises(RuntimeError, match="Expected parameters and buffers to stay as they were"):
        y.sum().backward()
