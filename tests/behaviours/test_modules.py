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
from tests.reference import FEATURES, HALF, PlainAdditive, Subject, assert_near, assert_same_run, mlp, run

grad = torch.autograd.grad


def some_loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).abs().square().sum()


def modules_inside(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the subnets: those that both nets have, and call alike."""
    return [(name, m) for name, m in net.named_modules() if ".".join(name.split(".")[-2:-1]) in ("f", "g")]


# ---- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_inside_blocks_fire_once_with_the_right_tensors(subject, x):
    def program(net):
        log, handles = [], []
        for name, module in modules_inside(net):
            handles += [
                module.register_forward_pre_hook(lambda m, i, n=name: log.append(("pre", n, *i))),
                module.register_forward_hook(lambda m, i, o, n=name: log.append(("post", n, *i, o))),
                module.register_full_backward_pre_hook(lambda m, o, n=name: log.append(("back pre", n, *o))),
                module.register_full_backward_hook(lambda m, i, o, n=name: log.append(("back", n, *i, *o))),
            ]
        some_loss(net(x)).backward()
        for handle in handles:
            handle.remove()
        return log

    subject.holds(program)


def test_hooks_on_the_stack_fire_once_with_the_right_tensors(subject, x):
    def program(net):
        log = []
        handles = [
            net.register_forward_pre_hook(lambda m, i: log.append(("pre", *i))),
            net.register_forward_hook(lambda m, i, o: log.append(("post", *i, o))),
            net.register_full_backward_pre_hook(lambda m, o: log.append(("back pre", *o))),
            net.register_full_backward_hook(lambda m, i, o: log.append(("back", *i, *o))),
        ]
        some_loss(net(x)).backward()
        for handle in handles:
            handle.remove()
        return log

    subject.holds(program)


def test_hooks_on_every_layer_of_a_stack(subject, x):
    if subject.form not in ("sequential", "stack"):
        subject = Subject("stack", subject.mode)

    def program(net):
        log, handles = [], []
        for i, layer in enumerate(net.children()):
            handles += [
                layer.register_forward_hook(lambda m, a, o, i=i: log.append((i, *a, o))),
                layer.register_full_backward_hook(lambda m, a, o, i=i: log.append((i, *a, *o))),
            ]
        some_loss(net(x)).backward()
        for handle in handles:
            handle.remove()
        return log

    subject.holds(program)


@pytest.mark.parametrize("where", ["pre", "post", "stack pre", "stack post", "backward", "backward pre", "kwargs"])
def test_hooks_that_return_values(subject, x, where):
    def program(net):
        inner = [m for _, m in modules_inside(net) if isinstance(m, nn.Linear)][0]
        handle = {
            "pre": lambda: inner.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
            "post": lambda: inner.register_forward_hook(lambda m, i, o: o.exp() * o),
            "stack pre": lambda: net.register_forward_pre_hook(lambda m, i: (i[0].exp(),)),
            "stack post": lambda: net.register_forward_hook(lambda m, i, o: o.exp() * o),
            "backward": lambda: inner.register_full_backward_hook(lambda m, i, o: (i[0] * 3,)),
            "backward pre": lambda: inner.register_full_backward_pre_hook(lambda m, o: (o[0] * 3,)),
            "kwargs": lambda: inner.register_forward_hook(lambda m, i, k, o: o.sin() * o, with_kwargs=True),
        }[where]()
        y = net(x)
        some_loss(y).backward()
        handle.remove()
        return y

    subject.holds(program)


def test_a_hook_that_returns_noise(subject, x):
    def program(net):
        inner = [m for _, m in modules_inside(net) if isinstance(m, nn.Linear)][0]
        handle = inner.register_forward_hook(lambda m, i, o: o * torch.rand_like(o))
        y = net(x)
        some_loss(y).backward()
        handle.remove()
        return y

    subject.holds(program)


def test_a_hook_removed_before_backward(subject, x):
    def program(net):
        inner = [m for _, m in modules_inside(net) if isinstance(m, nn.Linear)][0]
        handle = inner.register_forward_hook(lambda m, i, o: o.exp() * o)
        y = net(x)
        handle.remove()
        some_loss(y).backward()
        return y

    subject.holds(program)


def test_a_hook_added_before_backward(subject, x):
    def program(net):
        log, inner = [], [m for _, m in modules_inside(net) if isinstance(m, nn.Linear)][0]
        y = net(x)
        handle = inner.register_forward_hook(lambda m, i, o: log.append(o) or o * 2)
        some_loss(y).backward()
        handle.remove()
        return log

    subject.holds(program)


def test_a_hook_that_removes_itself(subject, x):
    def program(net):
        inner = [m for _, m in modules_inside(net) if isinstance(m, nn.Linear)][0]

        def once(module, inputs, output):
            handle.remove()
            return output * 2

        handle = inner.register_forward_hook(once)
        y = net(x)
        some_loss(y).backward()
        return y, net(x)

    subject.holds(program)


def test_a_hook_that_builds_a_loss(subject, x):
    """An auxiliary loss on what a block computes inside, as feature extractors do."""

    def program(net):
        kept = []
        handles = [
            m.register_forward_hook(lambda m, i, o: kept.append(o.square().sum() + i[0].exp().sum()))
            for _, m in modules_inside(net)
            if isinstance(m, nn.Tanh)
        ]
        (some_loss(net(x)) + sum(kept)).backward()
        for handle in handles:
            handle.remove()

    subject.holds(program)


def test_global_hooks(subject, x):
    def program(net):
        log = []
        handles = [
            torch_module.register_module_forward_hook(
                lambda m, i, o: log.append(o) if isinstance(m, nn.Linear) else None
            ),
            torch_module.register_module_forward_pre_hook(
                lambda m, i: log.append(i[0]) if isinstance(m, nn.Linear) else None
            ),
        ]
        try:
            some_loss(net(x)).backward()
        finally:
            for handle in handles:
                handle.remove()
        return log

    subject.holds(program)


def test_tensor_hooks_fire_once_with_the_right_gradients(subject, x):
    def program(net):
        log = []
        h = x.exp()
        h.register_hook(lambda g: log.append(("input", g)))
        y = net(h)
        y.register_hook(lambda g: log.append(("output", g)))
        z = net(y)
        z.register_hook(lambda g: g * 2)
        handles = [p.register_hook(lambda g, n=n: log.append((n, g))) for n, p in net.named_parameters()]
        some_loss(z).backward()
        for handle in handles:
            handle.remove()
        return sorted(log, key=lambda entry: (entry[0], entry[1].norm().item()))

    subject.holds(program)


def test_hooks_on_the_graph(subject, x):
    def program(net):
        log = []
        y = net(x.exp())
        z = net(y)
        handles = [
            y.grad_fn.register_prehook(lambda g: log.append(g[0])),
            z.grad_fn.register_prehook(lambda g: log.append(g[0])),
        ]
        some_loss(z).backward()
        return log, len(handles)

    subject.holds(program)


def test_post_accumulate_hooks(subject, x):
    def program(net):
        log = []
        handles = [
            p.register_post_accumulate_grad_hook(lambda p, n=n: log.append((n, p.grad.clone())))
            for n, p in net.named_parameters()
        ]
        some_loss(net(x)).backward()
        for handle in handles:
            handle.remove()
        return dict(log), len(log)

    subject.holds(program)


class Biased(nn.Module):
    """Its bias gets a gradient that needs nothing saved, before all else."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net, self.bias = mlp(*sizes), nn.Parameter(torch.zeros(sizes[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.bias


@pytest.mark.parametrize("block", [mlp, Biased])
def test_the_optimizer_steps_in_backward(subject, x, block):
    def program(net):
        def step(p):
            with torch.no_grad():
                p.sub_(p.grad, alpha=1e-2)
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(step) for p in net.parameters()]
        for _ in range(3):
            some_loss(net(x)).backward()
        for handle in handles:
            handle.remove()
        return net(x)

    subject.holds(program, block)


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

    def gradient(shift, scale):
        handle = shift.bias.register_post_accumulate_grad_hook(move)
        some_loss(shift(scale(x))).backward()
        handle.remove()
        return scale.log_scale.grad, x.grad

    results = []
    for option in ("store", mode):
        x = torch.ones(5, FEATURES, requires_grad=True)
        scale = iz.ElementwiseAffine(FEATURES, mode=option)
        shift = Shift()
        shift.mode = option
        results.append(gradient(shift, scale))
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
        assert_same_run(lambda net: grad(some_loss(net(x)), [x, *net.parameters()]), plain, net)
    modes = [m.mode for m in twin.modules() if isinstance(m, iz.InvertibleModule)]
    assert set(modes) <= {subject.mode}


