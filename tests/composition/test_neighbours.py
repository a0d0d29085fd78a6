"""Checkpoints, offloading, anomaly mode, and stacks in stacks: everybody who hooks into what autograd saves."""

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import invzoo as iz
from invzoo.testing.memory import track_memory
from tests.reference import (
    FEATURES,
    HALF,
    Called,
    Case,
    PlainAdditive,
    PlainAffine,
    assert_near,
    assert_same_step,
    make,
    mlp,
    train_step,
)

MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

How = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def reentrant(net: Callable, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=True)


def nonreentrant(net: Callable, x: Tensor, policy: object = None, **options: object) -> Tensor:
    if policy is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(net, x, use_reentrant=False, **options)


def prefer(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    saved = op in (*MATMULS, torch.ops.aten.tanh.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


selective = partial(nonreentrant, policy=MATMULS)
# What it caches goes through the hooks of others: opt-in from torch 2.14 on, announced as the default.
RESPECT = {"respect_saved_tensors_hooks"} & inspect.signature(checkpoint).parameters.keys()
CHECKPOINTS = {
    "reentrant": reentrant,
    "nonreentrant": nonreentrant,
    "selective": selective,
    "by policy": partial(nonreentrant, policy=prefer),
    "respectful": partial(nonreentrant, policy=prefer, **dict.fromkeys(RESPECT, True)),
}


@pytest.fixture(params=CHECKPOINTS)
def how(request: pytest.FixtureRequest) -> How:
    return CHECKPOINTS[request.param]


# ---- checkpoint -----------------------------------------------------------------------------------------------------


def test_inside_checkpoint(case: Case, how: How):
    assert_same_step(case, how)


def test_inside_checkpoint_with_neighbours(case: Case, how: How):
    head = nn.Linear(FEATURES, FEATURES)
    assert_same_step(case, lambda net, x: how(lambda v: head(net(v.exp())).sigmoid(), x))


def test_checkpointed_output_is_all_that_the_loss_sees(case: Case, how: How):
    """No op after the stack saves anything, so the stack's own handles are the first to be unpacked."""

    def program(net: nn.Module) -> Tensor:
        x = case.x.clone().requires_grad_()
        how(net, x).sum().backward()
        return x.grad

    case.holds(program)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in inverses, which need no gradients
@pytest.mark.parametrize("name", ["affine", "sequential", "stack", "streams"])
def test_checkpoint_inside_subnets(name: str, mode: str, how: How):
    assert_same_step(make(name, lambda *sizes: Called(mlp(*sizes), how), mode))


def test_checkpoint_of_checkpointed_subnets_with_dropout(mode: str, how: How):
    case = make("stack", lambda *sizes: Called(mlp(*sizes, nn.Dropout(0.5)), nonreentrant), mode)
    case.holds(lambda net: train_step(net, case.x, how))


def test_two_checkpointed_forwards_in_flight(case: Case, how: How):
    """The second backward recomputes after the first one has verified the replay: its recomputation must not differ."""
    head = nn.Linear(FEATURES, FEATURES, bias=False)

    def program(net: nn.Module) -> Tensor:
        x = case.x.clone().requires_grad_()
        first = how(lambda v: head(net(v.exp())).sin(), x).square().sum()
        second = how(lambda v: head(net(v.cos())).sin(), x).square().sum()
        second.backward()
        first.backward()
        return x.grad

    case.holds(program)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_sequential(mode: str, use_reentrant: bool):
    case = make("sequential", mode=mode)
    assert_same_step(case, lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=use_reentrant))


@pytest.mark.parametrize("how", [reentrant, nonreentrant])
def test_batch_norm_in_a_checkpointed_stack(mode: str, how: How):
    case = make("stack", lambda *sizes: mlp(*sizes, nn.BatchNorm1d(5)), mode)
    assert_same_step(case, how)
    if how is reentrant:
        assert_near([*case.net.buffers()], [*case.plain.buffers()])
    else:  # its recomputation stops early; here it has less to recompute, so statistics move less often
        assert all(b in (2, 4) for b in case.net.buffers() if not b.is_floating_point())


def test_checkpointed_subnets_hold_nothing():
    """What a non-reentrant checkpoint saves of its input goes through the stack's hooks as well."""

    def held(depth: int) -> int:
        nets = [Called(mlp(HALF, HALF), nonreentrant) for _ in range(depth)]
        net = iz.InvertibleSequential(*(iz.AdditiveCoupling(f, check="never") for f in nets))
        with track_memory() as memory:
            y = net(torch.randn(64, FEATURES))
            current = memory.current
        del y
        return current

    held(1)
    assert held(8) == held(2)


# ---- saved-tensor hooks around the step -----------------------------------------------------------------------------


def offloaded(net: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return net(x)


def test_save_on_cpu_around_forward(case: Case):
    assert_same_step(case, offloaded)


def test_save_on_cpu_inside_subnets(case: Case):
    assert_same_step(make(case.subject.form, lambda *sizes: Called(mlp(*sizes), offloaded), case.subject.mode))


@pytest.mark.parametrize(
    "hooks", [save_on_cpu, lambda: saved_tensors_hooks(lambda t: t.clone().numpy(), torch.from_numpy)]
)
def test_hooks_around_the_step(case: Case, hooks: Callable[[], saved_tensors_hooks]):
    """They see what is saved outside calls too, and must get it back in the right place."""

    def program(net: nn.Module) -> list[Tensor]:
        with hooks():
            return train_step(net, case.x)

    case.holds(program)


def test_anomaly_mode(case: Case):
    def program(net: nn.Module) -> Tensor:
        x = case.x.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):
            train_step(net, x)
            (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            g.square().sum().backward()
        return x.grad

    case.holds(program)


def test_anomaly_mode_names_the_function_that_made_a_nan(mode: str):
    net = iz.AdditiveCoupling(lambda x: ((x * 0).sqrt() - 1).sqrt(), check="never", mode=mode)
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match="Error detected in SqrtBackward0"):
        y = net(torch.randn(4, FEATURES, requires_grad=True))
        with pytest.raises(RuntimeError, match="Function 'SqrtBackward0' returned nan values in its 0th output"):
            y.sum().backward()


# ---- dispatch modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [False, True])
def test_fake_tensors(case: Case, seed: bool):
    """A step under fake tensors, as memory planners run it; values are never looked at, and real steps left alone."""
    case.net.seed = seed
    with FakeTensorMode(allow_non_fake_inputs=True):
        grads = train_step(case.net, torch.randn(4, FEATURES))
    assert [g.shape for g in grads] == [g.shape for g in train_step(case.plain, case.x)]
    assert_same_step(case)


def test_meta_tensors(case: Case):
    grads = train_step(case.net.to("meta"), case.x.to("meta"))
    assert all(g.is_meta for g in grads)
    assert [g.shape for g in grads] == [g.shape for g in train_step(case.plain, case.x)]


def test_flops_of_forward_are_those_of_a_plain_net(case: Case):
    counts = []
    for net in (case.net, case.plain):
        with FlopCounterMode(display=False) as counter:
            net(case.x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- stacks in stacks -----------------------------------------------------------------------------------------------


def both(build: Callable[..., nn.Module], mode: str, x: Tensor) -> Case:
    """Build a net of a container and two couplings: of ours, and of plain ones."""
    net = build(iz.InvertibleSequential, iz.AdditiveCoupling, iz.AffineCoupling)
    plain = build(nn.Sequential, PlainAdditive, PlainAffine)
    plain.load_state_dict(net.state_dict())
    iz.mode(net, mode)
    return Case(net, plain, x)


def inner_stack(container: Callable, additive: Callable, features: int) -> nn.Module:
    half = features // 2
    return container(*(additive(nn.Linear(half, half), nn.Linear(half, half)) for _ in range(2)))


def outer_stack(container: Callable, additive: Callable, *_: object, features: int = 8, depth: int = 3) -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(inner_stack(container, additive, features // 2), nn.Tanh())

    return container(*(additive(block(), block()) for _ in range(depth)))


@pytest.mark.parametrize("inner", ["store", "recompute", "invert"])
def test_stack_in_a_block(mode: str, inner: str):
    case = both(outer_stack, inner, torch.randn(4, 8))
    case.net.mode = mode  # of the outer layers alone
    assert_same_step(case)


def test_stack_in_a_block_holds_one_activation_of_the_outer_stack():
    """And the peak of its backward does not grow with depth."""

    def measure(depth: int) -> int:
        net = outer_stack(iz.InvertibleSequential, iz.AdditiveCoupling, features=32, depth=depth)
        net.check = "never"
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        x = torch.randn(256, 32)
        with track_memory() as memory:
            y = net(x)
            assert memory.current == x.nbytes  # the merged output and nothing else
            memory.reset_peak()
            y.sum().backward()
        return memory.peak

    measure(1)
    assert measure(6) == measure(3)


def test_a_stack_as_a_layer_of_a_stack(mode: str):
    def build(container: Callable, additive: Callable, affine: Callable) -> nn.Module:
        inner, last = (inner_stack(container, additive, FEATURES) for _ in range(2))
        return container(inner, affine(mlp(HALF, 6), mlp(HALF, 6)), container(last))

    assert_same_step(both(build, mode, torch.randn(4, FEATURES)))


def test_a_checkpointed_stack_in_a_block_of_a_checkpointed_stack(mode: str):
    def again(stack: nn.Module, x: Tensor) -> Tensor:
        return nonreentrant(lambda v: nonreentrant(stack, v.sigmoid()).sin(), x)

    def build(container: Callable, additive: Callable, _: Callable) -> nn.Module:
        blocks = [Called(inner_stack(container, additive, 4), again) for _ in range(4)]
        return container(*map(additive, blocks[:2], blocks[2:]))

    assert_same_step(both(build, mode, torch.randn(4, 8)), nonreentrant)


def test_what_a_selective_checkpoint_saved_is_not_taken_for_something_else(mode: str):
    """Operators of the engine's own are no part of what the checkpoint counts: here they would fit in shape."""
    net = nn.Sequential(iz.InvertibleLeakyReLU(), nn.Linear(8, 4, bias=False), nn.Tanh())
    net[0].mode = mode
    x = torch.randn(8, 8, requires_grad=True)
    first, second = (selective(net, x * k).square().sum() for k in (1, 2))
    second.backward()
    net.zero_grad()
    first.backward()
    found = net[1].weight.grad.clone()
    net.zero_grad()
    net[1:](nn.functional.leaky_relu(x, net[0].negative_slope)).square().sum().backward()
    assert_near([found], [net[1].weight.grad])
