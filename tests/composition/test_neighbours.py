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
    Case,
    PlainAdditive,
    PlainAffine,
    assert_near,
    assert_same_step,
    gradients,
    make,
    mlp,
    train_step,
)

MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


def reentrant(net: Callable, *args: Tensor) -> Tensor:
    return checkpoint(net, *args, use_reentrant=True)


def nonreentrant(net: Callable, *args: Tensor) -> Tensor:
    return checkpoint(net, *args, use_reentrant=False)


def selective(net: Callable, *args: Tensor) -> Tensor:
    return checkpoint(
        net, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, MATMULS)
    )


def prefer(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE
        if op in (*MATMULS, torch.ops.aten.tanh.default)
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


def by_policy(net: Callable, *args: Tensor) -> Tensor:
    return checkpoint(net, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, prefer))


def respectful(net: Callable, *args: Tensor) -> Tensor:
    """What it caches goes through the hooks of others: opt-in from torch 2.14 on, announced as the default."""
    options = {"respect_saved_tensors_hooks"} & inspect.signature(checkpoint).parameters.keys()
    contexts = partial(create_selective_checkpoint_contexts, prefer)
    return checkpoint(net, *args, use_reentrant=False, context_fn=contexts, **dict.fromkeys(options, True))


CHECKPOINTS = [reentrant, nonreentrant, selective, by_policy, respectful]


class Checkpointed(nn.Module):
    """A subnet that checkpoints itself."""

    def __init__(self, net: nn.Module, how: Callable) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.net, x)


# ---- checkpoint -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_inside_checkpoint(case: Case, how: Callable):
    assert_same_step(case, lambda net, x: how(net, x))


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_inside_checkpoint_with_neighbours(case: Case, how: Callable):
    head = nn.Linear(FEATURES, FEATURES)
    assert_same_step(case, lambda net, x: how(lambda v: head(net(v.exp())).sigmoid(), x))


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointed_output_is_all_that_the_loss_sees(case: Case, how: Callable):
    """No op after the stack saves anything, so the stack's own handles are the first to be unpacked."""

    def step(net: nn.Module) -> list[Tensor | None]:
        net.zero_grad()
        x = case.x.clone().requires_grad_()
        how(net, x).sum().backward()
        return gradients(net, x)

    for _ in range(2):
        assert_near(step(case.net), step(case.plain))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in inverses, which need no gradients
@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("name", ["affine", "sequential", "stack", "streams"])
def test_checkpoint_inside_subnets(name: str, mode: str, how: Callable):
    case = make(name, lambda *sizes: Checkpointed(mlp(*sizes), how))
    with iz.mode(case.net, mode):
        assert_same_step(case)


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpoint_of_checkpointed_subnets_with_dropout(mode: str, how: Callable):
    case = make("stack", lambda *sizes: Checkpointed(mlp(*sizes, nn.Dropout(0.5)), nonreentrant))
    with iz.mode(case.net, mode):
        for seed in range(2):
            torch.manual_seed(seed)
            actual = train_step(case.net, case.x, how)
            after = torch.rand(3)
            torch.manual_seed(seed)
            assert_near(actual, train_step(case.plain, case.x, how))
            assert_near([after], [torch.rand(3)])


@pytest.mark.parametrize("how", [nonreentrant, selective, by_policy, respectful])
def test_two_checkpointed_forwards_in_flight(case: Case, how: Callable):
    """The second backward recomputes after the first one has verified the replay: its recomputation must not differ."""
    head = nn.Linear(FEATURES, FEATURES, bias=False)

    def step(net: nn.Module) -> list[Tensor | None]:
        net.zero_grad()
        x = case.x.clone().requires_grad_()
        first = how(lambda v: head(net(v.exp())).sin(), x).square().sum()
        second = how(lambda v: head(net(v.cos())).sin(), x).square().sum()
        second.backward()
        first.backward()
        return gradients(net, x)

    for _ in range(2):
        assert_near(step(case.net), step(case.plain))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_sequential(mode: str, use_reentrant: bool):
    case = make("sequential")
    with iz.mode(case.net, mode):
        assert_same_step(case, lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=use_reentrant))