def test_deepcopy_shares_nothing(subject, x):
    plain, ours = subject.pair()
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_same_run(lambda net: grad(some_loss(net(x)), [x, *net.parameters()]), plain, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_conversions(subject, dtype):
    plain, ours = subject.pair(depth=2)
    x = torch.randn(5, FEATURES, dtype=dtype, requires_grad=True)

    def program(net):
        y = net(x)
        return y, grad(some_loss(y), [x, *net.parameters()])

    eps = torch.finfo(dtype).eps
    for _ in range(2):
        assert_same_run(program, plain.to(dtype), ours.to(dtype), 30 * eps)
    if dtype is torch.float16:
        assert_same_run(program, plain.half(), ours.half(), 30 * eps)


class Modulus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.abs())


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
@pytest.mark.parametrize("container", [nn.Sequential, iz.InvertibleSequential])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")  # torch's own
def test_complex(mode, container):
    def block():
        return nn.Sequential(nn.Linear(HALF, 4), Modulus(), nn.Linear(4, HALF))

    plain = nn.Sequential(*[PlainAdditive(block(), block()) for _ in range(2)]).to(torch.complex128)
    ours = container(*[iz.AdditiveCoupling(block(), block(), mode=mode) for _ in range(2)]).to(torch.complex128)
    ours.load_state_dict(plain.state_dict())
    z = torch.randn(5, FEATURES, dtype=torch.complex128, requires_grad=True)

    def program(net, of):
        y = net(of(z))
        return grad(y.abs().square().sum(), [z, *net.parameters()])

    for of in (lambda z: z, lambda z: z.conj(), lambda z: z.exp(), lambda z: -z.conj().resolve_conj()):
        for _ in range(2):
            pairs = zip(
                run(lambda n, of=of: program(n, of), ours)["result"],
                run(lambda n, of=of: program(n, of), plain)["result"],
                strict=True,
            )
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


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
def parametrized(request):
    def block(inputs, outputs):
        make = PARAMETRIZED[request.param]
        return nn.Sequential(make(nn.Linear(inputs, 4)), nn.Tanh(), make(nn.Linear(4, outputs)))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        yield block


