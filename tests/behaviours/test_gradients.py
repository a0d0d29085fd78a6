"""Gradients are those of the plain net, however they are asked for."""

import itertools
import sys

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from tests.behaviours.helpers import Subnet, all_gradients, holds, some_loss, twice_the_same
from tests.reference import FEATURES, HALF, MODES, PlainAdditive, Subject, assert_near, mlp, run

grad = torch.autograd.grad


@pytest.mark.parametrize("needs_grad", [True, False], ids=["leaf", "data"])
def test_every_subset_of_parameters_frozen(subject, data, needs_grad):
    plain, ours = subject.pair()
    count = len([*plain.parameters()])
    for subset in itertools.product([True, False], repeat=4):
        flags = [*subset, *[subset[0]] * (count - 4)]

        def program(net, flags=flags):
            for p, flag in zip(net.parameters(), flags, strict=True):
                p.requires_grad_(flag)
            x = data.clone().requires_grad_(needs_grad)
            y = net(x)
            if y.requires_grad:
                some_loss(y).backward()
            return y, x.grad

        twice_the_same(program, plain, ours)


# ---- how the output is used -----------------------------------------------------------------------------------------

LOSSES = {
    "sum": lambda net, x: net(x).sum(),
    "row": lambda net, x: net(x)[2].exp().sum(),
    "zero": lambda net, x: (0 * net(x)).sum(),
    "first stream": lambda net, x: net(x).chunk(2, 1)[0].sum(),
    "second stream": lambda net, x: net(x).chunk(2, 1)[1].square().sum(),
    "both streams": lambda net, x: sum(part.square().sum() for part in net(x).chunk(2, 1)),
    "twice": lambda net, x: net(net(x)).square().sum(),
    "twice beside itself": lambda net, x: some_loss(net(x) * net(x)) + some_loss(net(x) - 2 * net(x)),
}
USES = {
    "detached": lambda y: (y * y.detach()).sum(),
    "product": lambda y: (y.exp() * y.sin()).sum() + y.square().sum(),
    "views": lambda y: y.view(-1)[::3].sum() + y.t().matmul(y).sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@holds
def test_losses(net, x, loss):
    return grad(loss(net, x), [x, *net.parameters()], allow_unused=True)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@holds
def test_uses_of_an_output(net, x, use):
    return grad(use(net(x)), [x, *net.parameters()])


@holds
def test_intermediate_outputs_are_in_the_loss_too_and_retain_their_gradients(net, x):
    middle = net(x)
    middle.retain_grad()
    y = net(middle)
    y.retain_grad()
    (some_loss(middle) + some_loss(y)).backward()
    return middle.grad, y.grad


@holds
def test_the_output_is_detached_and_goes_on(net, x):
    y = net(x)
    z = net(y.detach())
    some_loss(z).backward()
    some_loss(y).backward()


@holds
def test_branches_from_one_activation(net, x):
    y = net(x)
    a, b = net(y), net(y)
    (some_loss(a) + some_loss(b.exp()) + some_loss(y)).backward()


@pytest.mark.parametrize("mode", MODES)
def test_one_activation_is_both_streams(mode, data):
    """And twice over: of its layer's output there is one, whoever moves it."""
    f, g = mlp(FEATURES, FEATURES), mlp(FEATURES, FEATURES)
    layers = [iz.AdditiveCoupling(net, mode=mode) for net in (mlp(HALF, HALF), f)]
    both, plain = iz.AdditiveCoupling(f, g, mode=mode), PlainAdditive(f, g)
    x = data.requires_grad_()
    y = layers[0](x)
    results = []
    for outputs in ([*both(y, y), *layers[1](y, y)], [*plain(y, y), *PlainAdditive(f)(y, y)]):
        loss = sum(some_loss(z) for z in outputs)
        results.append(grad(loss, [x, *f.parameters(), *g.parameters()], retain_graph=True))
    assert_near(*results)


@holds
def test_later_activations_are_dropped_before_backward(net, x):
    y = net(x)
    dropped, kept = net(y), net(y)
    del dropped
    some_loss(kept).backward(retain_graph=True)
    del kept
    some_loss(y).backward()


# ---- how backward is called -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [lambda x, *p: p, lambda x, *_: [x], lambda *p: p[-1]],
    ids=["parameters", "input", "the last one"],
)
@holds
def test_grad_leaves_the_grad_of_parameters_alone(net, x, wanted):
    grads = grad(some_loss(net(x)), wanted(x, *net.parameters()))
    assert all(p.grad is None for p in net.parameters())
    return grads


