"""Checks of FSDP2, which two processes run."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.utils.checkpoint import checkpoint

import invzoo as iz
from invzoo.testing.memory import track_memory
from tests.composition.workers import (
    FORMS,
    WORLD,
    Recorded,
    Suite,
    assert_overlaps,
    assert_saves,
    batches,
    check_training,
    full,
    layers_of,
    reference,
)
from tests.reference import FEATURES, Case, assert_near, make

__all__ = ["CHECKS", "shard"]

CHECKS = Suite()

FULL = MixedPrecisionPolicy()
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(net: nn.Module, where: str, policy: MixedPrecisionPolicy = FULL, **options: Any) -> nn.Module:
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), **options}
    if where == "layers":
        parts = [m for m in layers_of(net) if m is not net]
    elif where == "subnets":
        parts = [n for m in layers_of(net) for n in (m.f, getattr(m, "g", None)) if n is not None]
    elif where == "linears":
        parts = [m for m in net.modules() if isinstance(m, nn.Linear)]
    else:
        parts = []
    for part in parts:
        fully_shard(part, mp_policy=policy, **options)
    casts = where in ("root", "layers")  # else the root is there for what its parts leave, and streams stay as they are
    return fully_shard(net, mp_policy=policy if casts else FULL, **options)


def fsdp(where: str, reshard: bool) -> None:
    def check(case: Case, rank: int) -> None:
        check_training(case, shard(case.net, where, reshard_after_forward=reshard), rank)

    check.__name__ = f"fsdp_{where}_{'reshard' if reshard else 'keep'}"
    CHECKS.each(*(FORMS if reshard else ("stack",)))(check)


def compare_sharded(case: Case, step: Callable[[nn.Module, Tensor, int], Tensor], rank: int, **options: Any) -> None:
    """Compare a loss under FSDP of every subnet with the mean of the losses of all processes."""
    net, x = shard(case.net, "subnets", **options), batches(case)
    for _ in range(2):
        net.zero_grad()
        case.plain.zero_grad()
        step(net, x[rank], rank).backward()
        sum(step(case.plain, x[r], r) for r in range(WORLD)).div(WORLD).backward()
        assert_near([full(p.grad) for p in net.parameters()], [p.grad for p in case.plain.parameters()])


@CHECKS.each("stack", "streams")
def fsdp_loss_sees_half_of_the_output(case: Case, rank: int) -> None:
    compare_sharded(case, lambda net, x, r: net(x.sigmoid())[:, : FEATURES // 2].square().sum(), rank)


@CHECKS.each("sequential")
def fsdp_loss_sees_an_intermediate_output_alone(case: Case, rank: int) -> None:
    """What came after must be inverted, although no gradient passes it, with parameters that are sharded again."""

    def step(net: nn.Module, x: Tensor, r: int) -> Tensor:
        middle = net[0](x.sigmoid())
        y = net[1](middle)
        return middle.sin().square().sum() + y.detach().sum()

    for where in ("layers", "subnets", "linears"):
        made = make("sequential")
        with iz.mode(made.net, case.subject.mode):
            net, x = made.net, batches(case)
            for layer in net:
                shard(layer, where, reshard_after_forward=True)  # not so by default for what is no part of another
            step(net, x[rank], rank).backward()
            sum(step(made.plain, x[r], r) for r in range(WORLD)).div(WORLD).backward()
            assert_near([full(p.grad) for p in net[0].parameters()], [p.grad for p in made.plain[0].parameters()])


@CHECKS.each("sequential", "streams")
def fsdp_input_needs_grad(case: Case, rank: int) -> None:
    net, x = shard(case.net, "subnets"), batches(case)[rank]
    v, w = x.clone().requires_grad_(), x.clone().requires_grad_()
    net(v.sigmoid()).square().sum().backward()
    case.plain(w.sigmoid()).square().sum().backward()
    assert_near([v.grad], [w.grad])


@CHECKS.each("stack", "streams")
def fsdp_two_micro_batches(case: Case, rank: int) -> None:
    net, x = shard(case.net, "subnets"), batches(case)
    for last in (False, True):
        net.set_requires_gradient_sync(last)
        net((x[rank] * (1 + last)).sigmoid()).square().sum().backward()
        case.plain((x.flatten(0, 1) * (1 + last)).sigmoid()).square().sum().div(WORLD).backward()
    assert_near([full(p.grad) for p in net.parameters()], [p.grad for p in case.plain.parameters()])


@CHECKS.each("stack")
def fsdp_two_forwards(case: Case, rank: int) -> None:
    compare_sharded(case, lambda net, x, r: (net(x.sigmoid()) * net(x.cos())).sum(), rank)


@CHECKS.each("stack")
def fsdp_frozen_subnets(case: Case, rank: int) -> None:
    for net in (case.net, case.plain):
        for layer in net[:2]:
            layer.f.requires_grad_(False)
    check_training(case, shard(case.net, "subnets"), rank)


@CHECKS.each("stack")
def fsdp_checkpointed(case: Case, rank: int) -> None:
    net = shard(case.net, "subnets")
    checkpoint(net, batches(case)[rank].sigmoid(), use_reentrant=False).sin().square().mean().backward()
    expected, _ = reference(case.plain, batches(case), steps=1)
    assert_near([full(p.grad) for p in net.parameters()], expected)


def in_bfloat16(where: str) -> None:
    """Compare with a plain net under the same FSDP; streams that are bfloat16 themselves are rebuilt as coarsely."""

    def check(case: Case, rank: int) -> None:
        x, grads = batches(case), []
        for net in (case.net, case.plain):
            y = shard(net, where, BFLOAT16)(x[rank].sigmoid())
            assert y.dtype == (torch.float64 if where == "subnets" else torch.bfloat16)
            y.double().square().sum().backward()
            grads.append([full(p.grad) for p in net.parameters()])
        coarse = where != "subnets" and case.subject.mode == "invert"
        assert_near(*grads, tolerance=5e-2 if coarse else 1e-9)

    check.__name__ = f"fsdp_{where}_in_bfloat16"
    CHECKS.each(*(("stack", "streams") if where == "subnets" else ("stack",)))(check)


def fsdp_output_dtype_of_each_layer_parts_them(rank: int) -> None:
    """Each layer holds its output then, since the next one gets another tensor; the root's dtype parts nothing."""
    policy = dataclasses.replace(BFLOAT16, output_dtype=torch.float32)

    def growth(where: str, policy: MixedPrecisionPolicy) -> int:
        held = []
        for depth in (2, 6):
            net, x = shard(Recorded.stack(depth, [], "invert"), where, policy), torch.randn(1024, FEATURES)
            net(x)  # a first call checks more
            with track_memory() as memory:
                y = net(x)
                held.append(memory.current)
        return round((held[1] - held[0]) / (y.numel() * torch.bfloat16.itemsize))

    assert growth("layers", BFLOAT16) == growth("root", policy) == 0
    assert growth("layers", policy) == 4


