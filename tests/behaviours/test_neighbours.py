"""What stands before, beside and behind a net: inputs of every kind, and operations that save or change its tensors."""

import contextlib
import re

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import invzoo as iz
from invzoo.engine.nested import plain_parts
from tests.reference import FEATURES, HALF, MODES, Chain, PlainAdditive, assert_near, assert_same_run, mlp, run

grad = torch.autograd.grad


def some_loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.real.dtype).view(y.shape)).abs().square().sum()


def right_or_refused(program, subject, match="in.?place", block=mlp):
    """The numbers of the plain net, had it copied what it saved; or an error that says what is wrong. Twice over."""
    plain, ours = subject.pair(block)

    def truth(net):
        with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copy: copy):
            return program(net)

    for _ in range(2):
        try:
            actual = run(program, ours)
        except RuntimeError as error:
            assert re.search(match, str(error)), error  # noqa: PT017 - a number may be right instead
        else:
            assert_near(actual, run(truth, plain))
        if block is mlp:
            some_loss(ours(torch.randn(5, FEATURES))).backward()  # an unhurt step between


# ---- before ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        torch.relu,
        torch.exp,
        torch.sigmoid,
        torch.tanh,
        lambda x: (x * 1).relu_(),
        lambda x: (x * 2).mul_(x),
        lambda x: F.leaky_relu(x * 1, 0.1, inplace=True),
        lambda x: F.layer_norm(x, x.shape[1:]),
    ],
    ids=["relu", "exp", "sigmoid", "tanh", "relu_", "mul_", "leaky_relu_", "layer_norm"],
)
def test_an_operation_that_saved_its_output(subject, x, before):
    subject.holds(lambda net: grad(some_loss(net(before(x))), [x, *net.parameters()]))


def test_plain_layers_around_and_between(subject, x):
    outer = nn.ModuleList([nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES), nn.ReLU(), nn.Linear(FEATURES, 2)])

    def program(net):
        y = outer[3](net(outer[2](outer[1](net(outer[0](x))))))
        return grad(some_loss(y), [x, *outer.parameters(), *net.parameters()])

    subject.holds(program)


# ---- beside ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, f: x + f(x),
        lambda x, f: f(x) + x,
        lambda x, f: x * f(x),
        lambda x, f: f(x) - x.exp(),
        lambda x, f: x @ f(x).t(),
        lambda x, f: f(f(x)) * f(x) * x,
    ],
    ids=["x+f", "f+x", "x*f", "f-exp", "matmul", "ff*f*x"],
)
@pytest.mark.parametrize("of", ["op", "net"])
def test_residuals(subject, x, combine, of):
    def program(net):
        here = {"op": lambda: x.exp(), "net": lambda: net(x)}[of]()
        return grad(some_loss(combine(here, net)), [x, *net.parameters()])

    subject.holds(program)


def test_the_input_is_read_after_forward(subject, x):
    def program(net):
        h = x.exp()
        y = net(h)
        copy, mean = h.detach().clone(), h.mean()
        (some_loss(y) + h.square().sum() + mean).backward()
        return copy, h.detach()

    subject.holds(program)


