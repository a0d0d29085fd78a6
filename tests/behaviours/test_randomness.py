"""Random numbers, buffers, flags and autocast: a replay sees them as its forward did, and leaves no trace."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import invzoo as iz
from tests.reference import FEATURES, HALF, PlainAdditive, assert_near, assert_same_run, mlp, run

grad = torch.autograd.grad


def some_loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() + y.square().mean()


def dropout(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, outputs), nn.Dropout(0.2))


def batch_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, outputs))


def cumulative_batch_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(inputs, momentum=None), nn.Linear(inputs, outputs))


def spectral_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(inputs, 4)), nn.Tanh(), nn.Linear(4, outputs))


def hook_spectral_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(inputs, 4)), nn.Tanh(), nn.Linear(4, outputs))


class Noise(nn.Module):
    """Noise of every kind, in the order in which it is asked for."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = mlp(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x * torch.rand_like(x))
        h = h * torch.bernoulli(torch.full_like(h, 0.5)) + 0.1 * torch.randn(h.shape)
        return h * torch.rand(1) + h.new_empty(h.shape).uniform_() * h + torch.randperm(3)[0]


class Counts(nn.Module):
    """Buffers that are changed in place, replaced, and read."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = mlp(*sizes)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("fixed", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.net((x - self.mean) * self.calls) * self.fixed[0]


class VectorQuantizer(nn.Module):
    """A codebook that follows the data, read before it moves."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = mlp(*sizes)
        self.register_buffer("codes", torch.linspace(-1, 1, sizes[0]).repeat(4, 1) * torch.arange(1.0, 5)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        index = torch.cdist(x.detach(), self.codes).argmin(1)
        h = self.net(x + self.codes[index])
        if self.training:
            with torch.no_grad():
                self.codes.index_add_(0, index, x.detach(), alpha=0.1)
        return h


class Silent(nn.Module):
    """Buffers that are changed without their versions' moving."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = mlp(*sizes)
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("var", torch.ones(sizes[0]))
        self.register_buffer("shift", torch.ones(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        self.shift.data.mul_(0.9)
        return self.net(F.batch_norm(x, self.mean, self.var, training=self.training) + self.shift)


class Attributes(nn.Module):
    """Tensors that are no buffers: changed in place, replaced, read, and left behind with a graph."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = mlp(*sizes)
        self.calls, self.mean, self.fixed = torch.ones(()), torch.zeros(sizes[0]), torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.last = self.net((x - self.mean) * self.calls) * self.fixed[0]
        return self.last


class OwnGenerator(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = mlp(*sizes)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.rand(len(x), 1, generator=self.generator)


STATEFUL = [
    dropout,
    batch_norm,
    cumulative_batch_norm,
    spectral_norm,
    hook_spectral_norm,
    Noise,
    Counts,
    VectorQuantizer,
    Silent,
    Attributes,
    OwnGenerator,
]


@pytest.fixture(params=STATEFUL, ids=lambda block: block.__name__)
def block(request):
    return request.param


@pytest.fixture(autouse=True)
def deprecated():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        yield


# ---- one step, and several in flight --------------------------------------------------------------------------------


def test_one_step(subject, x, block):
    def program(net):
        y = net(x)
        return y, grad(some_loss(y), [x, *net.parameters()], allow_unused=True)

    subject.holds(program, block)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
@pytest.mark.parametrize("block", [dropout, batch_norm, cumulative_batch_norm, Noise])  # of others, a plain net refuses
def test_forwards_in_flight(subject, x, block, order):
    def program(net):
        losses = [some_loss(net(x)), some_loss(net(2 * x))]
        for i in order:
            losses[i].backward()

    subject.holds(program, block)


def test_random_numbers_drawn_between(subject, x):
    def program(net):
        y = net(x)
        torch.manual_seed(7)
        noise = torch.randn(3)
        some_loss(y).backward()
        return noise, torch.randn(3)

    subject.holds(program, dropout)


def test_the_same_masks_through_a_kept_graph(subject, x):
    def program(net):
        loss = some_loss(net(x))
        first = grad(loss, x, retain_graph=True)
        torch.rand(5)
        second = grad(loss, x, create_graph=True)
        second[0].square().sum().backward()
        return first, second

    subject.holds(program, dropout)


def test_a_generator_as_side_input(saving, x):
    class Drawn(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.net = mlp(*sizes)

        def forward(self, x, generator):
            return self.net(x * torch.rand(x.shape, generator=generator))

    def program(net):
        generator = torch.Generator().manual_seed(5)
        y = net(x, generator=generator)
        torch.rand(1, generator=generator)
        some_loss(y).backward()
        return torch.rand(2, generator=generator)

    saving.holds(program, Drawn)


def test_attention_with_dropout(x):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)

        def forward(self, x):
            return self.net(x.transpose(1, 2)).transpose(1, 2)

    x = torch.randn(2, 8, 5, requires_grad=True)
    for mode in ("store", "recompute", "invert"):
        plain, ours = (
            PlainAdditive(Attention(), Attention()),
            iz.AdditiveCoupling(Attention(), Attention(), dim=1, mode=mode),
        )
        ours.load_state_dict(plain.state_dict())
        for _ in range(2):
            assert_same_run(lambda net: grad(some_loss(net(x)), [x, *net.parameters()]), plain, ours)


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)], ids=["to eval", "to train"])
def test_flags_switched_between_forward_and_backward(subject, x, block, before, after):
    def program(net):
        net.train(before)
        y = net(x)
        net.train(after)
        some_loss(y).backward()
        flags = [m.training for m in net.modules()]
        assert all(flag is after for flag in flags)
        net.train()
        return y

    subject.holds(program, block)


