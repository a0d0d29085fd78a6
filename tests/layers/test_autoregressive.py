"""Masked autoregressive layers: who sees whom, the sequential inverse, and the inverse autoregressive flow."""

import copy
import functools
import itertools
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.couplings.made import MADE, spread
from invzoo.layers.maps.affine import Affine
from invzoo.layers.maps.mixture import MixtureOfLogistics
from tests.layers.helpers import back, inputs, jacobian, perturbed

MAPS = ["affine", "shift", "spline", Affine("softclip", 1.0), MixtureOfLogistics(2)]
ORDERS = ["input", "reversed", "random"]

all_maps = pytest.mark.parametrize("map_", MAPS, ids=str)
all_orders = pytest.mark.parametrize("order", ORDERS)


def made(features=5, hidden=(12, 10), std=0.5, dtype=torch.float64, **options):
    return perturbed(iz.MaskedAutoregressive(features, hidden, dtype=dtype, **options), std)


def test_shifts_keep_volumes():
    assert [made(map=map_).volume_preserving for map_ in MAPS] == [map_ == "shift" for map_ in MAPS]


# ---- who sees whom --------------------------------------------------------------------------------------------------


@all_maps
@all_orders
def test_a_feature_sees_those_before_it_and_all_of_them(map_, order):
    layer = made(map=map_, order=order, hidden=(40, 30))
    seen = jacobian(layer.function, inputs(5)[:].detach())[layer.permutation][:, layer.permutation] != 0
    assert torch.equal(seen, torch.ones(5, 5).tril().bool())


def test_orders():
    assert made(order="input").permutation.tolist() == [0, 1, 2, 3, 4]
    assert made(order="reversed").permutation.tolist() == [4, 3, 2, 1, 0]
    assert len({tuple(made(order="random").permutation.tolist()) for _ in range(8)}) > 1


def test_a_random_order_is_saved():
    layer, other = made(order="random"), made(order="random")
    other.load_state_dict(layer.state_dict())
    x = inputs(3, 5)
    assert_close(other(x), layer(x), rtol=0, atol=0)
    keys = [f"net.layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")]
    assert sorted(layer.state_dict()) == sorted(["permutation", *keys])


@pytest.mark.parametrize(("units", "first", "count"), [(7, 1, 3), (64, 1, 63), (3, 1, 9), (1, 0, 5), (10, 0, 10)])
def test_degrees_are_balanced(units, first, count):
    degrees = spread(units, first, count)
    assert degrees == sorted(degrees)
    assert first <= degrees[0]
    assert degrees[-1] < first + count
    numbers = Counter(degrees)
    if units >= count:
        assert max(numbers.values()) - min(numbers.values()) <= 1
        assert len(numbers) == count
    else:  # as far from one another, and from the ends
        assert max(numbers.values()) == 1
        assert abs((degrees[0] - first) - (first + count - 1 - degrees[-1])) <= 1


@pytest.mark.parametrize("context_features", [None, 3])
def test_the_net_is_that_of_the_papers_masks(context_features):
    net = MADE(4, 2, (7, 5), context_features, torch.tanh, dtype=torch.float64)
    perturbed(net, 0.5)
    x, context = inputs(6, 4), None if context_features is None else inputs(6, context_features)
    first, count = (1, 3) if context is None else (0, 4)
    degrees = [[1, 2, 3, 4], spread(7, first, count), spread(5, first, count), [0, 1, 2, 3, 0, 1, 2, 3]]
    h = x
    for i, (before, after) in enumerate(itertools.pairwise(degrees)):
        mask = torch.tensor([[float(a >= b) for b in before] for a in after], dtype=torch.float64)
        h = h @ (net.layers[i].weight * mask).mT + net.layers[i].bias
        if i < 2:
            h = torch.tanh(h if context is None else h + context @ net.contexts[i].weight.mT)
    assert_close(net(x, context), h)


def test_values_are_those_of_the_map():
    layer, x = made(), inputs(3, 5)
    h, t = layer.net(x).chunk(2, 1)
    s = 2 * torch.tanh(0.05 * h)
    y, log_det = layer.forward_and_log_det(x)
    assert_close(y, x * s.exp() + t)
    assert_close(log_det, s.sum(1))