def test_parametrizations(subject, x, parametrized):
    def program(net):
        y = net(x)
        return y, grad(some_loss(y), [x, *net.parameters()])

    subject.holds(program, parametrized)


def test_parametrizations_train(subject, x, parametrized):
    def program(net):
        optimizer = torch.optim.SGD(net.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            some_loss(net(x)).backward()
            optimizer.step()

    subject.holds(program, parametrized)


def test_cached_parametrizations(subject, x):
    def block(inputs, outputs):
        return nn.Sequential(PARAMETRIZED["custom"](nn.Linear(inputs, 4)), nn.Tanh(), nn.Linear(4, outputs))

    def program(net):
        with parametrize.cached():
            loss = some_loss(net(net(x)))
            loss.backward()

    subject.holds(program, block)


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


def test_requires_grad_switched_between_forward_and_backward(subject, x):
    """As a discriminator is frozen for the generator's turn."""

    def program(net):
        y = net(x)
        net.requires_grad_(False)
        gradient = grad(some_loss(y), x)
        net.requires_grad_(True)
        return gradient

    subject.holds(program)


def test_a_parameter_replaced_between_forward_and_backward(subject, x):
    def program(net):
        linear = [m for m in net.modules() if isinstance(m, nn.Linear)][0]
        y, old = net(x), linear.weight
        linear.weight = nn.Parameter(torch.zeros_like(old))
        some_loss(y).backward()
        linear.weight = old

    subject.holds(program)


def test_lazy_modules(subject, x):
    def program(net):
        y = net(x)
        some_loss(y).backward()
        return y

    plain, ours = subject.pair(_lazy)
    torch.manual_seed(0)
    first = plain(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours(x), first)
    for _ in range(2):
        assert_same_run(program, plain, ours)


def _lazy(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, outputs))


