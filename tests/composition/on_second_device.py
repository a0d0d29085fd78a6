"""What has to hold on any accelerator, checked on a simulated one; `test_devices.py` runs this file in a process."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from invzoo.engine.eager import slots
from invzoo.engine.eager.call import Call
from invzoo.engine.surroundings import ambient, devices
from tests.composition.elsewhere import (
    DEVICE,
    MAIN,
    MODULE,
    Race,
    Stream,
    Streams,
    back,
    calls,
    move,
    streams_checked,
    there,
)
from tests.reference import FEATURES, FORMS, HALF, MODES, assert_near, make, mlp

CASES = {entry.cases[0].name: entry.cases[0] for entry in iz.testing.CATALOGUE}
CASES |= {case.name: case for case in iz.testing.cases() if case.id in {"streams", "context"}}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def float64() -> None:
    """Float32 here, unlike in the rest of the directory."""


@pytest.fixture(autouse=True)
def main_stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Stream.current = MAIN
    as_it_was = Call._as_it_was

    def watched(self: Call, replay: Callable[..., None], *args: Any) -> None:
        def counted(*args: Any) -> None:
            Streams.replaying += 1
            try:
                replay(*args)
            finally:
                Streams.replaying -= 1

        as_it_was(self, counted, *args)

    monkeypatch.setattr(Call, "_as_it_was", watched)
    # A hook of a node enters its stream here, where torch has entered it before all hooks.
    monkeypatch.setattr(Call, "_come_first", lambda *_: None)
    yield
    Stream.current = MAIN


def dropout(*sizes: int) -> nn.Module:
    return mlp(*sizes, nn.Sequential(nn.Dropout(0.4), nn.Tanh()))


def step(net: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
    """Return output, gradients, and the device's random state behind the step."""
    MODULE.manual_seed_all(seed)
    net.zero_grad()
    x = there(x, requires_grad=True)
    y = net(x)
    y.sin().square().sum().backward()
    return [*map(back, (y, *(p.grad for p in net.parameters()), x.grad)), MODULE.generator.get_state()]


# ---- devices --------------------------------------------------------------------------------------------------------


def test_torch_takes_it_for_an_accelerator():
    assert torch.accelerator.current_accelerator().type == "elsewhere"
    assert there(torch.zeros(2)).device == DEVICE


def test_a_layer_that_makes_tensors_on_the_cpu_is_found():
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        there(torch.zeros(2)) + torch.zeros(2)


@pytest.mark.parametrize("name", [*FORMS])
def test_random_numbers_are_replayed(name: str, mode: str):
    net, x = make(name, dropout).net, torch.randn(4, FEATURES)
    move(net)
    with iz.mode(net, "store"):
        expected = step(net, x)
    cpu = torch.get_rng_state()
    with iz.mode(net, mode), calls() as count:
        for _ in range(2):
            assert_near(step(net, x), expected, 1e-5)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert (count["get_rng_state"] > 0) == (count["set_rng_state"] > 0) == (mode != "store")


def test_states_are_set_where_random_numbers_are_drawn_alone(mode: str):
    net = move(make("streams").net)
    with iz.mode(net, mode), calls() as count:
        step(net, torch.randn(4, FEATURES))
    assert count["set_rng_state"] == 0


def test_drawn_between_forward_and_backward(mode: str):
    net, x = move(make("streams", dropout).net), torch.randn(4, FEATURES)

    def run() -> list[Tensor]:
        MODULE.manual_seed_all(3)
        net.zero_grad()
        y = net(there(x))
        noise = torch.rand_like(y)
        (y * noise).sum().backward()
        return [back(noise), back(torch.rand_like(y)), *(back(p.grad) for p in net.parameters())]

    with iz.mode(net, "store"):
        expected = run()
    with iz.mode(net, mode):
        assert_near(run(), expected, 1e-5)