# ---- inverse and log-determinant ------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize(("features", "hidden"), [(5, (12, 10)), (1, (3,)), (2, (1, 4)), (9, (3, 2, 5)), (6, (5,))])
@all_orders
def test_the_inverse_is_that_of_as_many_runs_as_features(order, features, hidden, context_features):
    layer = made(features, hidden, order=order, context_features=context_features)
    side = {} if context_features is None else {"context": inputs(4, 2)}
    y = inputs(4, features).detach()
    x = torch.zeros_like(y)
    for _ in range(features):
        x = back(layer.map, y[:, layer.permutation], layer.net(x[:, layer.permutation], **side), -1)
        x = x[:, layer.permutation.argsort()]
    assert_close(layer.inverse(y, **side), x)
    assert_close(layer(x, **side), y)


def test_the_inverse_evaluates_every_unit_once():
    seen = []

    def activation(x):
        seen.append(x.numel())
        return F.silu(x)

    layer = made(6, (20, 11), activation=activation)
    layer.inverse(inputs(3, 6))
    assert sum(seen) == 3 * (20 + 11)


def test_the_net_is_evaluated_once_for_output_and_log_det():
    layer, calls = made(), []
    layer.net.register_forward_hook(lambda *_: calls.append(1))
    with iz.mode(layer, "store"):
        layer.forward_and_log_det(inputs(3, 5))
    assert len(calls) == 1


def test_the_graph_of_the_inverse_is_small():
    """In mode store the graph of the inverse holds each unit once, not once for each feature."""
    layer = made(32, (64,), dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.inverse(inputs(100, 32, dtype=torch.float32))
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    held = sum(size for pointer, size in storages.items() if pointer not in known)
    assert held < 100 * 4 * 4 * (32 + 64)


# ---- context --------------------------------------------------------------------------------------------------------


@all_orders
def test_every_parameter_depends_on_the_context(order):
    layer = made(context_features=2, order=order)
    x, context = inputs(1, 5), inputs(1, 2)
    h = layer.net(x, context)[0]
    for value in h:
        assert torch.autograd.grad(value, context, retain_graph=True)[0].ne(0).all()


@pytest.mark.parametrize(("features", "hidden"), [(128, (64, 64)), (6, (2,)), (7, (1, 2, 20)), (5, (1,)), (1, (1,))])
def test_every_feature_sees_the_context_however_narrow_the_net(features, hidden):
    layer, x = made(features, hidden, context_features=2), inputs(1, features)
    with torch.no_grad():
        moved = [layer.net(x, torch.full((1, 2), value, dtype=x.dtype)) for value in (-1.0, 1.0)]
        assert moved[0].ne(moved[1]).all()
        context = inputs(1, 2)
        assert_close(layer.inverse(layer(x, context=context), context=context), x)
    seen = jacobian(lambda x: layer(x, context=context), x[0].detach())
    assert torch.equal(seen.triu(1), torch.zeros_like(seen))


def test_every_hidden_layer_sees_the_context():
    layer, x, context = made(context_features=2, hidden=(6, 7, 8)), inputs(3, 5), inputs(3, 2)
    layer(x, context=context).square().sum().backward()
    assert [c.weight.shape for c in layer.net.contexts] == [(6, 2), (7, 2), (8, 2)]
    assert all(c.weight.grad.ne(0).all() for c in layer.net.contexts)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 1, 3), (2, 1, 6, 3), (1, 4, 6, 3), (2, 4, 6, 3)])
def test_positions_share_a_context_or_have_their_own(shape):
    layer, x, context = made(context_features=3), inputs(2, 4, 6, 5), inputs(*shape)
    each = context[:, None, None] if len(shape) == 2 else context
    each = each.expand(2, 4, 6, 3).flatten(0, 2)
    y, log_det = layer.forward_and_log_det(x, context=context)
    flat, log_dets = layer.forward_and_log_det(x.flatten(0, 2), context=each)
    assert_close(y.flatten(0, 2), flat)
    assert_close(log_det, log_dets.view(2, -1).sum(1))
    assert_close(layer.inverse(y, context=context), x)


