"""What goes wrong is said once, by name, and the next step is right and still saves memory."""

import contextlib
import gc
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import invzoo as iz
from invzoo.testing.memory import track_memory
from tests.behaviours.helpers import Subnet, blocks, some_loss
from tests.reference import FEATURES, HALF, Subject, assert_same_run, mlp

LAYERS = "AdditiveCoupling|AffineCoupling|UserLayer|Merge|Wrong|Split"


@contextlib.contextmanager
def raises(match: str):
    """Expect an error that names a layer."""
    with pytest.raises(RuntimeError, match=match) as caught:
        yield
    text = " ".join((str(caught.value), *getattr(caught.value, "__notes__", ())))
    assert re.search(LAYERS, text), text


def steps(net: nn.Module, x: Tensor, count: int) -> None:
    for _ in range(count):
        some_loss(net(x)).backward()


def assert_right(net: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Assert that a step does what one of the plain net does."""
    assert_same_run(lambda net: some_loss(net(x)).backward(), plain, net)


WARM = pytest.mark.parametrize("warm", [0, 2], ids=["first", "later"])  # steps before the one that fails


class Boom(Exception):
    pass


class Fuse(Subnet):
    """Blows at the call with the given number; counts all of them."""

    at: int | None = None
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Fuse.calls += 1
        if Fuse.calls == Fuse.at:
            raise Boom("fuse")
        return self.net(x)


@pytest.fixture(autouse=True)
def whole_fuse():
    Fuse.at, Fuse.calls = None, 0
    yield
    Fuse.at, Fuse.calls = None, 0


def held(net: nn.Module, x: Tensor) -> int:
    net(x)  # a first call checks more
    with track_memory() as memory:
        y = net(x)
        bytes_held = memory.current
        del y
    return bytes_held


def test_an_exception_in_a_block(subject, x):
    plain, ours = subject.pair(Fuse)
    some_loss(ours(x)).backward()
    before = held(ours, x)
    Fuse.calls = 0
    some_loss(ours(x)).backward()
    total, state = Fuse.calls, torch.get_rng_state()
    for at in range(1, total + 1):  # in every forward and in every replay
        Fuse.calls, Fuse.at = 0, at
        with pytest.raises(Boom, match="^fuse"):
            some_loss(ours(x)).backward()
        assert Fuse.calls == at
        Fuse.at = None
        assert torch.is_grad_enabled()
    torch.testing.assert_close(torch.get_rng_state(), state)
    assert held(ours, x) == before
    assert_right(ours, plain, x)


def test_an_exception_in_a_replay_names_the_layer(saving, x):
    _, ours = saving.pair(Fuse)
    y = some_loss(ours(x))
    Fuse.at = Fuse.calls + 1
    with pytest.raises(Boom) as caught:
        y.backward()
    assert any("replay of" in note for note in caught.value.__notes__)


def test_an_interrupt_in_a_block(saving, x):
    plain, ours = saving.pair(Fuse)
    before = held(ours, x)
    inner = blocks(ours, nn.Tanh)[-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    with inner.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        ours(x)
    assert held(ours, x) == before
    assert_right(ours, plain, x)


@pytest.mark.parametrize("where", ["tensor", "backward"])
def test_an_exception_in_a_backward_hook(subject, x, where):
    plain, ours = subject.pair()

    def explode(*_):
        raise Boom("hook")

    inner = blocks(ours, nn.Linear)[0]
    with inner.weight.register_hook(explode) if where == "tensor" else inner.register_full_backward_hook(explode):
        before = held(ours, x)
        with pytest.raises(Boom, match="hook"):
            some_loss(ours(x)).backward()
        assert held(ours, x) == before
    assert_right(ours, plain, x)


def test_state_is_restored_after_a_failed_replay(saving, x):
    def block(i, o):
        return nn.Sequential(Fuse(i, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, o), Fuse(o, o))

    _, ours = saving.pair(block)
    y = ours(x)
    ours.eval()
    buffers, state = [b.clone() for b in ours.buffers()], torch.get_rng_state()
    objects = [*ours.buffers()]
    Fuse.at = Fuse.calls + 2
    with pytest.raises(Boom):
        some_loss(y).backward()
    assert not any(m.training for m in ours.modules())
    torch.testing.assert_close([*ours.buffers()], buffers)
    assert all(a is b for a, b in zip(ours.buffers(), objects, strict=True))
    torch.testing.assert_close(torch.get_rng_state(), state)


def replace_data(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = 2 * p.data


CHANGES = {"step": lambda net: torch.optim.SGD(net.parameters(), 0.1).step(), "data": replace_data}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@WARM
def test_parameters_stepped_between_forward_and_backward(saving, x, warm, change):
    _, ours = saving.pair()
    steps(ours, x, warm + 1)
    loss = some_loss(ours(x))
    change(ours)
    with raises("got a change of '.*'. Call backward before optimizer.step"):
        loss.backward()
    some_loss(ours(x)).backward()


@WARM
@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_weights_that_no_module_owns_stepped_between(warm, mode, x):
    """A closure's tensor, a list's, an attribute's: autograd saved each of them, and would notice."""
    w = torch.randn(HALF, HALF, requires_grad=True)

    class Holder(nn.Module):
        weights = [w]  # noqa: RUF012 - nobody changes it

        def forward(self, x):
            return (x @ self.weights[0]).tanh()

    for f in (lambda x: (x @ w).tanh(), Holder()):
        net = iz.InvertibleSequential(*[iz.AdditiveCoupling(f, mode=mode) for _ in range(3)])
        steps(net, x, warm)
        loss = some_loss(net(x))
        w.detach().mul_(2)
        with pytest.raises(RuntimeError):
            loss.backward()


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_the_data_of_a_weight_that_no_module_owns_replaced_between(mode):
    w = torch.randn(HALF, HALF, requires_grad=True)
    net = iz.AdditiveCoupling(lambda x: (x @ w).tanh(), mode=mode, check="never")
    loss = some_loss(net(torch.randn(5, FEATURES, requires_grad=True)))
    w.data = w.data * 2
    with pytest.raises(RuntimeError, match="got a change of one of shape"):
        loss.backward()


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_a_block_that_replaces_the_data_of_its_weight(mode):
    class Constrained(nn.Linear):
        def forward(self, x):
            self.weight.data = self.weight.data.renorm(2, 0, 0.5)
            return super().forward(x)

    with pytest.raises(RuntimeError, match="not to change parameters in place; got a change of 'weight'"):
        iz.AdditiveCoupling(Constrained(HALF, HALF), mode=mode)(torch.randn(5, FEATURES))


class Jagged(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        rows = torch.nested.as_nested_tensor([row[None] for row in x], layout=torch.jagged)
        return super().forward(rows).values()


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_a_block_that_makes_jagged_tensors(saving, x):
    _, ours = saving.pair(Jagged)
    with raises("save the tensors that its forward saved"):
        some_loss(ours(x)).backward()


class Overwrites(nn.Module):
    """Changes in place what autograd saved, which plain PyTorch refuses."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        k = h.sin()
        h.relu_()
        return k + h


@WARM
def test_a_block_that_changes_in_place_what_autograd_saved(saving, x, warm):
    plain, ours = saving.pair(Overwrites)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        some_loss(plain(x)).backward()
    for _ in range(1 + warm):
        with raises("leave what autograd saved for its backward as it is"):
            some_loss(ours(x)).backward()


def test_the_place_of_a_block_that_changes_in_place_what_autograd_saved(x):
    net = iz.InvertibleSequential(iz.Identity(), iz.AdditiveCoupling(Overwrites(HALF, HALF)))
    with pytest.raises(RuntimeError, match="leave what autograd saved") as caught:
        some_loss(net(x)).backward()
    assert caught.value.__notes__ == ["in layer 1 (AdditiveCoupling)"]


class Scaled(Subnet):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.scale)


@WARM
def test_a_buffer_changed_between_forward_and_backward(saving, x, warm):
    _, ours = saving.pair(Scaled)
    steps(ours, x, warm)
    loss = some_loss(ours(x))
    for buffer in ours.buffers():
        buffer.mul_(2)
    with raises("between forward and backward"):
        loss.backward()


@WARM
def test_a_parameter_taken_away_between_forward_and_backward(saving, x, warm):
    _, ours = saving.pair()
    steps(ours, x, warm)
    loss = some_loss(ours(x))
    prune.identity(blocks(ours, nn.Linear)[0], "weight")
    with raises("got a removal of 'weight'"):
        loss.backward()


@WARM
def test_a_module_replaced_between_forward_and_backward(subject, x, warm):
    """As in plain PyTorch, gradients are those of the modules that computed the output."""
    plain, ours = subject.pair()
    steps(ours, x, warm)
    ours.zero_grad()
    weights = [*ours.parameters()]
    loss = some_loss(ours(x))
    for module in [*ours.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, nn.Linear(HALF, HALF))
    new = [*ours.parameters()]
    loss.backward()
    assert not {*weights} & {*new}
    assert all(a is b for a, b in zip(ours.parameters(), new, strict=True))
    some_loss(plain(x.detach())).backward()
    for weight, parameter in zip(weights, plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, parameter.grad)


class Wrong(iz.InvertibleModule):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def function(self, x):
        return x + 0.1 * self.f(x).tanh()

    def inverse(self, y):
        return y - 0.1 * self.f(y).tanh()


@pytest.mark.parametrize("container", [nn.Sequential, iz.InvertibleSequential])
def test_a_wrong_inverse(container):
    net = container(*[iz.AdditiveCoupling(mlp(HALF, HALF)) for _ in range(3)], Wrong(mlp(FEATURES, FEATURES)))
    loss = some_loss(net(torch.randn(5, FEATURES)))
    with pytest.raises(RuntimeError, match="inverse is wrong") as caught:
        loss.backward()
    assert "Wrong" in str(caught.value)
    if container is iz.InvertibleSequential:
        assert any("layer 3 (Wrong)" in note for note in caught.value.__notes__)
    with iz.mode(net, "recompute"):
        some_loss(net(torch.randn(5, FEATURES))).backward()


class Drifting(Subnet):
    """Another function at every call, though with the same shapes."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Drifting.calls += 1
        return self.net(x) * Drifting.calls


class Growing(Drifting):
    def forward(self, x: Tensor) -> Tensor:
        Drifting.calls += 1
        for _ in range(Drifting.calls % 5):
            x = x.sin()
        return self.net(x)


class Scaling(Drifting):
    """Drifts before it saves: what drifts behind all that autograd saves changes no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        Drifting.calls += 1
        return self.net(x * Drifting.calls)


@pytest.mark.parametrize(("block", "check"), [(Drifting, "always"), (Growing, "always"), (Scaling, "first")])
def test_a_block_that_is_not_deterministic(saving, x, block, check):
    _, ours = saving.pair(block, check=check)
    with raises("deterministic"):
        some_loss(ours(x)).backward()


def test_an_output_changed_in_place_names_the_layer():
    _, ours = Subject("stack", "invert").pair()
    for _ in range(3):
        y = ours(torch.randn(5, FEATURES))
        y.detach().mul_(2)
        with raises("changed in place"):
            y.sum().backward()


def test_backward_twice(subject, x):
    plain, ours = subject.pair()
    loss = some_loss(ours(x))
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()
    assert_right(ours, plain, x)


def test_backward_twice_in_part(subject, x):
    _, ours = subject.pair()
    y = ours(x)
    z = ours(y)
    some_loss(z).backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        some_loss(y).backward()


def test_a_layer_without_an_inverse():
    class Oneway(iz.InvertibleModule):
        def function(self, x):
            return x.square()

    x = torch.randn(5, FEATURES, requires_grad=True)
    with pytest.raises(TypeError, match="Expected a layer with an inverse for mode 'invert'; got Oneway"):
        Oneway()(x)
    Oneway(mode="recompute")(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_an_exception_holds_nothing(saving):
    gc.collect()
    gc.disable()
    try:
        _, ours = saving.pair(Fuse)
        x = torch.randn(5, FEATURES)
        for at in (2, 10_000):
            Fuse.calls, Fuse.at = 0, at
            with track_memory() as memory:
                try:
                    loss = some_loss(ours(x))
                    Fuse.calls, Fuse.at = 0, 1
                    loss.backward()
                except Boom:
                    loss = None
                ours.zero_grad()
                assert memory.current == 0
    finally:
        gc.enable()