def change(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(2)


def test_raw_data_changed_after_forward(subject):
    def program(net):
        buffer = torch.randn(5, FEATURES)
        loss = some_loss(net(buffer))
        buffer.copy_(torch.randn(5, FEATURES))
        loss.backward()

    right_or_refused(program, subject)


def test_an_activation_changed_after_forward(subject):
    def program(net):
        x = torch.linspace(-1, 1, 5 * FEATURES).view(5, FEATURES).requires_grad_()
        h = x * 2
        y = net(h)
        h.mul_(3)
        return grad(some_loss(y) + some_loss(h), [x, *net.parameters()])

    right_or_refused(program, subject)


def test_an_activation_changed_after_forward_of_a_frozen_net(subject):
    def program(net):
        x = torch.linspace(-1, 1, 5 * FEATURES).view(5, FEATURES).requires_grad_()
        h = x * 2
        y = net.requires_grad_(False)(h)
        net.requires_grad_(True)
        h.mul_(3)
        return grad(some_loss(y) + some_loss(h), [x])

    right_or_refused(program, subject)


def test_raw_data_of_an_inner_net_changed_after_forward(subject):
    def program(net):
        y = net(torch.linspace(-1, 1, 5 * FEATURES).view(5, FEATURES)).detach()
        z = net(y)
        y.zero_()
        some_loss(z).backward()

    right_or_refused(program, subject)


def test_a_leaf_stepped_after_forward(subject):
    def program(net):
        x = torch.ones(5, FEATURES, requires_grad=True)
        loss = some_loss(net(x))
        change(x)
        loss.backward()
        return x.grad

    right_or_refused(program, subject)


@pytest.mark.parametrize(
    "act",
    [
        lambda y: y.mul_(2),
        lambda y: F.relu_(y),
        lambda y: y.add_(1),
        lambda y: y[0].zero_() if not change(y[1]) else y,
        lambda y: y.detach().add_(1),
        lambda y: y.clamp_(-1, 1),
        lambda y: y.view(-1)[2:7].exp_(),
        lambda y: y.chunk(2, 1)[0].clone().mul_(2),
        lambda y: y.t_(),
        lambda y: y.unsqueeze_(0),
    ],
    ids=["mul_", "relu_", "add_", "rows", "detach", "clamp_", "view", "clone", "t_", "unsqueeze_"],
)
def test_the_output_is_changed_in_place(subject, act):
    def program(net):
        x = torch.linspace(-1, 1, 5 * FEATURES).view(5, FEATURES).requires_grad_()
        y = net(x)
        act(y)
        return y, grad(some_loss(y), [x, *net.parameters()])

    right_or_refused(program, subject)


def test_an_intermediate_output_is_changed_in_place(subject):
    def program(net):
        x = torch.linspace(-1, 1, 5 * FEATURES).view(5, FEATURES).requires_grad_()
        h = net(x)
        y = net(h)
        h.add_(1)
        return grad(some_loss(y) + some_loss(h), [x, *net.parameters()])

    right_or_refused(program, subject)


def test_an_inplace_layer_between(subject):
    def program(net):
        x = torch.linspace(-1, 1, 5 * FEATURES).view(5, FEATURES).requires_grad_()
        y = net(nn.ReLU(inplace=True)(net(x)))
        return y, grad(some_loss(y), [x, *net.parameters()])

    right_or_refused(program, subject)


def test_inplace_operations_inside_blocks(subject, x):
    def block(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 4), nn.ReLU(inplace=True), nn.Linear(4, outputs), nn.ELU(inplace=True))

    subject.holds(lambda net: grad(some_loss(net(x)), [x, *net.parameters()], allow_unused=True), block)


@pytest.mark.parametrize("grads", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", MODES)
def test_a_function_that_changes_its_input_is_refused_in_every_mode(mode, grads):
    f = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(HALF, HALF))
    methods = {"function": lambda self, x: x.mul_(2), "inverse": lambda self, y: y.div_(2)}
    doubling = type("Doubling", (iz.InvertibleModule,), methods)
    for layer in (iz.AdditiveCoupling(f), iz.InvertibleSequential(iz.AdditiveCoupling(f)), doubling(), doubling().inv):
        layer.mode = mode
        refused = pytest.raises(RuntimeError, match=r"leave its inputs as they are.* nn.ReLU\(\) for")
        with grads(), refused:
            layer(torch.randn(5, FEATURES))
    for enabled in (True, False):
        with grads(), pytest.raises(RuntimeError, match="leave its inputs as they are"):
            iz.checkpoint(torch.relu_, torch.randn(5), enabled=enabled)


def test_inputs_of_the_inference_mode_are_looked_at_as_often_as_replays_are():
    class Sometimes(nn.Linear):
        changes = True

        def forward(self, x):
            return super().forward(x.mul_(2) if self.changes else x)

    def refused(layer):
        try:
            layer(torch.full((2, FEATURES), torch.nan).index_fill_(1, torch.tensor([0, HALF]), 1.0))
        except RuntimeError:
            return True
        return False

    with torch.inference_mode():
        for check, expected in (
            ("first", [True, False, False]),
            ("always", [True, False, True]),
            ("never", [False] * 3),
        ):
            layer, found = iz.AdditiveCoupling(Sometimes(HALF, HALF), check=check), []
            for layer.f.changes in (True, False, True):
                found.append(refused(layer))
            assert found == expected