# ---- side inputs ----------------------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net, self.condition = mlp(*sizes), nn.Linear(2, sizes[1])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.net(x) * self.condition(context).tanh()
        return h if mask is None else h.masked_fill(mask, 0.0)


def test_conditions(subject, x):
    leaf = torch.randn(5, 2, requires_grad=True)
    encoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    mask = torch.rand(5, 1) > 0.7
    conditions = {
        "data": lambda: leaf.detach(),
        "leaf": lambda: leaf,
        "encoder": lambda: encoder(leaf),
        "view": lambda: encoder(leaf)[:1].expand(5, -1),
    }
    for make in conditions.values():

        def program(net, make=make):
            y = net(x, context=make(), mask=mask)
            return y, grad(some_loss(y), [x, leaf, *encoder.parameters(), *net.parameters()], allow_unused=True)

        subject.holds(program, Conditioned)


def test_a_condition_shared_by_two_passes(subject, x):
    leaf = torch.randn(5, 2, requires_grad=True)

    def program(net):
        context = leaf.exp()
        y = net(net(x, context=context), context=context)
        (some_loss(y) + context.sum()).backward(retain_graph=True)
        gradient = leaf.grad.clone()
        leaf.grad = None
        return gradient, grad(some_loss(y), [x, leaf], create_graph=True)

    subject.holds(program, Conditioned)


def test_the_condition_is_an_earlier_output(subject, x):
    def program(net):
        y = net(x, context=x[:, :2])
        z = net(y, context=y[:, -2:])
        w = net(z, context=y[:, :2])
        return grad(some_loss(w), [x, *net.parameters()])

    subject.holds(program, Conditioned)


def test_the_condition_is_the_input_itself(subject, x):
    class Whole(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.net, self.condition = mlp(*sizes), nn.Linear(FEATURES, sizes[1])

        def forward(self, x, context):
            return self.net(x) * self.condition(context).tanh()

    def program(net):
        h = x.exp()
        y = net(h, context=h)
        z = net(y, context=y)
        w = net(z, context=y)
        return grad(some_loss(w), [x, *net.parameters()])

    subject.holds(program, Whole)


@dataclass
class Info:
    context: list[Tensor | None]
    mask: Tensor
    scale: float

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@pytest.mark.parametrize("structure", [dict, partial(defaultdict, list), OrderedDict, Info])
def test_conditions_in_structures(subject, x, structure):
    class Nested(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.net = Conditioned(*sizes)

        def forward(self, x, info):
            return self.net(x, info["context"][0], info["mask"]) * info["scale"]

    leaf = torch.randn(5, 2, requires_grad=True)

    def program(net):
        info = structure(context=[leaf.exp(), None], mask=torch.ones(5, 1) > 2, scale=0.5)
        return grad(some_loss(net(x, info=info)), [x, leaf, *net.parameters()])

    subject.holds(program, Nested)


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
