"""Memory counted in exact bytes: flat in depth, falling in backward, and gone with the last reference."""

import gc

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from invzoo.testing.memory import track_memory
from tests.behaviours.helpers import Subnet, blocks
from tests.reference import HALF, Streams, Subject

BATCH, WIDTH = 256, 32
ACTIVATION = BATCH * 2 * WIDTH * 8  # bytes


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


CONTAINERS = {"stack": iz.InvertibleSequential, "sequential": nn.Sequential, "streams": Streams}


@pytest.fixture(autouse=True)
def no_collector():
    """Nothing here may depend on the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make(container: str, depth: int) -> nn.Module:
    net = CONTAINERS[container](*[iz.AdditiveCoupling(block(), swap=bool(i % 2)) for i in range(depth)])
    for p in net.parameters():  # gradients that exist already count for nothing
        p.grad = torch.zeros_like(p)
    return net


def step(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return what is held after forward and the peak of backward, in activations."""
    with track_memory() as memory:
        y = net(x)
        held = memory.current
        loss = y.sum()
        del y
        memory.reset_peak()
        loss.backward()
        peak = memory.peak
    return held / ACTIVATION, peak / ACTIVATION


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("needs_grad", [True, False], ids=["leaf", "data"])
def test_memory_is_flat_in_depth(container, needs_grad):
    x = torch.randn(BATCH, 2 * WIDTH, requires_grad=needs_grad)
    results = []
    for depth in (8, 64):
        net = make(container, depth)
        step(net, x)  # what a first call checks, and the input's gradient
        results.append(step(net, x))
    for held, peak in results:
        assert 0.95 < held < 1.05 if container != "streams" else held < 2.05  # torch.cat is not ours
        assert peak < (4.5 if container == "streams" else 3.55)  # a view of torch.chunk is rebuilt as large as it was
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0.01)


def test_memory_is_flat_at_a_thousand_layers():
    x = torch.randn(BATCH, 2 * WIDTH)
    shallow, deep = (step(make("stack", depth), x) for depth in (8, 1000))
    torch.testing.assert_close(deep, shallow, rtol=0, atol=0.01)
    assert 0.95 < deep[0] < 1.05
    assert deep[1] < 3.55


@pytest.mark.parametrize("container", CONTAINERS)
def test_memory_of_a_kept_graph(container):
    x = torch.randn(BATCH, 2 * WIDTH, requires_grad=True)
    peaks = []
    for depth in (4, 32):
        net = make(container, depth)
        step(net, x)
        with track_memory() as memory:
            loss = net(x).sum()
            held = memory.current
            memory.reset_peak()
            for _ in range(2):
                loss.backward(retain_graph=True)
                assert memory.current <= held
            peaks.append(memory.peak / ACTIVATION)
    assert peaks[1] <= peaks[0] + 0.01


@pytest.mark.parametrize("container", CONTAINERS)
def test_memory_falls_during_backward(container):
    net, x, seen = make(container, 16), torch.randn(BATCH, 2 * WIDTH), []
    step(net, x)
    with track_memory() as memory:
        for layer in net:
            layer.f[0].weight.register_hook(lambda grad: seen.append(memory.current))
        loss = net(x).square().sum()
        loss.backward()
        assert memory.current == loss.nbytes
    assert len(seen) == 16
    assert max(seen[2:-2]) - min(seen[2:-2]) <= 0.01 * ACTIVATION  # at each layer as much as at any other
    assert seen[-1] <= min(seen)
    assert max(seen) <= 4.5 * ACTIVATION


def test_memory_falls_with_stored_layers_as_well():
    net = make("stack", 16)
    seen = []
    with iz.mode(net, "store"), track_memory() as memory:
        for layer in net:
            layer.f[0].weight.register_hook(lambda grad: seen.append(memory.current))
        net(torch.randn(BATCH, 2 * WIDTH)).sum().backward()
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("what", ["output", "loss", "output first", "backward", "grad", "double", "part"])
def test_nothing_leaks(container, what):
    net = make(container, 4)
    x = torch.randn(BATCH, 2 * WIDTH, requires_grad=True)
    with track_memory() as memory:
        for _ in range(3):
            y = net(x)
            if what != "output":
                loss = y.square().sum()
            if what == "output first":
                del y
            if what in ("backward", "part"):
                loss.backward(retain_graph=what == "part")
            if what == "grad":
                torch.autograd.grad(loss, net[1].f[0].weight)
            if what == "double":
                (g,) = torch.autograd.grad(loss, x, create_graph=True)
                g.square().sum().backward()
                del g
            y = loss = x.grad = None
            assert memory.current == 0


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = block()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(x) * context


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_nothing_leaks_from_a_functional_call_or_a_condition(mode):
    net = iz.InvertibleSequential(*[iz.AdditiveCoupling(Conditioned(), mode=mode) for _ in range(3)])
    x = torch.randn(BATCH, 2 * WIDTH, requires_grad=True)
    with track_memory() as memory:
        for backward in (False, True):
            values = {name: p.exp() for name, p in net.named_parameters()}
            context = x[:, :1].exp()
            loss = torch.func.functional_call(net, values, (x,), {"context": context}).sum()
            if backward:
                loss.backward()
                net.zero_grad()
            values = context = loss = x.grad = None
            assert memory.current == 0


class Counter(Subnet):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


@pytest.mark.parametrize("form", ["additive", "affine", "streams", "sequential", "stack"])
@pytest.mark.parametrize(("mode", "calls"), [("store", 1), ("recompute", 2), ("invert", 2)])
def test_each_subnet_is_evaluated_once_in_backward(form, mode, calls):
    _, ours = Subject(form, mode).pair(Counter)
    # A layer without a replay of its own inverts first, and then runs its function.
    by_hand = [layer.f for layer in ours.modules() if type(layer).__name__ == "UserLayer" and mode == "invert"]
    for i in range(1, 3):
        ours(torch.randn(5, 2 * HALF)).sum().backward()
        for counter in blocks(ours, Counter):
            assert counter.calls == i * (calls + (counter in by_hand))


def test_the_input_of_a_chain_is_not_held():
    net = make("stack", 4)
    with track_memory() as memory:
        y = net(torch.randn(BATCH, 2 * WIDTH))
        assert memory.current <= 1.05 * ACTIVATION
        del y