# ---- tools that change the net's linear layers ----------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear layer and what is added to it while it is adapted to another task."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(0.5 * torch.randn(base.in_features, 2, dtype=torch.float64))
        self.up = nn.Parameter(0.5 * torch.randn(2, base.out_features, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


def adapt(net):
    for layers in (net.layers, net.contexts):
        for name, layer in layers.named_children():
            setattr(layers, name, LowRank(layer))


def normalise_weights(net):
    for layer in [m for m in net.modules() if isinstance(m, nn.Linear)]:
        nn.utils.parametrizations.weight_norm(layer)


def normalise_weights_by_hooks(net):
    for layer in [m for m in net.modules() if isinstance(m, nn.Linear)]:
        nn.utils.weight_norm(layer)


def prune_weights(net):
    for layer in [m for m in net.modules() if isinstance(m, nn.Linear)]:
        prune.l1_unstructured(layer, "weight", 0.3)


def wrap_forward(net):
    for layer in net.layers:
        layer.forward = functools.partial(lambda forward, x: 1.5 * forward(x), layer.forward)


TOOLS = [adapt, normalise_weights, normalise_weights_by_hooks, prune_weights, wrap_forward]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("mode", iz.Mode)
@pytest.mark.parametrize("inverted", [False, True], ids=["function", "inverse"])
def test_tools_act_on_the_net_in_both_directions(tool, mode, inverted):
    layer = made(4, (9, 3), order="reversed", context_features=2, mode=mode)
    x, context, plain = inputs(3, 4), inputs(3, 2), copy.deepcopy(layer)
    tool(layer.net)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        y, log_det = (layer.inv if inverted else layer).forward_and_log_det(x, context=context)
        optimizer.zero_grad()
        (y.square().sum() - log_det.sum()).backward()
        optimizer.step()
    with torch.no_grad():
        y, log_det = layer.forward_and_log_det(x, context=context)
        assert_close(layer.inverse(y, context=context), x)
        assert not torch.allclose(y, plain(x, context=context), atol=1e-3)
    each = [jacobian(lambda v, c=c: layer(v, context=c[None]), v) for v, c in zip(x.detach(), context, strict=True)]
    assert torch.equal(torch.stack(each).tril(-1), torch.zeros(3, 4, 4, dtype=torch.float64))  # reversed
    assert_close(log_det, torch.stack([torch.linalg.slogdet(j).logabsdet for j in each]))


@pytest.mark.parametrize("mode", iz.Mode)
@pytest.mark.parametrize("inverted", [False, True], ids=["function", "inverse"])
def test_hooks_on_the_nets_layers_fire_in_both_directions(mode, inverted):
    layer, calls = made(3, (6,), context_features=2, mode=mode), []
    hooked = [m for m in layer.net.modules() if isinstance(m, nn.Linear)]
    x, context = inputs(2, 3), inputs(2, 2)
    found = []
    for watched in (False, True):
        for m in hooked if watched else ():
            m.register_forward_hook(lambda m, *_: calls.append(m))
        y, log_det = (layer.inv if inverted else layer).forward_and_log_det(x, context=context)
        assert all(m in calls for m in hooked) == watched
        found.append(
            (y, log_det, torch.autograd.grad(y.sin().sum() + log_det.sum(), [x, context, *layer.parameters()]))
        )
    assert_close(*found)


def test_a_step_by_calls_does_not_see_features_to_come():
    layer = made(3, (6,))
    layer.net.layers[0].register_forward_hook(lambda *_: None)
    y = inputs(2, 3).detach()
    y[:, 2] = torch.nan
    assert layer.inverse(y)[:, :2].isfinite().all()


def test_dynamic_quantization_leaves_it_right():
    layer, x = made(dtype=torch.float32, context_features=2), torch.randn(4, 5)
    context = torch.randn(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)
    y = quantized(x, context=context)
    assert_close(y, layer(x, context=context), rtol=0.1, atol=0.1)
    assert_close(quantized.inverse(y, context=context), x, rtol=1e-4, atol=1e-4)


# ---- start, precision, long stacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("map_", ["affine", "shift", "spline"])
def test_starts_as_the_identity(map_):
    layer, x = iz.MaskedAutoregressive(5, map=map_), torch.randn(7, 5)
    y, log_det = layer.forward_and_log_det(x)
    assert_close(y, x, rtol=0, atol=1e-6 if map_ == "spline" else 0)
    assert_close(log_det, torch.zeros(7), rtol=0, atol=1e-5 if map_ == "spline" else 0)
    y.square().sum().backward()
    assert layer.net.layers[-1].weight.grad.any()


@pytest.mark.parametrize("map_", ["affine", "shift", "spline"])
def test_a_stack_of_64_layers_comes_back_in_float32(map_):
    net = iz.InvertibleSequential(
        *(iz.MaskedAutoregressive(64, map=map_, order=ORDERS[1 + i % 2]) for i in range(64 if map_ != "spline" else 16))
    )
    x = torch.randn(8, 64)
    with torch.no_grad():
        assert_close(net.inverse(net(x)), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [10.0, 1e4])
def test_log_scales_are_bounded(scale):
    layer, x = made(std=scale), inputs(3, 5)
    assert layer.forward_and_log_det(x)[1].abs().le(10).all()


def test_parameters_are_made_anew_after_to_empty():
    torch.manual_seed(1)
    layer = iz.MaskedAutoregressive(5, (6, 7), order="random")
    empty = iz.MaskedAutoregressive(5, (6, 7), order="random", device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert sorted(empty.permutation.tolist()) == [*range(5)]
    for ours, theirs in zip(empty.net.layers, layer.net.layers, strict=True):
        assert torch.equal(ours.degrees, theirs.degrees)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5)
    assert_close(empty(x), layer(x), rtol=0, atol=0)


def test_repr():
    layer = iz.MaskedAutoregressive(5, (6,), order="reversed", context_features=2)
    assert "5, map=Affine(scale='tanh'" in repr(layer)
    assert "order='reversed', context_features=2" in repr(layer)
    assert "Linear(in_features=5, out_features=6" in repr(layer)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "error", "match"),
    [
        (None, TypeError, r"MaskedAutoregressive: Expected context to be a Tensor; got NoneType"),
        (torch.zeros(2, 3).double(), TypeError, r"Expected context to be of the layer's dtype torch.float32"),
        (torch.zeros(2, 4), ValueError, r"Expected context to have shape \(2, 3\), or one for \(2, 6, 3\); got shape"),
        (torch.zeros(4, 3), ValueError, r"Expected context to have shape \(2, 3\), or one for .*got shape \(4, 1, 3\)"),
        (torch.zeros(2, 5, 3), ValueError, r"Expected context to have shape \(2, 3\), or one for .*; got shape"),
        (torch.zeros(3), ValueError, r"Expected context to have shape \(2, 3\), or one for .*; got shape \(3,\)"),
    ],
)
def test_bad_contexts(context, error, match):
    layer = iz.MaskedAutoregressive(5, context_features=3)
    with pytest.raises(error, match=match):
        layer(torch.zeros(2, 6, 5), context=context)


def test_an_activation_may_be_a_module():
    layer = made(activation=nn.PReLU(dtype=torch.float64))
    assert "net.activation.weight" in layer.state_dict()
    x = inputs(3, 5)
    assert_close(layer.inverse(layer(x)), x)


@pytest.mark.parametrize("mode", iz.Mode)
def test_a_hook_on_the_whole_net_that_changes_its_outputs_acts_in_both_directions(mode):
    layer = made(4, (9,), mode=mode)
    layer.net.register_forward_hook(lambda module, inputs, output: 2 * output + 0.1)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_close(layer.inverse(layer(x)), x)


def test_a_global_hook_sees_the_nets_layers_in_both_directions():
    layer, seen = made(3, (6,)), []
    x = torch.randn(2, 3, dtype=torch.float64)
    for run in (layer, layer.inverse):
        handle = register_module_forward_hook(lambda module, inputs, output: seen.append(module))
        run(x)
        handle.remove()
        assert {*layer.net.layers} <= {*seen}
        seen.clear()