METHODS = ("forward_and_log_det", "inverse", "inverse_and_log_det")
Loss = Callable[[nn.Module, Tensor], Tensor]


def by_square(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()


def in_mixed_precision(net: nn.Module, x: Tensor) -> Tensor:
    return net(x.float()).float().square().mean()


def by_log_det(net: nn.Module, x: Tensor) -> Tensor:
    z, log_det = net.forward_and_log_det(x)
    return z.square().mean() - log_det.mean()


def by_log_det_of_inverse(net: nn.Module, x: Tensor) -> Tensor:
    z, log_det = net.inverse_and_log_det(x)
    return z.square().mean() - log_det.mean()


def by_samples(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean() + net.inverse(x).square().mean()


def registered(where: str, loss: Loss) -> None:
    """FSDP2 gathers for `forward` alone: other methods are registered, where the net and its layers are sharded."""

    def check(case: Case, rank: int) -> None:
        net, x = shard(copy.deepcopy(case.net), where, reshard_after_forward=True), batches(case)
        for module in (net, *layers_of(net)):
            for method in METHODS:
                register_fsdp_forward_method(module, method)  # does nothing to what is not sharded
        for _ in range(2):
            loss(net, x[rank].sigmoid()).backward()
            loss(case.net, x.flatten(0, 1).sigmoid()).backward()
            assert_near([full(p.grad) for p in net.parameters()], [p.grad for p in case.net.parameters()])

    check.__name__ = f"fsdp_{loss.__name__}_{where}"
    CHECKS.each("stack")(check)


def recorded(where: str, mode: str) -> list[tuple[str, int]]:
    """Return what happens in a backward: runs of layers, parameters gathered, and gradients sent."""
    log: list[tuple[str, int]] = []
    net = shard(Recorded.stack(4, log, mode), where, reshard_after_forward=True)

    def noted(event: str, function: Callable[..., Any]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            log.append((event, 0))
            return function(*args, **kwargs)

        return patch.object(dist, function.__name__, run)

    with noted("gathered", dist.all_gather_single), noted("sent", dist.reduce_scatter_single):
        for _ in range(2):
            loss = net(torch.randn(4, FEATURES)).square().sum()
            log.clear()
            loss.backward()
    assert ("gathered", 0) in log
    assert ("sent", 0) in log
    return log


def gathers_no_more_often(where: str) -> None:
    def check(mode: str, rank: int) -> None:
        stored, log = recorded(where, "store"), recorded(where, mode)
        assert [e for e in log if e[0] != "run"] == [e for e in stored if e[0] != "run"]

    check.__name__ = f"fsdp_{where}_gathers_no_more_often"
    CHECKS.modes(check)


@CHECKS.modes
def fsdp_overlaps(mode: str, rank: int) -> None:
    """Layer i's gradients are the i-th from the end to be sent."""
    log = recorded("layers", mode)
    places = [n for n, event in enumerate(log) if event[0] == "sent"]
    assert len(places) == 4
    for i, place in enumerate(reversed(places)):
        log[place] = ("sent", i)
    assert_overlaps(log, mode, 4)


def saves(where: str, loss: Loss, policy: MixedPrecisionPolicy = FULL) -> None:
    def wrap(net: nn.Module) -> nn.Module:
        shard(net if policy is FULL else net.float(), where, policy, reshard_after_forward=True)
        for module in (net, *net):
            register_fsdp_forward_method(module, "forward_and_log_det")
        return net

    def check(mode: str, rank: int) -> None:
        assert_saves(loss, wrap, mode)

    check.__name__ = f"fsdp_{where}_saves_{loss.__name__}"
    CHECKS.modes(check)


@CHECKS.each("stack")
def fsdp_under_no_grad_between(case: Case, rank: int) -> None:
    def step(net: nn.Module, x: Tensor, r: int) -> Tensor:
        with torch.no_grad():
            z = net(x)
        return (net(x.sigmoid()) * z).sum()

    compare_sharded(case, step, rank)


@CHECKS.each("stack")
def fsdp_optimizer_step_before_backward_is_an_error(case: Case, rank: int) -> None:
    net, x = shard(case.net, "subnets"), batches(case)
    if case.subject.mode == "store":
        return  # there FSDP gathers the new parameters, as it does for a plain net
    loss = net(x[rank]).square().sum()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    try:
        loss.backward()
    except RuntimeError as error:
        if "Coupling" not in f"{error} {getattr(error, '__notes__', '')}":
            raise
        return
    raise AssertionError("parameters were changed between forward and backward, and nothing was said")


@CHECKS.each("stack", "streams")
def distributed_tensors(case: Case, rank: int) -> None:
    """Weights and activations that are DTensors outside FSDP; what changes them is noticed as in a plain net."""
    mesh = init_device_mesh("cpu", (WORLD,))
    x = distribute_tensor(batches(case)[0], mesh, [Shard(0)])
    expected = torch.autograd.grad(case.plain(x.full_tensor().sigmoid()).square().sum(), [*case.plain.parameters()])
    net = distribute_module(case.net, mesh)
    for _ in range(2):
        grads = torch.autograd.grad(net(x.sigmoid()).square().sum(), [*net.parameters()])
        assert_near([full(g) for g in grads], [*expected])
    loss = net(x.sigmoid()).square().sum()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError):
        loss.backward()


def fsdp1(net: nn.Module, original: bool = False) -> nn.Module:
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=original)


@CHECKS.each("stack")
def fsdp1_of_layers_and_the_root(case: Case, rank: int) -> None:
    """The second step's gradients of the inputs show what the first made of the weights."""
    net = fsdp1(nn.Sequential(*map(fsdp1, case.net)))
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (net, case.plain)]
    for _ in range(2):
        x, inputs = batches(case)[rank].requires_grad_(), [b.requires_grad_() for b in batches(case)]
        net(x).square().sum().backward()
        (sum(case.plain(b).square().sum() for b in inputs) / WORLD).backward()
        assert_near((x.grad / WORLD,), (inputs[rank].grad,))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@CHECKS.each("sequential", modes=("invert", "recompute"))
def fsdp1_otherwise_is_refused(case: Case, rank: int) -> None:
    x = batches(case)[rank]
    with pytest.raises(RuntimeError, match="Use fully_shard for FullyShardedDataParallel"):
        fsdp1(copy.deepcopy(case.net), original=True)(x).square().sum().backward()
    for layer in layers_of(case.net):
        layer.f = fsdp1(layer.f)
    with pytest.raises(RuntimeError, match="got a change of '_flat_param'"):
        fsdp1(case.net)(x).square().sum().backward()


for _where in ("root", "layers", "subnets", "linears"):
    for _reshard in (True, False):
        fsdp(_where, _reshard)
for _where in ("root", "layers", "subnets"):
    gathers_no_more_often(_where)
    saves(_where, by_square)
    saves(_where, by_log_det)
    saves(_where, in_mixed_precision, BFLOAT16)
    in_bfloat16(_where)
    for _loss in (by_log_det, by_log_det_of_inverse, by_samples):
        registered(_where, _loss)
CHECKS["fsdp_output_dtype_of_each_layer_parts_them"] = fsdp_output_dtype_of_each_layer_parts_them
