"""What the processes of a distributed test run; each check raises in its process, and the parent reports it."""

import copy
import datetime as dt
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import invzoo as iz
from tests.composition.cases import BATCH, BUILDERS, MODES, WIDTH, Case, assert_same, make, subnet

__all__ = ["DDP_CHECKS", "FSDP_CHECKS", "WORLD", "serve"]

WORLD = 2


def serve(rank: int, store: str, suite: str, answers: Any) -> None:
    """Run all checks of a suite in one of the processes, and send what went wrong to the parent."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    failures: dict[str, str] = {}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=dt.timedelta(seconds=30)
    )
    for name, check in {"ddp": DDP_CHECKS, "fsdp": FSDP_CHECKS}[suite].items():
        torch.manual_seed(0)
        try:
            check(rank)
        except Exception:  # noqa: BLE001 - whatever it is, the parent raises it
            failures[name] = traceback.format_exc()
        # A check that fails in one process may leave the other waiting: both agree to go on, or both stop.
        failed = torch.tensor(float(name in failures))
        try:
            dist.all_reduce(failed)
        except RuntimeError:
            failures.setdefault(name, traceback.format_exc())
            break
    answers.put((rank, failures))
    dist.destroy_process_group()


def batches(case: Case) -> Tensor:
    return torch.randn(WORLD, BATCH, WIDTH, generator=torch.Generator().manual_seed(5))


def full(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference(plain: nn.Module, x: Tensor, steps: int = 2, lr: float = 0.1) -> tuple[list[Tensor], list[Tensor]]:
    """Train on the full batch in one process; return the first step's gradients and the last parameters."""
    plain, grads = copy.deepcopy(plain), []
    optimizer = torch.optim.SGD(plain.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        plain(x.flatten(0, 1).sigmoid()).sin().square().mean().backward()
        grads = grads or [None if p.grad is None else p.grad.clone() for p in plain.parameters()]
        optimizer.step()
    return grads, [p.detach() for p in plain.parameters()]


def train(net: nn.Module, x: Tensor, rank: int, steps: int = 2, lr: float = 0.1) -> tuple[list[Any], list[Any]]:
    grads: list[Any] = []
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x[rank].sigmoid()).sin().square().mean().backward()
        found = [None if p.grad is None else full(p.grad).clone() for p in net.parameters()]
        grads = grads or found
        optimizer.step()
    return grads, [full(p.detach()) for p in net.parameters()]


def check_training(case: Case, wrapped: nn.Module, rank: int, rtol: float = 1e-9) -> None:
    x = batches(case)
    expected_grads, expected = reference(case.plain, x)
    grads, values = train(wrapped, x, rank)
    assert_same(grads, expected_grads, rtol)
    assert_same(values, expected, rtol)


def each(modes: tuple[str, ...] = MODES, names: tuple[str, ...] = (*BUILDERS,)) -> Callable[[Callable], Callable]:
    """Turn a check of one case into checks of all kinds of nets in all modes."""

    def decorate(check: Callable[[Case, int], None]) -> dict[str, Callable[[int], None]]:
        def run(name: str, mode: str, rank: int) -> None:
            case = make(name)
            with iz.mode(case.net, mode):
                check(case, rank)

        return {
            f"{check.__name__}-{name}-{mode}": (lambda rank, n=name, m=mode: run(n, m, rank))
            for name in names
            for mode in modes
        }

    return decorate


# ---- DDP ------------------------------------------------------------------------------------------------------------


@each()
def ddp_plain(case: Case, rank: int) -> None:
    check_training(case, DistributedDataParallel(case.net), rank)


@each(names=("streams",))
def ddp_small_buckets(case: Case, rank: int) -> None:
    check_training(case, DistributedDataParallel(case.net, bucket_cap_mb=1e-5, gradient_as_bucket_view=True), rank)


@each(names=("invertible_sequential", "streams"))
def ddp_static_graph(case: Case, rank: int) -> None:
    check_training(case, DistributedDataParallel(case.net, static_graph=True), rank)


