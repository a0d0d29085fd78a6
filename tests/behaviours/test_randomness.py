"""Random numbers, buffers, flags and autocast: a replay sees them as its forward did, and leaves no trace."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import invzoo as iz
from tests.behaviours.helpers import Subnet, all_gradients, blocks, holds, some_loss, twice_the_same
from tests.reference import FEATURES, HALF, MODES, PlainAdditive, assert_same_run

grad = torch.autograd.grad


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


class Noise(Subnet):
    """Noise of every kind, in the order in which it is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x * torch.rand_like(x))
        h = h * torch.bernoulli(torch.full_like(h, 0.5)) + 0.1 * torch.randn(h.shape)
        return h * torch.rand(1) + h.new_empty(h.shape).uniform_() * h + torch.randperm(3)[0]


class Counts(Subnet):
    """Buffers that are changed in place, replaced, and read."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("fixed", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.net((x - self.mean) * self.calls) * self.fixed[0]


class VectorQuantizer(Subnet):
    """A codebook that follows the data, read before it moves."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("codes", torch.linspace(-1, 1, sizes[0]).repeat(4, 1) * torch.arange(1.0, 5)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        index = torch.cdist(x.detach(), self.codes).argmin(1)
        h = self.net(x + self.codes[index])
        if self.training:
            with torch.no_grad():
                self.codes.index_add_(0, index, x.detach(), alpha=0.1)
        return h


class Silent(Subnet):
    """Buffers that are changed without their versions' moving."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("var", torch.ones(sizes[0]))
        self.register_buffer("shift", torch.ones(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        self.shift.data.mul_(0.9)
        return self.net(F.batch_norm(x, self.mean, self.var, training=self.training) + self.shift)


class Attributes(Subnet):
    """Tensors that are no buffers: changed in place, replaced, read, and left behind with a graph."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.calls, self.mean, self.fixed = torch.ones(()), torch.zeros(sizes[0]), torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.last = self.net((x - self.mean) * self.calls) * self.fixed[0]
        return self.last


class OwnGenerator(Subnet):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
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


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
@pytest.mark.parametrize("block", [dropout, batch_norm, cumulative_batch_norm, Noise])  # of others, a plain net refuses
@holds
def test_forwards_in_flight(net, x, block, order):
    losses = [some_loss(net(x)), some_loss(net(2 * x))]
    for i in order:
        losses[i].backward()


@holds(block=dropout)
def test_random_numbers_drawn_between(net, x):
    y = net(x)
    torch.manual_seed(7)
    noise = torch.randn(3)
    some_loss(y).backward()
    return noise, torch.randn(3)


@pytest.mark.parametrize("block", [dropout, batch_norm])
@holds
def test_the_same_through_a_kept_graph(net, x, block):
    """The same masks, and statistics that count each forward once."""
    loss = some_loss(net(x))
    first = grad(loss, x, retain_graph=True)
    torch.rand(5)
    second = grad(loss, x, create_graph=True)
    second[0].square().sum().backward()
    return first, second


class Drawn(Subnet):
    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.net(x * torch.rand(x.shape, generator=generator))


@holds(block=Drawn)
def test_a_generator_as_side_input(net, x):
    generator = torch.Generator().manual_seed(5)
    y = net(x, generator=generator)
    torch.rand(1, generator=generator)
    some_loss(y).backward()
    return torch.rand(2, generator=generator)


class Attention(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(4, 2, 8, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("mode", MODES)
def test_attention_with_dropout(mode):
    x = torch.randn(2, 8, 5, requires_grad=True)
    plain = PlainAdditive(Attention(), Attention())
    ours = iz.AdditiveCoupling(Attention(), Attention(), dim=1, mode=mode)
    ours.load_state_dict(plain.state_dict())
    twice_the_same(lambda net: all_gradients(net, x), plain, ours)


# ---- flags ----------------------------------------------------------------------------------------------------------


SWITCHES = {"never": (True, True), "to eval": (True, False), "to train": (False, True)}


@pytest.mark.parametrize(("before", "after"), SWITCHES.values(), ids=SWITCHES)
@holds
def test_flags_switched_between_forward_and_backward(net, x, block, before, after):
    net.train(before)
    y = net(x)
    net.train(after)
    grads = grad(some_loss(y), [x, *net.parameters()], allow_unused=True)
    assert all(m.training is after for m in net.modules())
    net.train()
    return y, grads


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


@pytest.mark.parametrize("block", [batch_norm, dropout])
@holds
def test_validation_between_forward_and_backward(net, x, block):
    y = net(x)
    net.eval()
    with torch.no_grad():
        value = net(x)
    net.train()
    some_loss(y).backward()
    return value


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@holds
def test_without_gradients(net, x, block, context):
    with context():
        y = net(x).clone()
    return torch.tensor(y.tolist(), dtype=y.dtype) if y.is_inference() else y


@holds(block=dropout)
def test_no_grad_between_two_calls(net, x):
    with torch.no_grad():
        h = net(x)
    y = net(h)
    with torch.no_grad():
        net(y)
    some_loss(y).backward()


@holds(block=dropout)
def test_gradients_switched_on_inside_no_grad(net, x):
    with torch.no_grad(), torch.enable_grad():
        y = net(x)
    with torch.no_grad():
        return grad(y, x, torch.ones_like(y))


# ---- autocast -------------------------------------------------------------------------------------------------------


class Recorder(Subnet):
    """Writes down what it computes in."""

    seen = ()

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[0](x)
        self.seen = *self.seen, (h.dtype, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
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

    # what a stream of float32 loses in a rounding may move a value to the next bfloat16
    twice_the_same(program, plain, ours, 2e-2 if saving.mode == "invert" else 1e-6)
    for block in blocks(ours, Recorder):
        assert len(block.seen) >= 4
        assert set(block.seen) == {(dtype, True, dtype)}


@holds
def test_backward_inside_autocast_of_a_forward_outside(net, x):
    y = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(torch.ones_like(y))


class Full(Subnet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.net(x.float())


def test_autocast_switched_off_inside(subject):
    plain, ours = (net.float() for net in subject.pair(Full))
    x = torch.randn(5, FEATURES, dtype=torch.float32, requires_grad=True)

    def program(net):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        some_loss(y).backward()
        return y

    twice_the_same(program, plain, ours, 1e-5)


class Made(Subnet):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.full((), 0.1, dtype=x.dtype)


@holds(block=Made)
def test_a_default_dtype_that_changes_between(net, x):
    y = net(x)
    torch.set_default_dtype(torch.float32)
    try:
        some_loss(y).backward()
    finally:
        torch.set_default_dtype(torch.float64)


# ---- what a step leaves behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [batch_norm, spectral_norm, dropout])
def test_parameters_and_buffers_are_the_same_objects_after_a_step(saving, x, block):
    _, ours = saving.pair(block)
    before = [*ours.named_parameters(), *ours.named_buffers()]
    some_loss(ours(x)).backward()
    after = [*ours.named_parameters(), *ours.named_buffers()]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_functional_randomness(mode, x):
    """A plain function as a subnet."""
    weight = nn.Parameter(torch.randn(HALF, HALF))

    def f(x):
        return F.dropout(F.linear(x, weight).tanh(), 0.3)

    ours, plain = iz.AdditiveCoupling(f, f, mode=mode), PlainAdditive(f, f)
    twice_the_same(lambda net: grad(some_loss(net(x)), [x, weight]), plain, ours)