@pytest.mark.parametrize("how", [reentrant, nonreentrant])
def test_batch_norm_in_a_checkpointed_stack(mode: str, how: Callable):
    case = make("stack", lambda *sizes: mlp(*sizes, nn.BatchNorm1d(5)))
    with iz.mode(case.net, mode):
        assert_same_step(case, how)
    if (
        how is nonreentrant
    ):  # its recomputation stops early; here it has less to recompute, so statistics move less often
        assert all(b in (2, 4) for b in case.net.buffers() if not b.is_floating_point())
        return
    assert_near([b.double() for b in case.net.buffers()], [b.double() for b in case.plain.buffers()])


def test_checkpointed_subnets_hold_nothing():
    """What a non-reentrant checkpoint saves of its input goes through the stack's hooks as well."""

    def held(depth: int) -> int:
        nets = [Checkpointed(mlp(HALF, 3), nonreentrant) for _ in range(2 * depth)]
        net = iz.InvertibleSequential(*(iz.AdditiveCoupling(f, g, check="never") for f, g in zip(*[iter(nets)] * 2)))
        x = torch.randn(64, FEATURES)
        with track_memory() as memory:
            y = net(x)
            current = memory.current
        del y
        return current

    held(1)
    assert held(8) == held(2)


# ---- saved-tensor hooks around the step -----------------------------------------------------------------------------


def test_save_on_cpu_around_forward(case: Case):
    def call(net: nn.Module, x: Tensor) -> Tensor:
        with save_on_cpu():
            return net(x)

    assert_same_step(case, call)


@pytest.mark.parametrize("pin", [False])
def test_save_on_cpu_around_the_step(case: Case, pin: bool):
    for _ in range(2):
        with save_on_cpu(pin_memory=pin):
            actual = train_step(case.net, case.x)
            expected = train_step(case.plain, case.x)
        assert_near(actual, expected)