def test_a_part_of_the_net_in_eval(subject, x):
    def program(net):
        for m in [*net.modules()][::3]:
            m.training = False
        y = net(x)
        some_loss(y).backward()
        return y, sum(m.training for m in net.modules())

    _, ours = subject.pair(dropout)
    stored = type(subject)(subject.form, "store").pair(dropout)[1]
    stored.load_state_dict(ours.state_dict())
    assert_same_run(program, stored, ours)


def test_validation_between_forward_and_backward(subject, x):
    def program(net):
        y = net(x)
        net.eval()
        with torch.no_grad():
            value = net(x)
        net.train()
        some_loss(y).backward()
        return value

    subject.holds(program, batch_norm)
    subject.holds(program, dropout)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(subject, x, block, context):
    def program(net):
        with context():
            y = net(x).clone()
        return torch.tensor(y.tolist(), dtype=y.dtype) if y.is_inference() else y

    subject.holds(program, block)


def test_no_grad_between_two_calls(subject, x):
    def program(net):
        with torch.no_grad():
            h = net(x)
        y = net(h)
        with torch.no_grad():
            net(y)
        some_loss(y).backward()

    subject.holds(program, dropout)


def test_gradients_switched_on_inside_no_grad(subject, x):
    def program(net):
        with torch.no_grad(), torch.enable_grad():
            y = net(x)
        with torch.no_grad():
            return grad(y, x, torch.ones_like(y))

    subject.holds(program, dropout)


# ---- autocast -------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Writes down what it computes in."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net, self.seen = mlp(*sizes), []

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[0](x)
        self.seen.append((h.dtype, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return self.net[1:](h)  # a recomputation ends where the last tensor is saved


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_replayed_with_its_dtype(saving, backward_inside, dtype):
    plain, ours = (net.float() for net in saving.pair(Recorder))
    x = torch.randn(5, FEATURES, dtype=torch.float32, requires_grad=True)

    def program(net):
        with torch.autocast("cpu", dtype):
            y = net(x)
            if backward_inside:
                some_loss(y).backward()
        if not backward_inside:
            some_loss(y).backward()
        return y

    for _ in range(2):
        # what a stream of float32 loses in a rounding may move a value to the next bfloat16
        assert_same_run(program, plain, ours, 2e-2 if saving.mode == "invert" else 1e-6)
    for module in ours.modules():
        if isinstance(module, Recorder):
            assert len(module.seen) >= 4
            assert set(module.seen) == {(dtype, True, dtype)}


def test_backward_inside_autocast_of_a_forward_outside(subject, x):
    def program(net):
        y = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            y.backward(torch.ones_like(y))

    subject.holds(program)


def test_autocast_switched_off_inside(subject):
    class Full(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.net = mlp(*sizes)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.net(x.float())

    plain, ours = (net.float() for net in subject.pair(Full))
    x = torch.randn(5, FEATURES, dtype=torch.float32, requires_grad=True)

    def program(net):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        some_loss(y).backward()
        return y

    for _ in range(2):
        assert_same_run(program, plain, ours, 1e-5)


def test_a_default_dtype_that_changes_between(subject, x):
    class Made(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.net = mlp(*sizes)

        def forward(self, x):
            return self.net(x) * torch.full((), 0.1, dtype=x.dtype)

    def program(net):
        y = net(x)
        torch.set_default_dtype(torch.float32)
        try:
            some_loss(y).backward()
        finally:
            torch.set_default_dtype(torch.float64)

    subject.holds(program, Made)


# ---- what a step leaves behind --------------------------------------------------------------------------------------


def test_batch_norm_counts_each_forward_once(saving, x):
    _, ours = saving.pair(batch_norm)
    for step in range(1, 4):
        loss = some_loss(ours(x))
        loss.backward(retain_graph=True)
        loss.backward()
        counts = [b.item() for name, b in ours.named_buffers() if name.endswith("num_batches_tracked")]
        assert counts == [step] * len(counts)


def test_buffers_are_the_same_tensors_after_a_step(saving, x):
    for block in (batch_norm, spectral_norm):
        _, ours = saving.pair(block)
        before = dict(ours.named_buffers())
        some_loss(ours(x)).backward()
        for name, buffer in ours.named_buffers():
            assert buffer is before[name]


def test_parameters_are_the_same_objects_after_a_step(saving, x):
    _, ours = saving.pair(dropout)
    before = dict(ours.named_parameters())
    some_loss(ours(x)).backward()
    for name, parameter in ours.named_parameters():
        assert parameter is before[name]


def test_functional_randomness(x):
    """A plain function as a subnet."""
    weight = nn.Parameter(torch.randn(HALF, HALF))

    def f(x):
        return F.dropout(F.linear(x, weight).tanh(), 0.3)

    for mode in ("store", "recompute", "invert"):
        layer = iz.AdditiveCoupling(f, f, mode=mode)
        for _ in range(2):
            ours, plain = (run(lambda net: grad(some_loss(net(x)), [x, weight]), n) for n in (layer, PlainFunctions(f)))
            assert_near(ours["result"], plain["result"])


class PlainFunctions(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        a, b = x.chunk(2, 1)
        a = a + self.f(b)
        return torch.cat((a, b + self.f(a)), 1)