def test_a_block_that_returns_its_input(x):
    for mode in ("recompute", "invert"):
        plain, ours = (
            PlainAdditive(nn.Identity(), nn.Identity()),
            iz.AdditiveCoupling(nn.Identity(), nn.Identity(), mode=mode),
        )
        for _ in range(2):
            assert_same_run(lambda net: grad(some_loss(net(x)), x), plain, ours)


class Constant(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), -1)


def test_a_block_that_returns_a_view_of_a_parameter(subject, x):
    subject.holds(lambda net: some_loss(net(x)).backward(), Constant)


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_one_tensor_as_both_streams(mode, needs_grad):
    torch.manual_seed(0)
    x = torch.randn(5, HALF, requires_grad=needs_grad)
    plain = PlainAdditive(mlp(HALF, HALF), mlp(HALF, HALF))
    ours = iz.AdditiveCoupling(mlp(HALF, HALF), mlp(HALF, HALF), mode=mode)
    ours.load_state_dict(plain.state_dict())

    def program(net):
        a, b = net(*net(x, x))
        loss = some_loss(a) + some_loss(b)
        return grad(loss, [*net.parameters(), *([x] if needs_grad else [])])

    for _ in range(2):
        assert_same_run(program, plain, ours)


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
@pytest.mark.parametrize("first", [True, False])
def test_one_stream_alone_is_used(mode, first):
    torch.manual_seed(0)
    x = [torch.randn(5, HALF, requires_grad=True) for _ in range(2)]
    plain = PlainAdditive(mlp(HALF, HALF), mlp(HALF, HALF))
    ours = iz.AdditiveCoupling(mlp(HALF, HALF), mlp(HALF, HALF), mode=mode)
    ours.load_state_dict(plain.state_dict())

    def program(net):
        streams = net(*net(*x))
        kept = streams[not first]
        del streams
        return grad(some_loss(kept), [*x, *net.parameters()], allow_unused=True)

    for _ in range(2):
        assert_same_run(program, plain, ours)


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
def test_a_stream_from_elsewhere(mode):
    """One stream goes on, the other is replaced, read or changed."""
    torch.manual_seed(0)
    x = [torch.randn(5, HALF, requires_grad=True) for _ in range(2)]
    plain = PlainAdditive(mlp(HALF, HALF), mlp(HALF, HALF))
    ours = iz.AdditiveCoupling(mlp(HALF, HALF), mlp(HALF, HALF), mode=mode)
    ours.load_state_dict(plain.state_dict())

    def program(net):
        a, b = net(*x)
        c, d = net(a, b.sigmoid())
        e, f = net(d, a)
        g, h = net(e * c, f)
        return grad(some_loss(g) + some_loss(h) + some_loss(c), [*x, *net.parameters()])

    for _ in range(2):
        assert_same_run(program, plain, ours)


# ---- the input's memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x.view(5, FEATURES),
        lambda x: x.clone()[:],
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand(4, -1),
        lambda x: x[:, :1].expand(-1, FEATURES),
        lambda x: torch.cat((x, x))[::2],
        lambda x: torch.stack((x, x), -1)[..., 1],
        lambda x: x[1:3],
        lambda x: x[:0],
        lambda x: x[:1],
        lambda x: x.flip(1),
        lambda x: x.as_strided((4, FEATURES), (2, 1)),
        lambda x: torch.zeros(5, FEATURES) + torch.view_as_complex(torch.stack((x, x), -1)).conj().imag,
    ],
    ids="view slice transposed expanded columns strided inner rows empty one flip overlapping conj".split(),  # noqa: SIM905
)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_inputs_of_every_geometry(subject, data, of, needs_grad):
    def program(net):
        x = data.clone().requires_grad_(needs_grad)
        y = net(of(x))
        return y, grad(some_loss(y), [*net.parameters(), *([x] if needs_grad else [])])

    subject.holds(program)


