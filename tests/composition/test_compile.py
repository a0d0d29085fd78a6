"""torch.compile of a net with invertible layers, and of the subnets alone."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import invzoo as iz
from invzoo.testing.memory import track_memory
from tests.reference import (
    FEATURES,
    HALF,
    MODES,
    Case,
    assert_near,
    assert_same_step,
    gradients,
    make,
    mlp,
    train_step,
)

# Dynamo looks at `.grad` of every input, inductor imports scripted functions: torch's own business, with any net.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(case: Case, backend: str) -> Case:
    return Case(torch.compile(case.net, backend=backend), case.plain, case.x, case.subject)


def test_compiled_net(case: Case):
    assert_same_step(compiled(case, "aot_eager"))
    assert_same_step(case, steps=1)


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_compiled_net_inductor(mode: str):
    case = make("stack")
    with iz.mode(case.net, mode):
        assert_same_step(compiled(case, "inductor"))


def test_compiled_step(mode: str):
    """The loss, too, is inside the compiled function."""
    case = make("stack")
    case.net.mode = mode

    @torch.compile(backend="aot_eager")
    def loss(x: Tensor) -> Tensor:
        return case.net(x.sigmoid()).square().sum()

    for _ in range(2):
        case.net.zero_grad()
        case.plain.zero_grad()
        x, z = (case.x.clone().requires_grad_() for _ in range(2))
        loss(x).backward()
        case.plain(z.sigmoid()).square().sum().backward()
        assert_near(gradients(case.net, x), gradients(case.plain, z))


def test_mode_set_after_compiling():
    case = make("stack")
    net = torch.compile(case.net, backend="aot_eager")
    for value in (*MODES, "store"):
        with iz.mode(case.net, value):
            assert_same_step(Case(net, case.plain, case.x), steps=1)


@pytest.mark.usual
def test_compiled_net_with_other_batch_sizes(mode: str):
    case = make("streams")
    net = torch.compile(case.net, backend="aot_eager")
    with iz.mode(case.net, mode):
        for batch in (4, 7, 3):
            assert_same_step(Case(net, case.plain, torch.randn(batch, FEATURES)), steps=1)


def test_compiled_eval_and_no_grad(mode: str):
    case = make("affine")
    case.net.mode = mode
    net = torch.compile(case.net, backend="aot_eager")
    for context in (torch.no_grad(), torch.inference_mode(), nullcontext()):
        with context:
            assert_near([net(case.x)], [case.plain(case.x)])
    assert_same_step(Case(net, case.plain, case.x))


def subnet_compiled(backend: str) -> Callable[[int, int], nn.Module]:
    def net(*sizes: int) -> nn.Module:
        made = mlp(*sizes)
        made.compile(backend=backend)
        return made

    return net


@pytest.mark.parametrize("name", ["affine", "sequential", "stack", "streams"])
def test_compiled_subnets(name: str, mode: str):
    case = make(name, subnet_compiled("aot_eager"))
    case = Case(case.net, make(name).plain, case.x)
    case.plain.load_state_dict(case.net.state_dict())
    with iz.mode(case.net, mode):
        assert_same_step(case, steps=3)


def test_compiled_subnets_inductor(mode: str):
    case = make("sequential", subnet_compiled("inductor"))
    case = Case(case.net, make("sequential").plain, case.x)
    case.plain.load_state_dict(case.net.state_dict())
    with iz.mode(case.net, mode):
        assert_same_step(case)
        net, x = case.net, case.x.clone().requires_grad_()
        for _ in range(2):  # two forwards in flight
            net.zero_grad()
            case.plain.zero_grad()
            losses = [net(x * k).square().sum() for k in (1, 2)]
            sum(losses).backward()
            sum(case.plain(case.x * k).square().sum() for k in (1, 2)).backward()
            assert_near(gradients(net), gradients(case.plain))


@pytest.mark.usual
def test_compiled_subnets_as_wrapped_modules_keep_their_parameters_checked(mode: str):
    """``torch.compile(net)`` wraps a module; the engine must still find what is inside it."""
    case = make("stack", lambda *sizes: torch.compile(mlp(*sizes), backend="aot_eager"))
    plain = make("stack").plain
    plain.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in case.net.state_dict().items()})
    with iz.mode(case.net, mode):
        assert_same_step(Case(case.net, plain, case.x))
        loss = case.net(case.x).square().sum()
        with torch.no_grad():
            for p in case.net.parameters():
                p.add_(1)
        with pytest.raises(RuntimeError, match="stay as they were|inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_subnets_save_memory(backend: str):
    def held(depth: int) -> int:
        make_net = subnet_compiled(backend)
        net = iz.InvertibleSequential(*(iz.AdditiveCoupling(make_net(HALF, HALF), check="never") for _ in range(depth)))
        x = torch.randn(64, FEATURES)
        net(x).sum().backward()  # compiles
        packed: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.nbytes) or t, lambda t: t):
            net(x)
        return sum(packed)

    assert held(1) == held(3) == 0


@pytest.mark.usual
def test_compiled_dropout_subnets(mode: str):
    """Compiled random operators draw what eager ones draw, in the replay as in the forward."""

    def net(*sizes: int) -> nn.Module:
        made = mlp(*sizes, nn.Dropout(0.5))
        made.compile(backend="aot_eager")
        return made

    case = make("stack", net)
    plain = make("stack", lambda *sizes: mlp(*sizes, nn.Dropout(0.5))).plain
    plain.load_state_dict(case.net.state_dict())
    with iz.mode(case.net, mode):
        for seed in range(2):
            torch.manual_seed(seed)
            actual = train_step(case.net, case.x)
            torch.manual_seed(seed)
            assert_near(actual, train_step(plain, case.x))


def test_subnets_compiled_in_eval_and_train(mode: str):
    case = make("stack", subnet_compiled("aot_eager"))
    plain = make("stack").plain
    plain.load_state_dict(case.net.state_dict())
    with iz.mode(case.net, mode):
        for train in (True, False, True):
            assert_same_step(Case(case.net.train(train), plain, case.x), steps=1)


def test_compiled_autograd(mode: str):
    """Where backward itself is compiled, a replay is no part of what is traced."""
    layer, x = iz.AdditiveCoupling(nn.Linear(HALF, HALF)), torch.randn(4, FEATURES, requires_grad=True)
    with iz.mode(layer, "store"):
        expected = torch.autograd.grad(layer(x.sigmoid()).square().sum(), [*layer.parameters(), x])
    layer.mode = mode
    y = layer(x.sigmoid()).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward()
    assert_near(gradients(layer, x), expected)


def test_graph_breaks_around_a_net(mode: str):
    """Eager code in a compiled function: an invertible net behind a graph break runs as it does eagerly."""
    case = make("stack")
    case.net.mode = mode
    net = torch._dynamo.disable(case.net)

    @torch.compile(backend="aot_eager")
    def loss(x: Tensor) -> Tensor:
        return net(x.sigmoid()).sin().square().sum()

    for _ in range(2):
        case.net.zero_grad()
        case.plain.zero_grad()
        x, z = (case.x.clone().requires_grad_() for _ in range(2))
        loss(x).backward()
        case.plain(z.sigmoid()).sin().square().sum().backward()
        assert_near(gradients(case.net, x), gradients(case.plain, z))


def test_an_eager_step_inside_the_tracker_after_compiling(mode: str):
    case = make("stack")
    net = torch.compile(case.net, backend="aot_eager")
    with iz.mode(case.net, mode):
        net(case.x)
        with track_memory() as memory:
            grads = train_step(case.net, case.x)
        assert memory.peak > 0
        assert_near(grads, train_step(case.plain, case.x))