@pytest.mark.parametrize("step", [1, -1], ids=["from the first", "from the last"])
@holds
def test_grad_for_one_parameter_at_a_time(net, x, step):
    loss = some_loss(net(x))
    return [grad(loss, p, retain_graph=True) for p in [*net.parameters()][::step]]


@holds
def test_backward_with_inputs(net, x):
    some_loss(net(x)).backward(inputs=[*net.parameters()][::2])


@holds
def test_retain_graph_and_a_second_backward(net, x):
    loss = some_loss(net(x))
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    return first


@holds
def test_retain_graph_then_much_more(net, x):
    y = net(x)
    some_loss(y).backward(retain_graph=True)
    z = net(y)
    first = grad(some_loss(z), [x, *net.parameters()], retain_graph=True)
    some_loss(y.exp()).backward(retain_graph=True)
    some_loss(z.exp()).backward(retain_graph=True)
    second = grad(some_loss(z), x)
    return first, second


@holds
def test_two_losses_one_after_the_other(net, x):
    y = net(x)
    y[:, 0].sum().backward(retain_graph=True)
    y[:, -1].square().sum().backward()


@holds
def test_expanded_and_noncontiguous_output_gradients(net, x):
    y = net(x)
    y.backward(torch.ones(()).expand_as(y), retain_graph=True)
    y.backward(torch.randn(y.shape[::-1]).t())


# ---- higher order ---------------------------------------------------------------------------------------------------


@holds
def test_gradient_penalty(net, x):
    y = net(x)
    (gradient,) = grad(some_loss(y), x, create_graph=True)
    (some_loss(y) + gradient.square().sum()).backward()
    return gradient


@holds
def test_gradient_penalty_alone(net, x):
    (gradient,) = grad(some_loss(net(x)), x, create_graph=True)
    (gradient.norm() - 1).square().backward()


@holds
def test_gradient_of_parameter_gradients(net, x):
    grads = grad(some_loss(net(x)), [*net.parameters()], create_graph=True)
    sum(g.square().sum() for g in grads).backward()


@holds
def test_hessian_vector_product(net, data):
    return torch.autograd.functional.hvp(lambda x: some_loss(net(x)), data, torch.ones_like(data))


# ---- what blocks do inside ------------------------------------------------------------------------------------------


class Unused(Subnet):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.unused = nn.Linear(2, 2)


class Gradient(nn.Module):
    """A subnet that differentiates inside itself: the gradient of a potential."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 4), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            here = x if x.requires_grad else x.detach().requires_grad_()
            (gradient,) = grad(self.first(here).tanh().sum(), here, create_graph=True)
        return self.last(gradient)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x * w).round()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, g * x


class StraightThrough(Subnet):
    def forward(self, x: Tensor) -> Tensor:
        h = self.net[0](x)
        return self.net[1:](Straight.apply(h, self.net[0].bias.expand_as(h)))


class Branching(Subnet):
    """The path through the block follows from the data."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else 2 * self.net[::2](x)