class Recorder(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net, self.seen = mlp(*sizes), []

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        self.seen.append((h.dtype, torch.is_autocast_enabled("elsewhere"), torch.is_autocast_enabled("cpu")))
        return h


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_of_the_device_is_replayed(mode: str, half: torch.dtype):
    net, x = move(make("streams", Recorder).net), torch.randn(4, FEATURES)

    def run() -> list[Tensor]:
        net.zero_grad()
        leaf = there(x, requires_grad=True)
        with torch.autocast("elsewhere", half):
            y = net(leaf)
        assert y.dtype == torch.float32
        y.square().sum().backward()
        return [back(y), back(leaf.grad), *(back(p.grad) for p in net.parameters())]

    with iz.mode(net, "store"):
        expected = run()
    with iz.mode(net, mode):
        for _ in range(2):
            assert_near(run(), expected, 8 * torch.finfo(half).eps if mode == "invert" else 0.0)
    seen = [each for m in net.modules() if isinstance(m, Recorder) for each in m.seen]
    assert set(seen) == {(half, True, False)}
    assert len(seen) > 3 * sum(isinstance(m, Recorder) for m in net.modules()) or mode == "store"


def test_devices_that_are_not_here_have_neither_generators_nor_streams():
    """As behind fake tensors: of CUDA, where the accelerator is another."""
    for absent in ("cuda", "xla", "mps"):
        assert devices.module_of(torch.device(absent)) is None
        assert devices.streams_of([torch.device(absent)]) == []
    assert devices.module_of(DEVICE) is MODULE


@pytest.mark.parametrize("name", [*CASES])
def test_every_layer_there(name: str):
    """A step on the device, in modes store and invert; a tensor made on the CPU raises."""
    case = CASES[name]
    runs = []
    for mode in ("store", "invert"):
        layer = move(case.layer(dtype=torch.float32))
        MODULE.manual_seed_all(5)
        inputs = [there(x, requires_grad=x.is_floating_point()) for x in case.inputs(dtype=torch.float32)]
        sides = {k: there(v) for k, v in case.side_inputs(dtype=torch.float32).items()}
        with iz.mode(layer, mode):
            outputs = iz.engine.tuple_of(layer(*inputs, **sides))
            assert all(y.device == DEVICE for y in outputs)
            wanted = [y for y in outputs if y.requires_grad]
            if wanted:
                torch.autograd.backward(wanted, [y.detach().sin() for y in wanted])
            if not name.startswith("EmergingConv"):  # calls torch.tensor, which knows devices written in C++ alone
                with torch.no_grad():
                    layer.inverse(*outputs, **sides)
        runs.append([back(t) for t in (*outputs, *(x.grad for x in inputs if x.grad is not None))])
    assert_near(runs[1], runs[0], 1e-3)


# ---- streams --------------------------------------------------------------------------------------------------------


class WithContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = mlp(HALF, 3), set()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        self.seen.add(Stream.current)
        return self.net(x) * context


class OnStream(nn.Module):
    """A layer on a stream of its own, synchronised as a user has to, with a context that is made there."""

    def __init__(self, layer: nn.Module, stream: Stream) -> None:
        super().__init__()
        self.layer, self.stream = layer, stream

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outer = Stream.current
        self.stream.wait_stream(outer)
        with self.stream:
            outputs = self.layer(*inputs, context=torch.ones_like(inputs[0]))
        outer.wait_stream(self.stream)
        for x in inputs:
            x.record_stream(self.stream)
        for y in outputs:
            y.record_stream(outer)
        return outputs


class Backward:
    """Runs the nodes of a graph on the streams of their forward, in order with those that give them gradients."""

    def __init__(self) -> None:
        self.streams: dict[object, Stream] = {}

    def note(self, outputs: tuple[Tensor, ...], stream: Stream) -> None:
        """Say where the nodes that are new behind these tensors were made."""
        todo = [y.grad_fn for y in outputs if y.grad_fn is not None]
        while todo:
            node = todo.pop()
            if node in self.streams:
                continue
            self.streams[node] = stream
            todo += [n for n, _ in node.next_functions if n is not None]

    def arm(self, roots: list[Tensor]) -> None:
        givers: dict[object, list[object]] = {}
        for node in self.streams:
            for other, _ in node.next_functions:
                givers.setdefault(other, []).append(node)
        starts = {y.grad_fn for y in roots}

        def enter(node: object, grads: tuple[Tensor | None, ...]) -> None:
            stream = self.streams[node]
            for grad in grads:
                if grad is not None:
                    grad.record_stream(stream)
            for giver in givers.get(node, ()):
                stream.wait_stream(self.streams[giver])
            if node in starts:
                stream.wait_stream(MAIN)
            Stream.current = stream

        for node in self.streams:
            node.register_prehook(lambda grads, node=node: enter(node, grads))


def stack_on_streams(mode: str, depth: int = 6) -> tuple[list[OnStream], list[Stream]]:
    streams = [Stream(f"side {i}") for i in range(2)]
    layers = [iz.AdditiveCoupling(WithContext(), WithContext(), mode=mode, check="never") for _ in range(depth)]
    return [OnStream(move(layer), streams[i % 2]) for i, layer in enumerate(layers)], streams


def run_on_streams(mode: str, loss_in_the_middle: bool) -> list[Tensor]:
    torch.manual_seed(0)
    layers, streams = stack_on_streams(mode)
    inputs = [there(torch.randn(4, 3), requires_grad=True) for _ in range(2)]
    graph, middle = Backward(), None
    with streams_checked():
        values = tuple(x * 1.0 for x in inputs)
        graph.note(values, MAIN)
        for i, layer in enumerate(layers):
            values = layer(*values)
            graph.note(values, layer.stream)
            if i == 2 and loss_in_the_middle:
                middle = sum(v.sum() for v in values)  # which saves none of them
                graph.note((middle,), MAIN)
        loss = sum(v.sin().sum() for v in values)
        del values
        graph.note((loss,), MAIN)
        losses = [loss] if middle is None else [middle, loss]
        graph.arm(losses)
        for each in losses:
            each.backward(retain_graph=each is not losses[-1])
            for stream in streams:  # as torch does where leaves are
                MAIN.wait_stream(stream)
            Stream.current = MAIN
    for layer in layers:
        if layer.layer.f.seen | layer.layer.g.seen != {layer.stream}:
            raise Race(f"a replay ran on another stream than the forward on {layer.stream}")
    return [back(x.grad) for x in inputs] + [back(p.grad) for layer in layers for p in layer.parameters()]


@pytest.mark.parametrize("middle", [False, True], ids=["one loss", "two losses"])
def test_replays_on_several_streams(mode: str, middle: bool):
    expected = run_on_streams("store", middle)
    assert_near(run_on_streams(mode, middle), expected, 1e-5)


@pytest.mark.parametrize("broken", ["hand_over", "on_streams"])
def test_the_simulation_finds_races(monkeypatch: pytest.MonkeyPatch, broken: str):
    if broken == "hand_over":
        monkeypatch.setattr(slots, "hand_over", lambda tensor, stream: None)
    else:
        monkeypatch.setattr(ambient, "on_streams", lambda streams: nullcontext())
    with pytest.raises(Race):
        run_on_streams("invert", True)


def test_one_stream_is_left_alone(mode: str):
    net = move(make("streams").net)
    with iz.mode(net, mode), streams_checked(), calls() as count:
        step(net, torch.randn(4, FEATURES))
    assert count["record_stream"] == 0
    assert Stream.current is MAIN
