"""Checks of DDP, which two processes run."""

import copy
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import invzoo as iz
from tests.composition.workers import (
    WORLD,
    Recorded,
    Suite,
    WithLogDet,
    assert_overlaps,
    assert_saves,
    batches,
    check_training,
    reference,
    train,
)
from tests.reference import FEATURES, Called, Case, assert_near, make, mlp

__all__ = ["CHECKS"]

CHECKS = Suite()


@CHECKS.each()
def ddp_plain(case: Case, rank: int) -> None:
    check_training(case, DistributedDataParallel(case.net), rank)


@CHECKS.each("streams")
def ddp_small_buckets(case: Case, rank: int) -> None:
    check_training(case, DistributedDataParallel(case.net, bucket_cap_mb=1e-5, gradient_as_bucket_view=True), rank)


@CHECKS.each("stack", "streams")
def ddp_static_graph(case: Case, rank: int) -> None:
    check_training(case, DistributedDataParallel(case.net, static_graph=True), rank)


@CHECKS.each("stack", "streams")
def ddp_find_unused_parameters(case: Case, rank: int) -> None:
    nets = nn.ModuleList([case.net, nn.Linear(2, 2)])
    wrapped = DistributedDataParallel(Called(nets, lambda nets, x: nets[0](x)), find_unused_parameters=True)
    grads, _ = train(wrapped, batches(case), rank)
    assert_near(grads[:-2], reference(case.plain, batches(case))[0])


@CHECKS.each("stack", "streams")
def ddp_some_layers_unused_in_one_process(case: Case, rank: int) -> None:
    """The loss of process 1 sees half of the output only, which reaches only some subnets."""

    def loss(net: nn.Module, x: Tensor, r: int) -> Tensor:
        y = net(x[r].sigmoid())
        return (y if r == 0 else y[:, : FEATURES // 2]).sin().square().sum()

    wrapped, x = DistributedDataParallel(case.net, find_unused_parameters=True), batches(case)
    loss(wrapped, x, rank).backward()
    sum(loss(case.plain, x, r) for r in range(WORLD)).div(WORLD).backward()
    assert_near([p.grad for p in case.net.parameters()], [p.grad for p in case.plain.parameters()])


@CHECKS.each("stack", "streams")
def ddp_no_sync(case: Case, rank: int) -> None:
    wrapped, x = DistributedDataParallel(case.net), batches(case)
    with wrapped.no_sync():
        wrapped(x[rank].sigmoid()).square().sum().backward()
        wrapped(x[rank].cos()).square().sum().backward()
    wrapped(x[rank].exp()).square().sum().backward()
    for f in (torch.sigmoid, torch.cos, torch.exp):
        case.plain(f(x.flatten(0, 1))).square().sum().div(WORLD).backward()
    assert_near([p.grad for p in case.net.parameters()], [p.grad for p in case.plain.parameters()])


@CHECKS.each("stack")
def ddp_two_forwards(case: Case, rank: int) -> None:
    wrapped, x = DistributedDataParallel(case.net, static_graph=True), batches(case)
    for _ in range(2):
        case.net.zero_grad()
        case.plain.zero_grad()
        (wrapped(x[rank].sigmoid()) * wrapped(x[rank].cos())).sum().backward()
        y = x.flatten(0, 1)
        (case.plain(y.sigmoid()) * case.plain(y.cos())).sum().div(WORLD).backward()
        assert_near([p.grad for p in case.net.parameters()], [p.grad for p in case.plain.parameters()])


@CHECKS.each("stack")
def ddp_checkpointed(case: Case, rank: int) -> None:
    checkpointed = Called(case.net, partial(checkpoint, use_reentrant=False))
    check_training(case, DistributedDataParallel(checkpointed), rank)


@CHECKS.each("streams", "stack")
def ddp_with_synchronised_buffers(case: Case, rank: int) -> None:
    """BatchNorm's statistics are broadcast in place before every forward, and moved by it."""
    made = make(case.subject.form, lambda *sizes: mlp(*sizes, nn.BatchNorm1d(5)))
    with iz.mode(made.net, case.subject.mode):
        ours, theirs = DistributedDataParallel(made.net), DistributedDataParallel(made.plain)
        for x in (batches(case), batches(case).cos()):
            ours(x[rank]).square().sum().backward()
            theirs(x[rank]).square().sum().backward()
        assert_near([p.grad for p in made.net.parameters()], [p.grad for p in made.plain.parameters()])
        assert_near([b.double() for b in made.net.buffers()], [b.double() for b in made.plain.buffers()])


@CHECKS.each("affine", "stack")
def ddp_log_det(case: Case, rank: int) -> None:
    """DDP watches forward alone: a module whose forward is `forward_and_log_det` is what it wraps."""
    wrapped, x = DistributedDataParallel(WithLogDet(case.net)), batches(case)
    alone = copy.deepcopy(case.net)
    for _ in range(2):
        for net, inputs in ((wrapped, x[rank]), (alone.forward_and_log_det, x.flatten(0, 1))):
            z, log_det = net(inputs.sigmoid())
            (z.square().mean() - log_det.mean()).backward()
        assert_near([p.grad for p in case.net.parameters()], [p.grad for p in alone.parameters()])


def ddp_overlaps(mode: str, rank: int, log_det: bool = False, **options: bool) -> None:
    log: list[tuple[str, int]] = []
    net = Recorded.stack(4, log, mode)
    owners = {p: i for i, layer in enumerate(net) for p in layer.parameters()}

    def send(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        log.extend(("sent", owners[p]) for p in bucket.parameters())
        work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped = DistributedDataParallel(WithLogDet(net) if log_det else net, bucket_cap_mb=1e-6, **options)
    wrapped.register_comm_hook(None, send)
    for _ in range(3):  # DDP needs a step or two to learn the order; a static graph is sent as a whole until then
        y = wrapped(torch.randn(4, FEATURES))
        loss = (y[0] if log_det else y).square().sum()
        log.clear()
        loss.backward()
    assert_overlaps(log, mode, 4)


for _name, _options in {
    "ddp_overlaps": {},
    "ddp_overlaps_with_a_log_det": {"log_det": True},
    "ddp_overlaps_in_a_static_graph": {"static_graph": True},
    "ddp_overlaps_as_it_finds_unused_parameters": {"find_unused_parameters": True},
}.items():
    CHECKS.modes(partial(ddp_overlaps, **_options), _name)


@CHECKS.modes
def ddp_sends_nothing_under_no_sync(mode: str, rank: int) -> None:
    log: list[tuple[str, int]] = []
    wrapped = DistributedDataParallel(Recorded.stack(2, log, mode))
    x = torch.randn(4, FEATURES) * (1 + rank)  # other gradients in each process
    with wrapped.no_sync():
        wrapped(x).square().sum().backward()
    others = [torch.empty_like(g) for g in [next(wrapped.parameters()).grad] * WORLD]
    dist.all_gather(others, next(wrapped.parameters()).grad)
    assert not torch.equal(*others)


@CHECKS.modes
def ddp_saves(mode: str, rank: int) -> None:
    assert_saves(
        lambda net, x: net(x).square().mean(),
        lambda net: DistributedDataParallel(net, gradient_as_bucket_view=True),
        mode,
    )


@CHECKS.modes
def ddp_saves_with_a_log_det(mode: str, rank: int) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        z, log_det = net(x)
        return z.square().mean() - log_det.mean()

    assert_saves(loss, lambda net: DistributedDataParallel(WithLogDet(net)), mode)