class NoGradInside(Subnet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.net(x)
        return self.net(x) * scale


class Constant(nn.Module):
    """Returns a view of a parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), -1)


def in_place(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 4), nn.ReLU(inplace=True), nn.Linear(4, outputs), nn.ELU(inplace=True))


@pytest.mark.parametrize("needs_grad", [True, False], ids=["leaf", "data"])
@pytest.mark.parametrize("block", [Unused, Gradient, StraightThrough, Branching, NoGradInside, Constant, in_place])
@holds
def test_blocks(net, data, block, needs_grad):
    outputs = []
    for scale in (1, -1):
        x = (scale * data).requires_grad_(needs_grad)
        y = net(x)
        some_loss(y).backward()
        outputs += [y, x.grad]
    return outputs


# ---- several passes -------------------------------------------------------------------------------------------------


@holds
def test_accumulation_over_micro_batches(net, data):
    for part in data.split(2):
        some_loss(net(part)).backward()


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@holds
def test_forwards_in_flight_in_any_order(net, x, order):
    losses = [some_loss(net(x * scale)) for scale in (1, 2, 3)]
    for i in order:
        losses[i].backward()


def test_two_stacks_on_one_input(subject, x):
    plain, ours = map(nn.ModuleList, zip(subject.pair(), subject.pair(), strict=True))

    def program(nets):
        (some_loss(nets[0](x)) + some_loss(nets[1](x))).backward()
        return grad(some_loss(nets[0](x) * nets[1](x)), x)

    twice_the_same(program, plain, ours)


def test_a_tied_block(subject, x):
    def shared():
        nets = {}
        return lambda *sizes: nets.setdefault(sizes, mlp(*sizes))

    plain, ours = subject.pair(shared())[0], subject.pair(shared())[1]
    ours.load_state_dict(plain.state_dict())
    twice_the_same(lambda net: some_loss(net(x)).backward(), plain, ours)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("container", [nn.Sequential, iz.InvertibleSequential])
def test_a_tied_layer(mode, container, x):
    def net(make, container):
        torch.manual_seed(3)
        a, b = make(mlp(HALF, HALF), mlp(HALF, HALF)), make(mlp(HALF, HALF))
        return container(a, b, a, a, b)

    plain, ours = net(PlainAdditive, nn.Sequential), net(iz.AdditiveCoupling, container)
    with iz.mode(ours, mode):
        twice_the_same(lambda net: all_gradients(net, x), plain, ours)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.Adam(p, 1e-3), lambda p: torch.optim.LBFGS(p, lr=1e-3, max_iter=4)],
    ids=["adam", "lbfgs"],
)
@holds
def test_training(net, data, make):
    optimizer = make(net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = some_loss(net(data))
        loss.backward()
        return loss

    return [optimizer.step(closure).detach() for _ in range(5)]


# ---- the other direction --------------------------------------------------------------------------------------------


def test_the_inverse_trains(subject, data):
    if subject.form in ("sequential", "streams"):
        subject = Subject("stack", subject.mode)
    _, ours = subject.pair()
    stored = Subject(subject.form, "store").pair()[1]
    stored.load_state_dict(ours.state_dict())
    for program in (
        lambda net: some_loss(net.inverse(data)).backward(),
        lambda net: some_loss(net.inv(data)).backward(),
    ):
        twice_the_same(program, stored, ours)
    torch.testing.assert_close(ours.inverse(ours(data)).detach(), data, rtol=0, atol=1e-12)


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sequential", "stack", "streams"])
@pytest.mark.parametrize(("dtype", "depth", "allowed"), [(torch.float64, 16, 1e-12), (torch.float32, 100, 2e-6)])
def test_invert_is_as_precise_as_store(form, dtype, depth, allowed):
    def program(net):
        x = torch.randn(64, FEATURES, dtype=dtype, requires_grad=True)
        net(x).square().sum().backward()
        return x.grad

    _, ours = Subject(form, "invert").pair(depth=depth)
    ours.to(dtype)
    results = []
    for mode in ("store", "invert"):
        with iz.mode(ours, mode):
            outcome = run(program, ours)
            results.append(torch.cat([g.flatten() for g in (outcome["result"], *outcome["grads"].values())]).double())
    stored, inverted = results
    assert (inverted - stored).norm() / stored.norm() < allowed


@pytest.fixture
def shallow():
    """Little room on the interpreter's stack."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.slow
def test_ten_thousand_layers_do_not_recurse(shallow):
    layer = iz.AdditiveCoupling(nn.Linear(1, 1))
    net = iz.InvertibleSequential(*[layer] * 10_000)
    x = torch.randn(1, 2, requires_grad=True)
    (gradient,) = grad(net(x).sum(), x)
    torch.testing.assert_close(gradient, torch.cat((torch.ones(1, 1), 1 + 10_000 * layer.f.weight.detach()), 1))


@pytest.mark.slow
def test_ten_thousand_layers_pulled_at_once(shallow):
    """The graph wants the first layer alone, so every later one has to be inverted for it."""
    first, later = iz.AdditiveCoupling(nn.Linear(1, 1)), iz.AdditiveCoupling(nn.Linear(1, 1)).requires_grad_(False)
    x = torch.randn(1, 2)
    y = z = first(x)
    for _ in range(10_000):
        z = later(z)
    (gradient,) = grad(y.sum(), first.f.weight)
    torch.testing.assert_close(gradient, x[:, 1:])
    del z


def test_the_first_half_of_a_layer_before_the_second():
    """Backward through f frees its graph while g, which read what f had moved, waits for a backward of its own."""

    def halves(layer):
        layer.zero_grad()
        y1, y2 = layer(torch.ones(2, 3), torch.ones(2, 3))
        first, second = y1.square().sum(), y2.square().sum()
        del y1, y2  # so that nothing but the layer sees them
        first.backward()
        second.backward(inputs=[*layer.g.parameters()])
        return [p.grad.clone() for p in layer.parameters()]

    layer = iz.AdditiveCoupling(mlp(3, 3), mlp(3, 3))
    with iz.mode(layer, "store"):
        expected = halves(layer)
    for mode in ("recompute", "invert"):
        with iz.mode(layer, mode):
            torch.testing.assert_close(halves(layer), expected)
            torch.testing.assert_close(halves(layer), expected)  # the first one was checked, and so looked at