def test_save_on_cpu_inside_subnets(case: Case):
    class Offloaded(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with save_on_cpu():
                return self.net(x)

    made = make(case.subject.form, lambda *sizes: Offloaded(mlp(*sizes)))
    with iz.mode(made.net, case.subject.mode):
        assert_same_step(made)


def test_hooks_that_change_what_is_saved_around_the_step(case: Case):
    """Hooks around a stack see what is saved outside calls; they must give it back to the right place."""
    for _ in range(2):
        with saved_tensors_hooks(lambda t: t.clone().numpy(), torch.from_numpy):
            actual, expected = train_step(case.net, case.x), train_step(case.plain, case.x)
        assert_near(actual, expected)


def test_anomaly_mode(case: Case):
    torch.autograd.set_detect_anomaly(True)
    try:
        assert_same_step(case)
        x = case.x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(case.net(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    finally:
        torch.autograd.set_detect_anomaly(False)


def test_anomaly_mode_names_the_function_that_made_a_nan(mode: str):
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x * 0).sqrt() - 1).sqrt()

    net = iz.AdditiveCoupling(Bad(), check="never")
    torch.autograd.set_detect_anomaly(True)
    try:
        with iz.mode(net, mode), pytest.warns(UserWarning, match="Error detected in SqrtBackward0"):
            y = net(torch.randn(4, FEATURES, requires_grad=True))
            with pytest.raises(RuntimeError, match="Function 'SqrtBackward0' returned nan values in its 0th output"):
                y.sum().backward()
    finally:
        torch.autograd.set_detect_anomaly(False)


# ---- dispatch modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [False, True])
def test_fake_tensors(case: Case, seed: bool):
    """A step under fake tensors, as memory planners run it; values are never looked at."""
    case.net.seed = seed
    with FakeTensorMode(allow_non_fake_inputs=True):
        grads = train_step(case.net, torch.randn(4, FEATURES))
    assert [g.shape for g in grads] == [g.shape for g in train_step(case.plain, case.x)]


def test_fake_tensors_leave_real_steps_alone(case: Case):
    with FakeTensorMode(allow_non_fake_inputs=True):
        case.net(torch.randn(4, FEATURES, requires_grad=True)).sum().backward()
    case.net.zero_grad()
    assert_same_step(case)


def test_meta_tensors(case: Case):
    grads = train_step(case.net.to("meta"), case.x.to("meta"))
    assert all(g.is_meta for g in grads)
    assert [g.shape for g in grads] == [g.shape for g in train_step(case.plain, case.x)]


def test_flops_of_forward_are_those_of_a_plain_net(case: Case):
    with FlopCounterMode(display=False) as ours:
        case.net(case.x)
    with FlopCounterMode(display=False) as theirs:
        case.plain(case.x)
    assert ours.get_total_flops() == theirs.get_total_flops()


# ---- stacks in stacks -----------------------------------------------------------------------------------------------


def inner_stack(plain: bool, features: int, depth: int = 2) -> nn.Module:
    layer = PlainAdditive if plain else iz.AdditiveCoupling
    nets = [
        layer(nn.Linear(features // 2, features // 2), nn.Linear(features // 2, features // 2)) for _ in range(depth)
    ]
    return (nn.Sequential if plain else iz.InvertibleSequential)(*nets)


def outer_stack(plain: bool, features: int, depth: int = 3) -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(inner_stack(plain, features // 2), nn.Tanh())

    layer = PlainAdditive if plain else iz.AdditiveCoupling
    return (nn.Sequential if plain else iz.InvertibleSequential)(*(layer(block(), block()) for _ in range(depth)))


@pytest.mark.parametrize("inner", ["store", "recompute", "invert"])
def test_stack_in_a_block(mode: str, inner: str):
    net, plain = outer_stack(False, 8), outer_stack(True, 8)
    plain.load_state_dict(net.state_dict())
    net.mode = mode
    for layer in net:
        layer.f[0].mode = layer.g[0].mode = inner
    assert_same_step(Case(net, plain, torch.randn(4, 8)))


def test_stack_in_a_block_holds_one_activation_of_the_outer_stack():
    def held(depth: int) -> int:
        net = outer_stack(False, 8, depth)
        net.check = "never"
        x = torch.randn(64, 8)
        with track_memory() as memory:
            y = net(x)
            assert memory.current == x.nbytes  # the merged output and nothing else
            current = memory.current
        del y
        return current

    held(1)
    assert held(2) == held(5)


def test_peak_of_a_stack_in_a_block_does_not_grow_with_depth():
    def peak(depth: int) -> int:
        net = outer_stack(False, 32, depth)
        net.check = "never"
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        x = torch.randn(256, 32)
        with track_memory() as memory:
            loss = net(x).sum()
            memory.reset_peak()
            loss.backward()
        return memory.peak

    peak(1)
    assert peak(6) == peak(3)


def test_a_stack_as_a_layer_of_a_stack(mode: str):
    def build(plain: bool) -> nn.Module:
        seq = nn.Sequential if plain else iz.InvertibleSequential
        affine = PlainAffine if plain else iz.AffineCoupling
        return seq(inner_stack(plain, FEATURES), affine(mlp(HALF, 6), mlp(HALF, 6)), seq(inner_stack(plain, FEATURES)))

    net, plain = build(False), build(True)
    plain.load_state_dict(net.state_dict())
    with iz.mode(net, mode):
        assert_same_step(Case(net, plain, torch.randn(4, FEATURES)))


def test_a_checkpointed_stack_in_a_block_of_a_checkpointed_stack(mode: str):
    class Block(nn.Module):
        def __init__(self, plain: bool) -> None:
            super().__init__()
            self.stack = inner_stack(plain, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nonreentrant(lambda v: nonreentrant(self.stack, v.sigmoid()).sin(), x)

    def build(plain: bool) -> nn.Module:
        layer = PlainAdditive if plain else iz.AdditiveCoupling
        return (nn.Sequential if plain else iz.InvertibleSequential)(*(layer(Block(plain), Block(plain)) for _ in "ab"))

    net, plain = build(False), build(True)
    plain.load_state_dict(net.state_dict())
    with iz.mode(net, mode):
        assert_same_step(Case(net, plain, torch.randn(4, 8)), nonreentrant)


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