class Unused(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.unused = net, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@each(names=("invertible_sequential", "streams"))
def ddp_find_unused_parameters(case: Case, rank: int) -> None:
    wrapped = DistributedDataParallel(Unused(case.net), find_unused_parameters=True)
    case.plain = Unused(case.plain)
    x = batches(case)
    expected, _ = reference(case.plain.net, x)
    grads, _ = train(wrapped, x, rank)
    assert_same(grads[:-2], expected)


@each(names=("invertible_sequential", "streams"))
def ddp_some_layers_unused_in_one_process(case: Case, rank: int) -> None:
    """The loss of process 1 sees half of the output only, which reaches only some subnets."""

    def loss(net: nn.Module, x: Tensor, r: int) -> Tensor:
        y = net(x[r].sigmoid())
        return (y if r == 0 else y[:, : WIDTH // 2]).sin().square().sum()

    wrapped, x = DistributedDataParallel(case.net, find_unused_parameters=True), batches(case)
    loss(wrapped, x, rank).backward()
    sum(loss(case.plain, x, r) for r in range(WORLD)).div(WORLD).backward()
    assert_same([p.grad for p in case.net.parameters()], [p.grad for p in case.plain.parameters()])


@each(names=("invertible_sequential", "streams"))
def ddp_no_sync(case: Case, rank: int) -> None:
    wrapped, x = DistributedDataParallel(case.net), batches(case)
    with wrapped.no_sync():
        wrapped(x[rank].sigmoid()).square().sum().backward()
        wrapped(x[rank].cos()).square().sum().backward()
    wrapped(x[rank].exp()).square().sum().backward()
    for f in (torch.sigmoid, torch.cos, torch.exp):
        case.plain(f(x.flatten(0, 1))).square().sum().div(WORLD).backward()
    assert_same([p.grad for p in case.net.parameters()], [p.grad for p in case.plain.parameters()])


@each(names=("invertible_sequential",))
def ddp_two_forwards(case: Case, rank: int) -> None:
    wrapped, x = DistributedDataParallel(case.net, static_graph=True), batches(case)
    for _ in range(2):
        case.net.zero_grad()
        case.plain.zero_grad()
        (wrapped(x[rank].sigmoid()) * wrapped(x[rank].cos())).sum().backward()
        y = x.flatten(0, 1)
        (case.plain(y.sigmoid()) * case.plain(y.cos())).sum().div(WORLD).backward()
        assert_same([p.grad for p in case.net.parameters()], [p.grad for p in case.plain.parameters()])


@each(names=("invertible_sequential",))
def ddp_checkpointed(case: Case, rank: int) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    check_training(case, DistributedDataParallel(Checkpointed(case.net)), rank)


@each(names=("streams", "invertible_sequential"))
def ddp_with_synchronised_buffers(case: Case, rank: int) -> None:
    """BatchNorm's statistics are broadcast in place before every forward, and moved by it."""
    made = make(case.name, lambda n: subnet(n, middle=nn.BatchNorm1d(5)))
    with iz.mode(made.net, case.net[0].mode if isinstance(case.net, nn.Sequential) else case.net.layers[0].mode):
        ours, theirs = DistributedDataParallel(made.net), DistributedDataParallel(made.plain)
        for x in (batches(case), batches(case).cos()):
            ours(x[rank]).square().sum().backward()
            theirs(x[rank]).square().sum().backward()
        assert_same([p.grad for p in made.net.parameters()], [p.grad for p in made.plain.parameters()])
        assert_same([b.double() for b in made.net.buffers()], [b.double() for b in made.plain.buffers()])


DDP_CHECKS: dict[str, Callable[[int], None]] = {
    **ddp_plain,
    **ddp_small_buckets,
    **ddp_static_graph,
    **ddp_find_unused_parameters,
    **ddp_some_layers_unused_in_one_process,
    **ddp_no_sync,
    **ddp_two_forwards,
    **ddp_checkpointed,
    **ddp_with_synchronised_buffers,
}


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


def layers_of(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, iz.AdditiveCoupling | iz.AffineCoupling)]


def shard(net: nn.Module, where: str, **options: Any) -> nn.Module:
    options = {"mesh": init_device_mesh("cpu", (WORLD,)), **options}
    if where == "layers":
        parts = [m for m in layers_of(net) if m is not net]
    elif where == "subnets":
        parts = [n for m in layers_of(net) for n in (m.f, m.g)]
    elif where == "linears":
        parts = [m for m in net.modules() if isinstance(m, nn.Linear)]
    else:
        parts = []
    for part in parts:
        fully_shard(part, **options)
    return fully_shard(net, **options)


def fsdp(where: str, reshard: bool) -> dict[str, Callable[[int], None]]:
    def check(case: Case, rank: int) -> None:
        check_training(case, shard(case.net, where, reshard_after_forward=reshard), rank)

    check.__name__ = f"fsdp_{where}_{'reshard' if reshard else 'keep'}"
    return each(names=(*BUILDERS,) if reshard else ("invertible_sequential",))(check)


def compare_sharded(case: Case, step: Callable[[nn.Module, Tensor, int], Tensor], rank: int, **options: Any) -> None:
    """Compare a loss under FSDP of every subnet with the mean of the losses of all processes."""
    net, x = shard(case.net, "subnets", **options), batches(case)
    for _ in range(2):
        net.zero_grad()
        case.plain.zero_grad()
        step(net, x[rank], rank).backward()
        sum(step(case.plain, x[r], r) for r in range(WORLD)).div(WORLD).backward()
        assert_same([full(p.grad) for p in net.parameters()], [p.grad for p in case.plain.parameters()])


@each(names=("invertible_sequential", "streams"))
def fsdp_loss_sees_half_of_the_output(case: Case, rank: int) -> None:
    compare_sharded(case, lambda net, x, r: net(x.sigmoid())[:, : WIDTH // 2].square().sum(), rank)


@each(names=("sequential",))
def fsdp_loss_sees_an_intermediate_output_alone(case: Case, rank: int) -> None:
    """What came after must be inverted, although no gradient passes it, with parameters that are sharded again."""

    def step(net: nn.Module, x: Tensor, r: int) -> Tensor:
        middle = net[0](x.sigmoid())
        y = net[1](middle)
        return middle.sin().square().sum() + y.detach().sum()

    for where in ("layers", "subnets", "linears"):
        made = make("sequential")
        with iz.mode(made.net, case.net[0].mode):
            net, x = made.net, batches(case)
            for layer in net:
                shard(layer, where)
            step(net, x[rank], rank).backward()
            sum(step(made.plain, x[r], r) for r in range(WORLD)).div(WORLD).backward()
            assert_same([full(p.grad) for p in net[0].parameters()], [p.grad for p in made.plain[0].parameters()])


@each(names=("sequential", "streams"))
def fsdp_input_needs_grad(case: Case, rank: int) -> None:
    net, x = shard(case.net, "subnets"), batches(case)[rank]
    v, w = x.clone().requires_grad_(), x.clone().requires_grad_()
    net(v.sigmoid()).square().sum().backward()
    case.plain(w.sigmoid()).square().sum().backward()
    assert_same([v.grad], [w.grad])


@each(names=("invertible_sequential", "streams"))
def fsdp_two_micro_batches(case: Case, rank: int) -> None:
    net, x = shard(case.net, "subnets"), batches(case)
    for last in (False, True):
        net.set_requires_gradient_sync(last)
        net((x[rank] * (1 + last)).sigmoid()).square().sum().backward()
        case.plain((x.flatten(0, 1) * (1 + last)).sigmoid()).square().sum().div(WORLD).backward()
    assert_same([full(p.grad) for p in net.parameters()], [p.grad for p in case.plain.parameters()])


@each(names=("invertible_sequential",))
def fsdp_two_forwards(case: Case, rank: int) -> None:
    compare_sharded(case, lambda net, x, r: (net(x.sigmoid()) * net(x.cos())).sum(), rank)


@each(names=("invertible_sequential",))
def fsdp_frozen_subnets(case: Case, rank: int) -> None:
    for net in (case.net, case.plain):
        for layer in net:
            layer.g.requires_grad_(False)
    check_training(case, shard(case.net, "subnets"), rank)


@each(names=("invertible_sequential",))
def fsdp_checkpointed(case: Case, rank: int) -> None:
    net = shard(case.net, "subnets")
    checkpoint(net, batches(case)[rank].sigmoid(), use_reentrant=False).sin().square().mean().backward()
    expected, _ = reference(case.plain, batches(case), steps=1)
    assert_same([full(p.grad) for p in net.parameters()], expected)


@each(names=("invertible_sequential", "streams"))
def fsdp_in_bfloat16(case: Case, rank: int) -> None:
    """FSDP casts the parameters and the inputs of subnets; a plain net under FSDP is what this compares with."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float64)
    x, grads = batches(case), []
    for net in (case.net, case.plain):
        for m in net.modules():
            if hasattr(m, "f"):
                for part in (m.f, m.g):
                    fully_shard(part, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
        net(x[rank].sigmoid()).square().sum().backward()
        grads.append([full(p.grad) for p in net.parameters()])
    assert_same(*grads, rtol=1e-3)


@each(names=("invertible_sequential",))
def fsdp_under_no_grad_between(case: Case, rank: int) -> None:
    def step(net: nn.Module, x: Tensor, r: int) -> Tensor:
        with torch.no_grad():
            z = net(x)
        return (net(x.sigmoid()) * z).sum()

    compare_sharded(case, step, rank)


@each(names=("invertible_sequential",))
def fsdp_optimizer_step_before_backward_is_an_error(case: Case, rank: int) -> None:
    net, x = shard(case.net, "subnets"), batches(case)
    if layers_of(net)[0].mode == "store":
        return  # there FSDP gathers the new parameters, as it does for a plain net
    loss = net(x[rank]).square().sum()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    try:
        loss.backward()
    except RuntimeError as error:
        if "AdditiveCoupling" not in f"{error} {getattr(error, '__notes__', '')}":
            raise
        return
    raise AssertionError("parameters were changed between forward and backward, and nothing was said")


FSDP_CHECKS: dict[str, Callable[[int], None]] = {}
for _where in ("root", "layers", "subnets", "linears"):
    for _reshard in (True, False):
        FSDP_CHECKS |= fsdp(_where, _reshard)
FSDP_CHECKS |= {
    **fsdp_loss_sees_half_of_the_output,
    **fsdp_loss_sees_an_intermediate_output_alone,
    **fsdp_input_needs_grad,
    **fsdp_two_micro_batches,
    **fsdp_two_forwards,
    **fsdp_frozen_subnets,
    **fsdp_checkpointed,
    **fsdp_in_bfloat16,
    **fsdp_under_no_grad_between,
    **fsdp_optimizer_step_before_backward_is_an_error,
}
