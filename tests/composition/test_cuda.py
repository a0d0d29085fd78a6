"""What only a CUDA device can show: its random states, autocast, streams, allocator, graphs, and waiting for it."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import invzoo as iz
from tests.reference import MODES, assert_near, make, mlp, train_step

CASES = {case.name: case for case in iz.testing.cases()}

pytestmark = [  # torch's own business, with any net
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]


@pytest.fixture(autouse=True)
def float64() -> None:
    """Float32 here, unlike in the rest of the directory."""


def stack(depth: int, width: int, middle: type[nn.Module] = nn.Tanh) -> iz.InvertibleSequential:
    half = width // 2
    subnets = [nn.Sequential(nn.Linear(half, half), middle(), nn.Linear(half, half)) for _ in range(depth)]
    for net in subnets:
        nn.init.normal_(net[-1].weight, std=0.1 / half**0.5)
    return iz.InvertibleSequential(*[iz.AdditiveCoupling(net, swap=i % 2 == 1) for i, net in enumerate(subnets)]).cuda()


@pytest.mark.parametrize("mode", MODES)
def test_with_dropout_and_autocast(mode: str):
    case = make("streams", lambda *sizes: mlp(*sizes, nn.Dropout(0.4)))
    net, x = case.net.cuda(), case.x.cuda()

    def call(net: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        with torch.autocast("cuda", torch.bfloat16):
            return net(x)

    with iz.mode(net, "store"):
        expected = train_step(net, x, call)
    with iz.mode(net, mode):
        for _ in range(2):
            assert_near(train_step(net, x, call), expected, 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("middle", [False, True], ids=["one loss", "two losses"])
def test_layers_on_streams_of_their_own(mode: str, middle: bool):
    """Long kernels before each layer give races the time to show."""
    torch.manual_seed(0)
    streams = [torch.cuda.Stream() for _ in range(2)]
    layers = [iz.AdditiveCoupling(nn.Linear(256, 256), nn.Linear(256, 256), dim=1).cuda() for _ in range(6)]
    data = torch.randn(2, 4096, 256, device="cuda")

    def step(mode: str, side: bool) -> list[Tensor]:
        for layer in layers:
            layer.mode = mode
            layer.zero_grad()
        inputs = data.clone().requires_grad_()
        values, losses = tuple(inputs * 1.0), []
        for i, layer in enumerate(layers):
            outer = torch.cuda.current_stream()
            stream = streams[i % 2] if side else outer
            stream.wait_stream(outer)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
                outputs = layer(*values)
            outer.wait_stream(stream)
            for tensor, user in (*((x, stream) for x in values), *((y, outer) for y in outputs)):
                tensor.record_stream(user)
            values = outputs
            if i == 2 and middle:
                losses.append(sum(v.square().mean() for v in values))
        losses.append(sum(v.sin().mean() for v in values))
        del values, outputs
        for each in losses:
            each.backward(retain_graph=each is not losses[-1])
        torch.cuda.synchronize()
        return [inputs.grad, *(p.grad.clone() for layer in layers for p in layer.parameters())]

    expected = step("store", False)
    for _ in range(5):
        assert_near(step(mode, True), expected, 1e-4)


@pytest.mark.parametrize("name", [*CASES])
def test_every_layer(name: str):
    """A step in modes store and invert, and the inverse; a tensor made on the CPU raises."""
    case, runs = CASES[name], []
    for mode in ("store", "invert"):
        layer = case.layer(dtype=torch.float64).cuda()
        inputs = [x.cuda() for x in case.inputs(dtype=torch.float64)]
        inputs = [x.requires_grad_(x.is_floating_point()) for x in inputs]
        sides = {k: v.cuda() for k, v in case.side_inputs(dtype=torch.float64).items()}
        torch.manual_seed(5)
        with iz.mode(layer, mode):
            outputs = iz.engine.tuple_of(layer(*inputs, **sides))
            wanted = [y for y in outputs if y.requires_grad]
            if wanted:
                torch.autograd.backward(wanted, [y.detach().sin() for y in wanted])
            with torch.no_grad():
                layer.inverse(*outputs, **sides)
        assert all(y.is_cuda for y in outputs)
        runs.append([*outputs, *(x.grad for x in inputs), *(p.grad for p in layer.parameters())])
    assert_near(runs[1], runs[0], 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_allocators_peak(mode: str):
    """What a step adds grows with depth in the other modes alone."""
    peaks = []
    for depth in (8, 32):
        net, x = stack(depth, 256), torch.randn(16384, 256, device="cuda")
        net.mode = mode
        for _ in range(2):
            net(x).square().mean().backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        net(x).square().mean().backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / x.nbytes)
    grows = (peaks[1] - peaks[0]) / 24
    assert grows < 0.02 if mode == "invert" else 0.4 < grows < 2.5


def test_counted_bytes_are_the_allocators():
    net, x = stack(6, 256), torch.randn(4096, 256, device="cuda")
    net(x).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with iz.testing.track_memory() as memory:
        net(x).square().mean().backward()
    counted = torch.cuda.max_memory_allocated() - before
    assert abs(counted - memory.peak) < 0.05 * counted + 2**21  # the allocator rounds up, and kernels have workspaces


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("check", ["first", "always"])
def test_only_checks_wait_for_the_device(mode: str, check: str):
    net, x = stack(4, 64), torch.randn(32, 64, device="cuda")
    net.mode, net.check = mode, check
    net(x).square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        waits = mode != "store" and check == "always"
        with pytest.raises(RuntimeError, match="synchronizing") if waits else contextlib.nullcontext():
            net(x).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("middle", [nn.Tanh, nn.Dropout])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_in_a_cuda_graph(mode: str, middle: type[nn.Module]):
    net, x = stack(4, 64, middle), torch.randn(32, 64, device="cuda", requires_grad=True)
    net.mode = mode
    new = torch.randn_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    leaves = [x, *net.parameters()]
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)
        grads = torch.autograd.grad(y.square().mean(), leaves)
    with torch.no_grad():
        x.copy_(new)
    graph.replay()
    if middle is nn.Dropout:  # what it drew is not known, but the gradient of what it drew is: by the last biases
        y = y.detach()
        assert_near(grads[-1:], [(2 * y.chunk(2, 1)[1] / y.numel()).sum(0)], 1e-4)
        before = y.clone()
        graph.replay()
        assert not torch.equal(y, before)
    else:
        with iz.mode(net, "store"):
            expected = torch.autograd.grad(net(x).square().mean(), leaves)
        assert_near(grads, expected, 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_float16_with_a_gradient_scaler(mode: str):
    losses = []
    for each in ("store", mode):
        torch.manual_seed(0)
        net, x = stack(8, 64), torch.randn(256, 64, device="cuda")
        target = x.roll(1, 1)
        net.mode = each
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.5), torch.amp.GradScaler("cuda")
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = (net(x) - target).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.detach())
    assert losses[0] < 1.97
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_saved_on_the_cpu(mode: str):
    case = make("stack")
    net, x = case.net.cuda(), case.x.cuda()
    expected = train_step(net, x)
    net.mode = mode

    def call(net: nn.Module, x: Tensor) -> Tensor:
        with save_on_cpu(pin_memory=True):
            return net(x)

    assert_near(train_step(net, x, call), expected, 1e-4)


def test_the_callers_input_is_freed_and_restored():
    net = stack(4, 256)
    net.free_input = True
    x = torch.randn(16384, 256, device="cuda") * 1
    copy, before = x.clone(), torch.cuda.memory_allocated()
    y = net(x)
    assert torch.cuda.memory_allocated() <= before + 2**20
    y.sum().backward()
    torch.testing.assert_close(x, copy, rtol=1e-4, atol=1e-4)
