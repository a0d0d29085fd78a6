"""Gradients are those of the plain net, however they are asked for."""

import itertools
import sys

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from tests.reference import FEATURES, HALF, PlainAdditive, Subject, assert_near, assert_same_run, mlp, run

grad = torch.autograd.grad


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def some_loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() + y.square().mean()


# ---- what needs a gradient ------------------------------------------------------------------------------------------


def test_the_input_needs_a_gradient(subject, x):
    def program(net):
        here = leaf(x)
        y = net(here)
        some_loss(y).backward()
        return y, here.grad

    subject.holds(program)


def test_raw_data_trains(subject, data):
    def program(net):
        y = net(data)
        some_loss(y).backward()
        return y

    subject.holds(program)


def test_the_input_alone_needs_a_gradient(subject, x):
    def program(net):
        net.requires_grad_(False)
        y = net(x)
        return y, grad(some_loss(y), x)

    subject.holds(program)


def test_nothing_needs_a_gradient(subject, data):
    subject.holds(lambda net: net.requires_grad_(False)(data))


@pytest.mark.parametrize("needs_grad", [True, False])
def test_every_subset_of_parameters_frozen(subject, data, needs_grad):
    plain, ours = subject.pair(depth=2)
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

        assert_same_run(program, plain, ours)


class WithUnused(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net, self.unused = mlp(*sizes), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_parameters_never_used(subject, x):
    subject.holds(lambda net: some_loss(net(x)).backward(), WithUnused)


def test_requires_grad_of_the_output_is_true(subject, data):
    def program(net):
        before = net(data).requires_grad
        net.requires_grad_(False)
        after = net(data).requires_grad
        net.requires_grad_(True)
        return before, after

    subject.holds(program)


# ---- how the output is used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.sum(),
        lambda y: y[:, :2].square().sum(),
        lambda y: y[2].exp().sum(),
        lambda y: y.sum() + y.square().sum(),
        lambda y: (y * y.detach()).sum(),
        lambda y: (y.exp() * y.sin()).sum(),
        lambda y: y.view(-1)[::3].sum() + y.t().matmul(y).sum(),
        lambda y: sum(part.square().sum() for part in y.chunk(2, 1)),
        lambda y: y.chunk(2, 1)[0].sum(),
        lambda y: y.chunk(2, 1)[1].sum(),
        lambda y: (0 * y).sum(),
    ],
    ids=["sum", "columns", "row", "twice", "detached", "product", "views", "streams", "first", "second", "zero"],
)
def test_the_output_is_used(subject, x, use):
    subject.holds(lambda net: grad(use(net(x)), [x, *net.parameters()], allow_unused=True))


def test_an_intermediate_output_is_in_the_loss_too(subject, x):
    def program(net):
        middle = net(x)
        y = net(middle)
        (some_loss(middle) + some_loss(y)).backward()
        return grad(some_loss(net(net(x))), x)

    subject.holds(program)


def test_intermediate_outputs_retain_their_gradients(subject, x):
    def program(net):
        middle = net(x)
        middle.retain_grad()
        y = net(middle)
        y.retain_grad()
        some_loss(y).backward()
        return middle.grad, y.grad

    subject.holds(program)


def test_the_output_is_detached_and_goes_on(subject, x):
    def program(net):
        y = net(x)
        z = net(y.detach())
        some_loss(z).backward()
        some_loss(y).backward()

    subject.holds(program)


def test_branches_from_one_activation(subject, x):
    def program(net):
        y = net(x)
        a, b = net(y), net(y)
        (some_loss(a) + some_loss(b.exp()) + some_loss(y)).backward()

    subject.holds(program)


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
def test_one_activation_is_both_streams(mode, data):
    """And twice over: of its layer's output there is one, whoever moves it."""
    f, g = mlp(FEATURES, FEATURES), mlp(FEATURES, FEATURES)
    layers = [iz.AdditiveCoupling(net, mode=mode) for net in (mlp(HALF, HALF), f)]
    both, plain = iz.AdditiveCoupling(f, g, mode=mode), PlainAdditive(f, g)
    x = leaf(data)
    y = layers[0](x)
    results = []
    for outputs in ([*both(y, y), *layers[1](y, y)], [*plain(y, y), *PlainAdditive(f)(y, y)]):
        loss = sum(some_loss(z) for z in outputs)
        results.append(grad(loss, [x, *f.parameters(), *g.parameters()], retain_graph=True))
    assert_near(*results)