def test_slices_of_a_data_buffer(subject):
    def program(net):
        buffer = torch.linspace(-1, 1, 20 * FEATURES).view(20, FEATURES)
        losses = [some_loss(net(buffer[i : i + 5])) for i in (0, 3, 10)]
        for loss in losses:
            loss.backward()

    subject.holds(program)


def test_a_slice_of_a_buffer_whose_other_rows_change(subject):
    def program(net):
        buffer = torch.linspace(-1, 1, 20 * FEATURES).view(20, FEATURES)
        loss = some_loss(net(buffer[:5]))
        buffer[10:].zero_()
        loss.backward()

    right_or_refused(program, subject)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
@pytest.mark.parametrize("container", [nn.Sequential, iz.InvertibleSequential])
def test_images(layout, mode, container):
    def block():
        return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1))

    plain = nn.Sequential(*[PlainAdditive(block(), block()) for _ in range(3)])
    ours = container(*[iz.AdditiveCoupling(block(), block()) for _ in range(3)])
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 6).to(memory_format=layout).requires_grad_()

    def program(net):
        y = net(x)
        return y, y.stride(), grad(some_loss(y), [x, *net.parameters()])

    with iz.mode(ours, mode):
        for _ in range(2):
            assert_same_run(program, plain, ours)


def test_inputs_made_without_gradients(subject, data):
    def program(net):
        with torch.inference_mode():
            x = data * 2
        y = net(x)
        return y

    subject.holds(lambda net: program(net.requires_grad_(False)))


def test_inference_tensors_are_refused_as_plain_nets_do(subject):
    plain, ours = subject.pair()
    with torch.inference_mode():
        x = torch.ones(5, FEATURES)
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        some_loss(plain(x)).backward()
    try:
        y = ours(x)
        some_loss(y).backward()
    except RuntimeError as error:
        assert "nference" in str(error)  # noqa: PT017 - either is right


def test_parameters_as_inputs(subject):
    x = nn.Parameter(torch.randn(5, FEATURES))
    subject.holds(lambda net: grad(some_loss(net(x)), [x, *net.parameters()]))


def test_long_chains_by_hand_with_views_between(subject, x):
    def program(net):
        y = x
        for _ in range(3):
            y = net(y).view(-1).view(5, FEATURES)
            y = net(y.flip(0))
            y = net(y[:])
        return grad(some_loss(y), [x, *net.parameters()])

    subject.holds(program)


def test_values_that_are_not_finite(subject, data):
    def program(net):
        x = data.clone()
        x[0, 0], x[1, 1] = float("inf"), float("nan")
        y = net(x)
        some_loss(y).backward()
        return y

    plain, ours = subject.pair()
    with contextlib.suppress(RuntimeError):
        assert_same_run(program, plain, ours)


def test_a_stack_with_reshapes_between(x):
    for mode in ("store", "recompute", "invert"):
        ours = iz.InvertibleSequential(
            iz.AdditiveCoupling(mlp(3, 3)), iz.Reverse(), iz.AdditiveCoupling(mlp(3, 3)), iz.Reverse()
        )

        class Flip(nn.Module):
            def forward(self, x):
                return x.flip(1)

        plain = Chain(PlainAdditive(mlp(3, 3)), Flip(), PlainAdditive(mlp(3, 3)), Flip())
        ours.load_state_dict(plain.state_dict())
        with iz.mode(ours, mode):
            assert_same_run(lambda net: grad(some_loss(net(x)), [x, *net.parameters()]), plain, ours)


# ---- attributes of tensors ------------------------------------------------------------------------------------------


class Scaled(iz.InvertibleModule):
    """Both directions read what was set on tensors, and the function sets it on what it returns."""

    def function(self, x: Tensor) -> Tensor:
        y = (x * x.scale).sinh()
        y.scale = x.scale
        return y

    def inverse(self, y: Tensor) -> Tensor:
        x = y.asinh() / y.scale
        x.scale = y.scale
        return x


