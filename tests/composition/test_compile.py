"""torch.compile of a net with invertible layers, and of the subnets alone."""

from collections.abc import Iterator

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


def compiled(net: nn.Module, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(net, backend=backend)


def with_compiled(case: Case, backend: str = "aot_eager") -> Case:
    return Case(compiled(case.net, backend), case.plain, case.x)


def test_compiled_net(case: Case):
    assert_same_step(with_compiled(case))
    assert_same_step(case, steps=1)


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_compiled_net_inductor(mode: str):
    assert_same_step(with_compiled(make("stack", mode=mode), "inductor"))


@pytest.mark.parametrize("breaks", [False, True])
def test_compiled_step(mode: str, breaks: bool):
    """The loss, too, is inside the compiled function; behind a graph break the net runs as it does eagerly."""
    case = make("stack", mode=mode)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x.sigmoid()).sin().square().sum()

    def program(net: nn.Module) -> Tensor:
        x = case.x.clone().requires_grad_()
        (loss if net is case.plain else compiled_loss)(net, x).backward()
        return x.grad

    compiled_loss = torch.compile(
        lambda net, x: loss(torch._dynamo.disable(net) if breaks else net, x), backend="aot_eager"
    )
    case.holds(program)


def test_mode_set_after_compiling():
    case = make("stack")
    other = with_compiled(case)
    for value in (*MODES, "store"):
        with iz.mode(case.net, value):
            assert_same_step(other, steps=1)


@pytest.mark.usual
def test_compiled_net_with_other_batch_sizes(mode: str):
    case = with_compiled(make("streams", mode=mode))
    for batch in (4, 7, 3):
        assert_same_step(Case(case.net, case.plain, torch.randn(batch, FEATURES)), steps=1)


def test_compiled_without_gradients(mode: str):
    case = with_compiled(make("affine", mode=mode))
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            assert_near([case.net(case.x)], [case.plain(case.x)])
    assert_same_step(case)


def case_of_compiled_subnets(form: str, mode: str, *middle: nn.Module, backend: str = "aot_eager") -> Case:
    """Make a net whose subnets are compiled in place, and the plain one, whose are not."""

    def subnet(*sizes: int) -> nn.Module:
        made = mlp(*sizes, *middle)
        made.compile(backend=backend)
        return made

    net, case = make(form, subnet, mode).net, make(form, lambda *sizes: mlp(*sizes, *middle))
    case.plain.load_state_dict(net.state_dict())
    return Case(net, case.plain, case.x)


@pytest.mark.parametrize("name", ["affine", "sequential", "stack", "streams"])
def test_compiled_subnets(name: str, mode: str):
    """In eval mode as well, and in training again."""
    case = case_of_compiled_subnets(name, mode)
    assert_same_step(case, steps=3)
    for trains in (False, True):
        case.net.train(trains)
        assert_same_step(case, steps=1)


def test_compiled_subnets_inductor(mode: str):
    case = case_of_compiled_subnets("sequential", mode, backend="inductor")
    assert_same_step(case)
    case.holds(lambda net: sum([net(case.x * k).square().sum() for k in (1, 2)]).backward())  # two forwards in flight


@pytest.mark.usual
def test_compiled_subnets_as_wrapped_modules_keep_their_parameters_checked(mode: str):
    """``torch.compile(net)`` wraps a module; the engine must still find what is inside it."""
    case = make("stack", lambda *sizes: compiled(mlp(*sizes)), mode)
    plain = make("stack").plain
    plain.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in case.net.state_dict().items()})
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
        nets = [mlp(HALF, HALF) for _ in range(depth)]
        for subnet in nets:
            subnet.compile(backend=backend)
        net = iz.InvertibleSequential(*(iz.AdditiveCoupling(subnet, check="never") for subnet in nets))
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
    case = case_of_compiled_subnets("stack", mode, nn.Dropout(0.5))
    case.holds(lambda net: train_step(net, case.x))


def test_compiled_autograd(mode: str):
    """Where backward itself is compiled, a replay is no part of what is traced."""
    case = make("additive", lambda *sizes: nn.Linear(*sizes), mode)

    def program(net: nn.Module) -> None:
        y = net(case.x.sigmoid()).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            y.backward()

    case.holds(program)


def test_an_eager_step_inside_the_tracker_after_compiling(mode: str):
    case = make("stack", mode=mode)
    compiled(case.net)(case.x)
    with track_memory() as memory:
        assert_same_step(case, steps=1)
    assert memory.peak > 0