def test_one_branch_is_dropped(subject, x):
    def program(net):
        y = net(x)
        a, b = net(y), net(y)
        del a
        some_loss(b).backward()

    subject.holds(program)


def test_a_later_activation_is_dropped_before_backward(subject, x):
    def program(net):
        y = net(x)
        z = net(y)
        del z
        some_loss(y).backward()

    subject.holds(program)


# ---- how backward is called -----------------------------------------------------------------------------------------


def test_grad_for_parameters_leaves_their_grad_alone(subject, x):
    def program(net):
        grads = grad(some_loss(net(x)), [*net.parameters()])
        assert all(p.grad is None for p in net.parameters())
        return grads

    subject.holds(program)


def test_grad_for_the_input_leaves_parameters_alone(subject, x):
    def program(net):
        gradient = grad(some_loss(net(x)), x)
        assert all(p.grad is None for p in net.parameters())
        return gradient

    subject.holds(program)


def test_grad_for_one_parameter_at_a_time(subject, x):
    def program(net):
        loss = some_loss(net(x))
        return [grad(loss, p, retain_graph=True) for p in net.parameters()]

    subject.holds(program)


def test_grad_for_one_parameter_at_a_time_from_the_last(subject, x):
    def program(net):
        loss = some_loss(net(x))
        return [grad(loss, p, retain_graph=True) for p in [*net.parameters()][::-1]]

    subject.holds(program)


def test_grad_of_one_parameter_frees_only_a_part_of_the_graph(subject, x):
    def program(net):
        loss = some_loss(net(x))
        return grad(loss, [*net.parameters()][-1])

    subject.holds(program)


def test_backward_with_inputs(subject, x):
    def program(net):
        inputs = [*net.parameters()][::2]
        some_loss(net(x)).backward(inputs=inputs)

    subject.holds(program)


def test_retain_graph_and_a_second_backward(subject, x):
    def program(net):
        loss = some_loss(net(x))
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in net.parameters()]
        loss.backward()
        return first

    subject.holds(program)


def test_retain_graph_then_much_more(subject, x):
    def program(net):
        y = net(x)
        some_loss(y).backward(retain_graph=True)
        z = net(y)
        first = grad(some_loss(z), [x, *net.parameters()], retain_graph=True)
        some_loss(y.exp()).backward(retain_graph=True)
        some_loss(z.exp()).backward(retain_graph=True)
        second = grad(some_loss(z), x)
        return first, second

    subject.holds(program)


def test_two_losses_one_after_the_other(subject, x):
    def program(net):
        y = net(x)
        y[:, 0].sum().backward(retain_graph=True)
        y[:, -1].square().sum().backward()

    subject.holds(program)


def test_a_vector_jacobian_product(subject, x):
    def program(net):
        y = net(x)
        y.backward(torch.linspace(0, 1, y.numel()).view_as(y))

    subject.holds(program)


def test_expanded_and_noncontiguous_output_gradients(subject, x):
    def program(net):
        y = net(x)
        y.backward(torch.ones(()).expand_as(y), retain_graph=True)
        y.backward(torch.randn(y.shape[::-1]).t())

    subject.holds(program)


# ---- higher order ---------------------------------------------------------------------------------------------------


def test_gradient_penalty(subject, x):
    def program(net):
        y = net(x)
        (gradient,) = grad(some_loss(y), x, create_graph=True)
        (some_loss(y) + gradient.square().sum()).backward()
        return gradient

    subject.holds(program)


def test_gradient_penalty_alone(subject, x):
    def program(net):
        (gradient,) = grad(some_loss(net(x)), x, create_graph=True)
        (gradient.norm() - 1).square().backward()

    subject.holds(program)


def test_gradient_of_parameter_gradients(subject, x):
    def program(net):
        grads = grad(some_loss(net(x)), [*net.parameters()], create_graph=True)
        sum(g.square().sum() for g in grads).backward()

    subject.holds(program)