@pytest.mark.parametrize("scale", ["number", "leaf", "result"])
@pytest.mark.parametrize("mode", MODES)
def test_attributes_of_tensors(mode, scale):
    def program(layers):
        x, leaf = torch.linspace(-1, 1, 6, requires_grad=True), torch.tensor(1.1, requires_grad=True)
        y = 1 * x
        y.scale = {"number": 1.1, "leaf": leaf, "result": leaf * 1}[scale]
        for layer in layers:
            y = layer(y)
        return y.detach(), *grad(some_loss(y), [x, leaf], allow_unused=True)

    layers = [Scaled(mode=mode), Scaled(mode=mode).inv, Scaled(mode=mode)]
    plain = [layers[0].function, layers[0].inverse, layers[0].function]
    for _ in range(2):
        assert_near(program(layers), program(plain))


@pytest.mark.parametrize("kind", [Tensor.requires_grad_, nn.Parameter])
def test_attributes_of_side_inputs_and_kept_inputs(kind):
    x, context = kind(torch.ones(3)), torch.ones(3)
    x.factors, context.scale = [torch.full((3,), 2.0)], 3.0
    y = iz.checkpoint(lambda x, context: (x * x.factors[0] * context.scale).exp(), x, context=context)
    y.sum().backward()
    assert_near(x.grad, 6 * torch.ones(3).mul(6).exp())


def test_attributes_that_lead_back_to_their_tensor():
    x, other = torch.ones(3, requires_grad=True), torch.ones(3)
    x.me, x.other, other.back = x, other, x
    y = iz.checkpoint(lambda x: (x * x.me * x.other.back.me).exp(), x)
    y.sum().backward()
    assert_near(x.grad, 3 * torch.ones(3).exp())


def test_a_tensor_behind_an_attribute_that_was_changed_in_place():
    x = torch.ones(3, requires_grad=True)
    x.mask = torch.ones(3)
    y = iz.checkpoint(lambda x: (x * x.mask).exp(), x)
    x.mask.zero_()
    with pytest.raises(RuntimeError, match="Expected mask of input 0 of .* to stay as it was until backward"):
        y.sum().backward()


# ---- tensors that wrap others ---------------------------------------------------------------------------------------


def two(like: Tensor) -> Tensor:
    return TwoTensor(like.clone(), 2 * like).requires_grad_()


def jagged(like: Tensor) -> Tensor:
    offsets = OFFSETS.setdefault(len(like), torch.tensor([0, 1, len(like)]))  # rows of the same lengths share them
    return torch.nested.nested_tensor_from_jagged(like.clone(), offsets).detach().requires_grad_()


OFFSETS: dict[int, Tensor] = {}


@pytest.mark.parametrize("check", ["first", "always"])
@pytest.mark.parametrize("wrap", [two, jagged])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_tensors_that_wrap_others(mode, wrap, check):
    f = nn.Sequential(nn.Linear(HALF, HALF), nn.GELU(), nn.Linear(HALF, HALF))
    plain = PlainAdditive(f, f)
    ours = iz.AdditiveCoupling(f, f, mode=mode, check=check)

    def program(net):
        streams = [wrap(torch.linspace(-1, 1, 4 * HALF).view(4, HALF) + i) for i in range(2)]
        a, b = net(*streams)
        (a.sin().sum() + b.cos().sum()).backward()
        return [part for x in streams for part in plain_parts(x.grad)]

    for _ in range(2):
        assert_near(program(ours), program(plain))


def test_a_wrong_inverse_of_tensors_that_wrap_others():
    """Where the rows of a nested tensor begin is right even if its values are wrong."""
    with pytest.raises(RuntimeError, match="replayed within a relative error"):
        iz.checkpoint(torch.exp, two(torch.ones(3)), inverse=torch.exp).sum().backward()
    rows = jagged(torch.rand(40, 3) + 1)
    with pytest.raises(RuntimeError, match="replayed within a relative error"):
        iz.checkpoint(torch.exp, rows, inverse=lambda y: 1.01 * y.log()).values().sum().backward()
