"""Checks of `torch.distributed.pipelining`, which two processes run: each has one half of a stack."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble

import invzoo as iz
from tests.composition.workers import WORLD, Suite, assert_saves
from tests.reference import FEATURES, Case, assert_near, make

__all__ = ["CHECKS"]

CHECKS = Suite()

MICRO_BATCHES = 4


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y.sin() - target).square().mean()


def stage_of(net: nn.Module, index: int, count: int, batch: int = 8, width: int = FEATURES) -> PipelineStage:
    """Make a stage that knows its shapes: torch would try it out on uninitialised memory, which no inverse rebuilds."""
    x = torch.empty(batch // MICRO_BATCHES, width, requires_grad=index > 0)
    y = torch.empty(batch // MICRO_BATCHES, width, requires_grad=True)
    return PipelineStage(net, index, count, torch.device("cpu"), input_args=x, output_args=y)


def run(schedule: Any, rank: int, x: Tensor, target: Tensor) -> None:
    """Run a step: the first process knows the input, the last one the target."""
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=target, losses=[])


def pipeline(make_schedule: Callable[..., Any]) -> None:
    def check(case: Case, rank: int) -> None:
        other = make(case.subject.form)  # the stages are one kind of net twice, with other parameters
        halves = nn.Sequential(case.plain, other.plain)
        mine = (case.net, other.net)[rank]
        with iz.mode(mine, case.subject.mode):
            schedule = make_schedule(stage_of(mine, rank, WORLD), MICRO_BATCHES, loss_fn=loss)
            for _ in range(2):
                halves.zero_grad()
                mine.zero_grad()  # a schedule scales what it finds
                x, target = torch.randn(8, FEATURES), torch.randn(8, FEATURES)
                run(schedule, rank, x, target)
                loss(halves(x), target).backward()
                assert_near([p.grad for p in mine.parameters()], [p.grad for p in halves[rank].parameters()])

    check.__name__ = f"pipeline_{make_schedule.__name__}"
    CHECKS.each()(check)


@CHECKS.each("stack", "streams")
def pipeline_zero_bubble(case: Case, rank: int) -> None:
    """Two stages in each process, whose backwards give gradients to inputs first, and to weights later."""
    cases = [case, *(make(case.subject.form) for _ in range(3))]
    mode = case.subject.mode
    quarters, mine = nn.Sequential(*(c.plain for c in cases)), [cases[rank].net, cases[rank + 2].net]
    with iz.mode(nn.ModuleList(mine), mode):
        stages = [stage_of(net, rank + 2 * i, 4) for i, net in enumerate(mine)]
        schedule = ScheduleInterleavedZeroBubble(stages, MICRO_BATCHES, loss_fn=loss)
        for _ in range(2):
            nn.ModuleList([quarters, *mine]).zero_grad()
            x, target = torch.randn(8, FEATURES), torch.randn(8, FEATURES)
            run(schedule, rank, x, target)
            loss(quarters(x), target).backward()
            for net, plain in zip(mine, (quarters[rank], quarters[rank + 2]), strict=True):
                assert_near([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


@CHECKS.each()
def by_hand(case: Case, rank: int) -> None:
    """The halves of a stack send each other activations and gradients."""
    other = make(case.subject.form)
    x, target = torch.randn(8, FEATURES), torch.randn(8, FEATURES)
    mode = case.subject.mode
    with iz.mode(other.net, mode):
        if rank == 0:
            y = case.net(x)
            dist.send(y.detach(), 1)
            dist.recv(grad := torch.empty_like(y), 1)
            y.backward(grad)
        else:
            dist.recv(received := torch.empty(8, FEATURES), 0)
            loss(other.net(received.requires_grad_()), target).backward()
            dist.send(received.grad, 0)
    loss(other.plain(case.plain(x)), target).backward()
    mine = (case, other)[rank]
    assert_near([p.grad for p in mine.net.parameters()], [p.grad for p in mine.plain.parameters()])


@CHECKS.modes
def pipeline_saves(mode: str, rank: int) -> None:
    def step(schedule: Any, x: Tensor) -> None:
        run(schedule, rank, x, torch.zeros_like(x))

    def wrap(net: nn.Module) -> Any:
        return ScheduleGPipe(stage_of(net, rank, WORLD, 1024, 4), MICRO_BATCHES, loss_fn=loss)

    assert_saves(step, wrap, mode)


for _schedule in (ScheduleGPipe, Schedule1F1B):
    pipeline(_schedule)
