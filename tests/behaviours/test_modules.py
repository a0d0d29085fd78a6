"""Hooks, state dicts, copies, conversions, parametrizations and side inputs."""

import contextlib
import copy
import io
import pickle
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

import invzoo as iz
from tests.behaviours.helpers import Subnet, all_gradients, blocks, holds, some_loss, twice_the_same
from tests.reference import FEATURES, HALF, MODES, PlainAdditive, Subject, assert_near, assert_same_run, mlp, run

grad = torch.autograd.grad


def modules_inside(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the subnets: those that both nets have, and call alike."""
    return [(name, m) for name, m in net.named_modules() if ".".join(name.split(".")[-2:-1]) in ("f", "g")]


# ---- hooks ----------------------------------------------------------------------------------------------------------

WATCHED = {
    "inside blocks": modules_inside,
    "the whole": lambda net: [("", net)],
    "every layer": lambda net: net.named_children(),
}


@contextlib.contextmanager
def removed(handles):
    """Remove hooks in the end."""
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("where", WATCHED)
def test_hooks_fire_once_with_the_right_tensors(subject, x, where):
    if where == "every layer" and subject.form not in ("sequential", "stack"):
        subject = Subject("stack", subject.mode)

    def program(net):
        log, handles = [], []
        for name, module in WATCHED[where](net):
            handles += [
                module.register_forward_pre_hook(lambda m, i, n=name: log.append(("pre", n, *i))),
                module.register_forward_hook(lambda m, i, o, n=name: log.append(("post", n, *i, o))),
                module.register_full_backward_pre_hook(lambda m, o, n=name: log.append(("back pre", n, *o))),
                module.register_full_backward_hook(lambda m, i, o, n=name: log.append(("back", n, *i, *o))),
            ]
        with removed(handles):
            some_loss(net(x)).backward()
        return log

    subject.holds(program)


RETURNING = {
    "pre": lambda net, inner: inner.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "post": lambda net, inner: inner.register_forward_hook(lambda m, i, o: o.exp() * o),
    "noise": lambda net, inner: inner.register_forward_hook(lambda m, i, o: o * torch.rand_like(o)),
    "stack pre": lambda net, inner: net.register_forward_pre_hook(lambda m, i: (i[0].exp(),)),
    "stack post": lambda net, inner: net.register_forward_hook(lambda m, i, o: o.exp() * o),
    "backward": lambda net, inner: inner.register_full_backward_hook(lambda m, i, o: (i[0] * 3,)),
    "backward pre": lambda net, inner: inner.register_full_backward_pre_hook(lambda m, o: (o[0] * 3,)),
    "kwargs": lambda net, inner: inner.register_forward_hook(lambda m, i, k, o: o.sin() * o, with_kwargs=True),
}


@pytest.mark.parametrize("register", RETURNING.values(), ids=RETURNING)
@holds
def test_hooks_that_return_values(net, x, register):
    with register(net, blocks(net, nn.Linear)[0]):
        y = net(x)
        some_loss(y).backward()
    return y


@holds
def test_a_hook_removed_before_backward(net, x):
    with blocks(net, nn.Linear)[0].register_forward_hook(lambda m, i, o: o.exp() * o):
        y = net(x)
    some_loss(y).backward()
    return y


@holds
def test_a_hook_added_before_backward(net, x):
    log, y = [], net(x)
    with blocks(net, nn.Linear)[0].register_forward_hook(lambda m, i, o: log.append(o) or o * 2):
        some_loss(y).backward()
    return log


@holds
def test_a_hook_that_removes_itself(net, x):
    def once(module, inputs, output):
        handle.remove()
        return output * 2

    handle = blocks(net, nn.Linear)[0].register_forward_hook(once)
    y = net(x)
    some_loss(y).backward()
    return y, net(x)


@holds
def test_a_hook_that_builds_a_loss(net, x):
    """An auxiliary loss on what a block computes inside, as feature extractors do."""

    def keep(module, inputs, output):
        kept.append(output.square().sum() + inputs[0].exp().sum())

    kept = []
    with removed([m.register_forward_hook(keep) for m in blocks(net, nn.Tanh)]):
        (some_loss(net(x)) + sum(kept)).backward()


@holds
def test_global_hooks(net, x):
    def keep(module, *tensors):
        if isinstance(module, nn.Linear):
            log.append(tensors)

    log = []
    with torch_module.register_module_forward_hook(keep), torch_module.register_module_forward_pre_hook(keep):
        some_loss(net(x)).backward()
    return log


@holds
def test_tensor_hooks_fire_once_with_the_right_gradients(net, x):
    log = []
    h = x.exp()
    h.register_hook(lambda g: log.append(("input", g)))
    y = net(h)
    y.register_hook(lambda g: log.append(("output", g)))
    z = net(y)
    z.register_hook(lambda g: g * 2)
    with removed([p.register_hook(lambda g, n=n: log.append((n, g))) for n, p in net.named_parameters()]):
        some_loss(z).backward()
    return sorted(log, key=lambda entry: (entry[0], entry[1].norm().item()))


@holds
def test_hooks_on_the_graph(net, x):
    log = []
    y = net(x.exp())
    z = net(y)
    for tensor in (y, z):
        tensor.grad_fn.register_prehook(lambda g: log.append(g[0]))
    some_loss(z).backward()
    return log


@holds
def test_post_accumulate_hooks(net, x):
    log = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda p, n=n: log.append((n, p.grad.clone())))
        for n, p in net.named_parameters()
    ]
    with removed(handles):
        some_loss(net(x)).backward()
    return dict(log), len(log)


class Biased(Subnet):
    """Its bias gets a gradient that needs nothing saved, before all else."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.bias = nn.Parameter(torch.zeros(sizes[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.bias


@pytest.mark.parametrize("block", [mlp, Biased])
@holds
def test_the_optimizer_steps_in_backward(net, x, block):
    def step(p):
        with torch.no_grad():
            p.sub_(p.grad, alpha=1e-3)
        p.grad = None

    with removed([p.register_post_accumulate_grad_hook(step) for p in net.parameters()]):
        for _ in range(3):
            some_loss(net(x)).backward()
    return net(x)


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_an_optimizer_steps_in_backward_on_a_call_that_saves_nothing(mode):
    """It is inverted for the call before it, which saves, by the bias that it had."""

    class Shift(iz.InvertibleModule):
        def __init__(self):
            super().__init__(mode=mode)
            self.bias = nn.Parameter(torch.ones(FEATURES))

        def function(self, x):
            return x + self.bias

        def inverse(self, y):
            return y - self.bias

    def move(p):
        p.detach().add_(100)

    results = []
    for option in ("store", mode):
        x = torch.ones(5, FEATURES, requires_grad=True)
        scale, shift = iz.ElementwiseAffine(FEATURES, mode=option), Shift()
        shift.mode = option
        shift.bias.register_post_accumulate_grad_hook(move)
        some_loss(shift(scale(x))).backward()
        results.append((scale.log_scale.grad, x.grad))
    assert_near(*results)


# ---- state and copies -----------------------------------------------------------------------------------------------


def test_state_dict_is_the_plain_net_s(subject, x):
    plain, ours = subject.pair(lambda i, o: nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o)))
    for net in (plain, ours):
        some_loss(net(x)).backward()
    assert [*plain.state_dict()] == [*ours.state_dict()]
    for source, target in ((plain, ours), (ours, plain)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("when", ["before", "in flight", "after"])
def test_copies(subject, x, how, when):
    plain, ours = subject.pair()
    y = ours(x) if when != "before" else None
    if when == "after":
        some_loss(y).backward()
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for net in (twin, ours):
        assert_same_run(lambda net: all_gradients(net, x), plain, net)
    modes = [m.mode for m in twin.modules() if isinstance(m, iz.InvertibleModule)]
    assert set(modes) <= {subject.mode}
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_same_run(lambda net: all_gradients(net, x), plain, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_conversions(subject, dtype):
    plain, ours = subject.pair(depth=2)
    x = torch.randn(5, FEATURES, dtype=dtype, requires_grad=True)

    def program(net):
        y = net(x)
        return y, grad(some_loss(y), [x, *net.parameters()])

    eps = torch.finfo(dtype).eps
    twice_the_same(program, plain.to(dtype), ours.to(dtype), 30 * eps)
    if dtype is torch.float16:
        assert_same_run(program, plain.half(), ours.half(), 30 * eps)


class Modulus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.abs())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("container", [nn.Sequential, iz.InvertibleSequential])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")  # torch's own
def test_complex(mode, container):
    def block():
        return nn.Sequential(nn.Linear(HALF, 4), Modulus(), nn.Linear(4, HALF))

    plain = nn.Sequential(*[PlainAdditive(block(), block()) for _ in range(2)]).to(torch.complex128)
    ours = container(*[iz.AdditiveCoupling(block(), block(), mode=mode) for _ in range(2)]).to(torch.complex128)
    ours.load_state_dict(plain.state_dict())
    z = torch.randn(5, FEATURES, dtype=torch.complex128, requires_grad=True)

    for of in (lambda z: z, lambda z: z.conj(), lambda z: z.exp(), lambda z: -z.conj().resolve_conj()):

        def program(net, of=of):
            grads = grad(net(of(z)).abs().square().sum(), [z, *net.parameters()])
            return [torch.view_as_real(g.resolve_conj()) for g in grads]

        twice_the_same(program, plain, ours)


# ---- parametrizations -----------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.tanh() * 2


PARAMETRIZED = {
    "weight_norm": lambda m: parametrizations.weight_norm(m),
    "hook_weight_norm": lambda m: torch.nn.utils.weight_norm(m),
    "orthogonal": lambda m: parametrizations.orthogonal(m),
    "custom": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()) and m,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.fixture(params=PARAMETRIZED)
def block(request):
    def parametrized(inputs, outputs):
        make = PARAMETRIZED[request.param]
        return nn.Sequential(make(nn.Linear(inputs, 4)), nn.Tanh(), make(nn.Linear(4, outputs)))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        yield parametrized


@holds
def test_parametrizations(net, x, block):
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        some_loss(net(x)).backward()
        optimizer.step()
    return all_gradients(net, x)


def partly_custom(inputs, outputs):
    return nn.Sequential(PARAMETRIZED["custom"](nn.Linear(inputs, 4)), nn.Tanh(), nn.Linear(4, outputs))


@holds(block=partly_custom)
def test_cached_parametrizations(net, x):
    with parametrize.cached():
        loss = some_loss(net(net(x)))
        loss.backward()


HOOKED = {
    "L1Unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "CustomFromMask": lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=0.5),
    "WeightNorm": torch.nn.utils.weight_norm,
    "SpectralNorm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", HOOKED)
def test_hooks_that_compute_a_parameter_of_the_layer_itself_are_refused(kind):
    """Only ``layer(x)`` calls hooks: other methods would go by the value of its last call."""
    layer = iz.InvertiblePReLU(4)
    weight, state = layer.weight, {name: value.clone() for name, value in layer.state_dict().items()}
    match = rf"InvertiblePReLU: Expected weight to be computed by a parametrization .*; got {kind}, a hook that layer"
    with pytest.raises(TypeError, match=match):
        HOOKED[kind](layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert kind == "WeightNorm" or layer.weight is weight
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("mode", iz.Mode)
@pytest.mark.parametrize(
    "tool", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=["weight", "spectral"]
)
def test_parametrizations_of_the_layer_itself_are_seen_by_every_method(tool, mode):
    layer, x = iz.InvertiblePReLU(4, dtype=torch.float64, mode=mode), torch.randn(5, 4, dtype=torch.float64)
    nn.init.normal_(layer.weight)  # weight norm takes no rows of zeros
    tool(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for _ in range(2):
        y, log_det = layer.forward_and_log_det(x)
        optimizer.zero_grad()
        (y.square().sum() - log_det.sum() + layer.inv(x).square().sum()).backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        back, inverse_log_det = layer.inverse_and_log_det(x)  # the first to see the last step
        torch.testing.assert_close((layer(back), layer.log_det(back)), (x, -inverse_log_det))
        torch.testing.assert_close(layer.inverse(x), back)


@holds
def test_requires_grad_switched_between_forward_and_backward(net, data):
    """As a discriminator is frozen for the generator's turn, and a part of it thawed."""
    x, parameters = data.clone().requires_grad_(), [*net.parameters()]
    parameters[0].requires_grad_(False)
    y = net(x)
    net.requires_grad_(False)
    parameters[0].requires_grad_(True)
    some_loss(y).backward()
    flags = [p.requires_grad for p in parameters]
    net.requires_grad_(True)
    return x.grad, flags


@holds
def test_a_parameter_replaced_between_forward_and_backward(net, x):
    linear = blocks(net, nn.Linear)[0]
    y, old = net(x), linear.weight
    linear.weight = nn.Parameter(torch.zeros_like(old))
    some_loss(y).backward()
    linear.weight = old


def test_lazy_modules(subject, x):
    def lazy(inputs, outputs):
        return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, outputs))

    plain, ours = subject.pair(lazy)
    firsts = []
    for net in (plain, ours):
        torch.manual_seed(0)
        firsts.append(net(x))
    torch.testing.assert_close(*firsts)
    twice_the_same(lambda net: all_gradients(net, x), plain, ours)


# ---- side inputs ----------------------------------------------------------------------------------------------------


class Conditioned(Subnet):
    width = 2

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.condition = nn.Linear(self.width, sizes[1])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.net(x) * self.condition(context).tanh()
        return h if mask is None else h.masked_fill(mask, 0.0)


@pytest.fixture
def leaf():
    return torch.randn(5, 2, requires_grad=True)


CONDITIONS = {
    "data": lambda leaf, encoder: leaf.detach(),
    "leaf": lambda leaf, encoder: leaf,
    "encoder": lambda leaf, encoder: encoder(leaf),
    "view": lambda leaf, encoder: encoder(leaf)[:1].expand(5, -1),
}


@pytest.mark.parametrize("make", CONDITIONS.values(), ids=CONDITIONS)
@holds(block=Conditioned)
def test_conditions(net, x, leaf, make):
    encoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    y = net(x, context=make(leaf, encoder), mask=torch.rand(5, 1) > 0.7)
    return y, grad(some_loss(y), [x, leaf, *encoder.parameters(), *net.parameters()], allow_unused=True)


@holds(block=Conditioned)
def test_a_condition_shared_by_two_passes(net, x, leaf):
    leaf.grad = None
    context = leaf.exp()
    y = net(net(x, context=context), context=context)
    (some_loss(y) + context.sum()).backward(retain_graph=True)
    return leaf.grad.clone(), grad(some_loss(y), [x, leaf], create_graph=True)


@holds(block=Conditioned)
def test_the_condition_is_an_earlier_output(net, x):
    y = net(x, context=x[:, :2])
    z = net(y, context=y[:, -2:])
    w = net(z, context=y[:, :2])
    return grad(some_loss(w), [x, *net.parameters()])


class OnTheWhole(Conditioned):
    width = FEATURES


@holds(block=OnTheWhole)
def test_the_condition_is_the_input_itself(net, x):
    h = x.exp()
    y = net(h, context=h)
    z = net(y, context=y)
    w = net(z, context=y)
    return grad(some_loss(w), [x, *net.parameters()])


@dataclass
class Info:
    context: list[Tensor | None]
    mask: Tensor
    scale: float

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class Nested(Conditioned):
    def forward(self, x: Tensor, info: Any) -> Tensor:
        return super().forward(x, info["context"][0], info["mask"]) * info["scale"]


@pytest.mark.parametrize("structure", [dict, partial(defaultdict, list), OrderedDict, Info])
@holds(block=Nested)
def test_conditions_in_structures(net, x, leaf, structure):
    info = structure(context=[leaf.exp(), None], mask=torch.ones(5, 1) > 2, scale=0.5)
    return grad(some_loss(net(x, info=info)), [x, leaf, *net.parameters()])


def test_a_condition_changed_in_place_before_backward(saving, x):
    """Right, or an error; never the changed condition's gradient."""
    plain, ours = saving.pair(Conditioned)

    def program(net, change):
        context = torch.linspace(-1, 1, 10).view(5, 2)
        y = net(x, context=context)
        if change:
            context.zero_()
        some_loss(y).backward()

    for _ in range(2):
        with contextlib.suppress(RuntimeError):  # torch's own, or ours
            assert_near(run(lambda net: program(net, True), ours), run(lambda net: program(net, False), plain))
        run(lambda net: program(net, False), ours)


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [iz.Reverse, lambda: iz.InvertibleBatchNorm(3), lambda: iz.InvertibleLayerNorm(3)])
def test_an_inverse_is_in_training_where_its_layer_is(make):
    layer = make()
    assert layer.inv.training
    assert not layer.eval().inv.training