def test_hessian_vector_product(subject, data):
    def program(net):
        return torch.autograd.functional.hvp(lambda x: some_loss(net(x)), data, torch.ones_like(data))

    subject.holds(program)


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


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_function_that_differentiates_inside_itself(subject, data, needs_grad):
    def program(net):
        x = data.clone().requires_grad_(needs_grad)
        y = net(x)
        some_loss(y).backward()
        return y, x.grad

    subject.holds(program, Gradient)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x * w).round()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, g * x


class StraightThrough(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net, self.scale = mlp(*sizes), nn.Parameter(torch.ones(()) * 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        return Straight.apply(h, self.scale.expand_as(h))


def test_a_custom_function_inside_a_block(subject, x):
    subject.holds(lambda net: some_loss(net(x)).backward(), StraightThrough)


class Branching(nn.Module):
    """The path through the block follows from the data."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.a, self.b = mlp(*sizes), nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_control_flow_inside_a_block(subject, x):
    def program(net):
        for batch in (x, -x, 3 * x, x - x.mean()):
            some_loss(net(batch)).backward()

    subject.holds(program, Branching)


class NoGradInside(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.a, self.b = mlp(*sizes), mlp(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.a(x)
        return self.b(x) * scale


def test_no_grad_inside_a_block(subject, x):
    subject.holds(lambda net: some_loss(net(x)).backward(), NoGradInside)


# ---- several passes -------------------------------------------------------------------------------------------------


def test_accumulation_over_micro_batches(subject, data):
    def program(net):
        for part in data.split(2):
            some_loss(net(part)).backward()

    subject.holds(program)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_forwards_in_flight_in_any_order(subject, x, order):
    def program(net):
        losses = [some_loss(net(x * scale)) for scale in (1, 2, 3)]
        for i in order:
            losses[i].backward()

    subject.holds(program)


def test_the_stack_applied_twice(subject, x):
    subject.holds(lambda net: (some_loss(net(net(x))).backward(), grad(some_loss(net(net(x))), x)))


def test_the_stack_applied_twice_to_one_input(subject, x):
    subject.holds(lambda net: (some_loss(net(x) * net(x)).backward(), grad(some_loss(net(x) - 2 * net(x)), x)))


def test_two_stacks_on_one_input(subject, x):
    plain, ours = zip(subject.pair(), subject.pair(), strict=True)
    plain, ours = nn.ModuleList(plain), nn.ModuleList(ours)

    def program(nets):
        (some_loss(nets[0](x)) + some_loss(nets[1](x))).backward()
        return grad(some_loss(nets[0](x) * nets[1](x)), x)

    for _ in range(2):
        assert_same_run(program, plain, ours)


def test_a_tied_block(subject, x):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = {}

        def __call__(self, *sizes: int) -> nn.Module:
            return self.nets.setdefault(sizes, mlp(*sizes))

    plain = subject.pair(Shared())[0]
    ours = subject.pair(Shared())[1]
    ours.load_state_dict(plain.state_dict())
    for _ in range(2):
        assert_same_run(lambda net: some_loss(net(x)).backward(), plain, ours)


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
@pytest.mark.parametrize("container", [nn.Sequential, iz.InvertibleSequential])
def test_a_tied_layer(mode, container, x):
    def net(make, container):
        torch.manual_seed(3)
        a, b = make(mlp(HALF, HALF), mlp(HALF, HALF)), make(mlp(HALF, HALF))
        return container(a, b, a, a, b)

    plain, ours = net(PlainAdditive, nn.Sequential), net(iz.AdditiveCoupling, container)
    with iz.mode(ours, mode):
        for _ in range(2):
            assert_same_run(lambda net: grad(some_loss(net(x)), [x, *net.parameters()]), plain, ours)


def test_training(subject, data):
    def program(net):
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = some_loss(net(data))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    subject.holds(program)


def test_lbfgs(subject, data):
    def program(net):
        optimizer = torch.optim.LBFGS(net.parameters(), lr=1e-3, max_iter=4)

        def closure():
            optimizer.zero_grad()
            loss = some_loss(net(data))
            loss.backward()
            return loss

        optimizer.step(closure)
        return optimizer.step(closure).detach()

    subject.holds(program)


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
        for _ in range(2):
            assert_near(run(program, ours), run(program, stored))
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
