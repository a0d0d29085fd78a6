"""Threads: models trained side by side, graphs walked elsewhere than they were built, and by several threads."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from invzoo.testing.memory import track_memory
from tests.reference import FEATURES, HALF, Case, assert_near, make, mlp, train_step


def together(*functions: Callable[[], object]) -> list[object]:
    """Run functions in threads that start at once, and return what they return, or raise what they raise."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> object:
        barrier.wait(60)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(120) for future in [pool.submit(run, f) for f in functions]]


def while_another_draws(function: Callable[[], None]) -> None:
    """Run a function beside a thread that draws random numbers."""
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(10)

    def run() -> None:
        try:
            function()
        finally:
            stop.set()

    together(run, draw)


def stack(depth: int) -> nn.Module:
    return iz.InvertibleSequential(*(iz.AdditiveCoupling(mlp(HALF, HALF), check="never") for _ in range(depth)))


def test_two_threads_train_two_models(case: Case):
    other = make(case.subject.form)

    def train(case: Case) -> None:
        for _ in range(10):
            assert_near(train_step(case.net, case.x), train_step(case.plain, case.x))

    together(lambda: train(case), lambda: train(other))


def test_two_threads_keep_their_full_saving():
    x = torch.randn(64, FEATURES)
    stack(2)(x).sum().backward()

    def held(depth: int, meet: Callable[[], object]) -> tuple[int, int]:
        net = stack(depth)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        with track_memory() as memory:
            meet()
            y = net(x)
            current = memory.current
            meet()
            memory.reset_peak()
            y.sum().backward()
            meet()
        return current, memory.peak

    barrier = threading.Barrier(2)
    alone = held(4, lambda: None)
    assert alone[0] == x.nbytes
    assert together(lambda: held(6, barrier.wait), lambda: held(10, barrier.wait)) == [alone, alone]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x.sigmoid()).square().sum()


def backward_in_another(net: nn.Module, x: Tensor) -> None:
    together(loss_of(net, x).backward)


def double_backward_in_another(net: nn.Module, x: Tensor) -> None:
    loss = loss_of(net, x)
    ((g,),) = together(lambda: torch.autograd.grad(loss, x, create_graph=True))
    together((loss + g.square().sum()).backward)


def forward_in_two_and_backward_in_a_third(net: nn.Module, x: Tensor) -> None:
    (middle,) = together(lambda: net(x.sigmoid()))
    (y,) = together(lambda: net(middle))
    together(y.square().sum().backward)


def one_graph_walked_by_four(net: nn.Module, x: Tensor) -> list[object]:
    """A graph that is kept may be walked by several threads at once."""
    wanted, found = [x, *net.parameters()], []
    for _ in range(8):
        loss = loss_of(net, x)
        found += together(*[lambda loss=loss: torch.autograd.grad(loss, wanted, retain_graph=True)] * 4)
    return found


def one_model_shared(net: nn.Module, x: Tensor) -> list[object]:
    """As in lock-free training: the parameters are shared, the graphs are not."""

    def train() -> list[object]:
        return [torch.autograd.grad(loss_of(net, x), [x, *net.parameters()]) for _ in range(5)]

    return together(train, train, train)


@pytest.mark.parametrize(
    "program",
    [
        backward_in_another,
        double_backward_in_another,
        forward_in_two_and_backward_in_a_third,
        one_graph_walked_by_four,
        one_model_shared,
    ],
)
def test_threads_do_what_one_does(case: Case, program: Callable[[nn.Module, Tensor], object]):
    def watched(net: nn.Module) -> object:
        x = case.x.clone().requires_grad_()
        return program(net, x), x.grad

    case.holds(watched)


def test_saved_tensors_looked_at_by_four_threads(case: Case):
    """Unpacking in several threads outside a backward."""

    def nodes(tensor: Tensor) -> list[object]:
        found, todo = [], [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in found:
                found.append(node)
                todo += [n for n, _ in node.next_functions]
        return found

    def saved(tensor: Tensor) -> list[Tensor]:
        names = [(n, a) for n in nodes(tensor) for a in sorted(dir(n)) if a.startswith("_saved_")]
        values = [getattr(n, a) for n, a in names]
        return [v.detach() for v in values if isinstance(v, Tensor)]

    x = case.x.clone().requires_grad_()
    for _ in range(5):
        y = case.net(x.sigmoid())
        alone = saved(y)
        assert alone
        for found in together(*[lambda y=y: saved(y)] * 4):
            assert_near(found, alone)


def test_two_heads_of_one_trunk_walked_by_two_threads(mode: str):
    cases = [make(form, mode=mode) for form in ("stack", "sequential", "sequential")]
    both = Case(nn.ModuleList(c.net for c in cases), nn.ModuleList(c.plain for c in cases), cases[0].x)
    x = both.x.clone().requires_grad_()

    def program(nets: nn.ModuleList) -> list[object]:
        y = nets[0](x.sigmoid())
        losses = [nets[1](y).square().sum(), nets[2](y).sin().sum()]
        wanted = [x, *nets[0].parameters()]
        return together(*(lambda v=v: torch.autograd.grad(v, wanted, retain_graph=True) for v in losses))

    for _ in range(8):
        both.holds(program)


def test_one_thread_at_a_time_rebuilds_a_chain():
    inside, most = [], []

    def inverse(y: Tensor) -> Tensor:
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return y.log()

    def exp(x: Tensor) -> Tensor:
        return iz.checkpoint(torch.exp, x, inverse=inverse)

    last = exp(exp(torch.randn(3, requires_grad=True))).grad_fn
    together(lambda: last._saved_result, lambda: last.next_functions[0][0]._saved_result)
    assert max(most) == 1


def test_a_shared_model_with_hooks_fires_them_in_every_thread(mode: str):
    """A replay in one thread must not keep hooks or flags from the forward of another."""
    case, count, lock = make("stack", mode=mode), [0], threading.Lock()

    def hook(*args: object) -> None:
        with lock:
            count[0] += 1

    for layer in case.net:
        layer.f.register_forward_hook(hook)

    def train() -> None:
        for _ in range(20):
            x = case.x.clone().requires_grad_()
            torch.autograd.grad(case.net(x).square().sum(), x)

    together(train, train)
    assert count[0] == 2 * 20 * len(case.net)


def test_batch_norm_beside_a_thread_that_draws_random_numbers(mode: str):
    """One thread trains with BatchNorm; another draws random numbers: no wrong number, though a replay may refuse."""
    case = make("stack", lambda *sizes: mlp(*sizes, nn.BatchNorm1d(5)), mode)

    def train() -> None:
        try:
            for _ in range(10):
                assert_near(train_step(case.net, case.x), train_step(case.plain, case.x))
        except RuntimeError as error:
            assert "Another thread may have drawn" in str(error)  # noqa: PT017 - once in a while

    while_another_draws(train)


class Recorded(nn.Module):
    """Dropout that remembers the masks of its first calls, so that a plain net can be given the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones_like(x), 0.5)
        self.masks.append(mask.detach())
        return x * mask


@pytest.mark.parametrize("how", ["recompute", "invert"])
def test_random_numbers_drawn_by_another_thread_never_make_a_wrong_gradient(how: str):
    """The generator is shared by all threads: the replay draws the forward's numbers, or says that it cannot."""
    masks: list[Recorded] = []

    def net_of(*sizes: int) -> nn.Module:
        masks.append(Recorded())
        return mlp(*sizes, masks[-1], hidden=200)

    net = iz.InvertibleSequential(*(iz.AdditiveCoupling(net_of(3, 3), net_of(3, 3), check="never") for _ in range(3)))
    net.mode = how

    def train() -> None:
        for _ in range(60):
            for mask in masks:
                mask.masks.clear()
            y = net(torch.randn(256, FEATURES))
            try:
                y.square().sum().backward()
            except RuntimeError as error:
                assert "random" in str(error) or "thread" in str(error)  # noqa: PT017 - either is right
                continue
            for mask in masks:
                assert_near(mask.masks[1:], mask.masks[:1] * (len(mask.masks) - 1))

    while_another_draws(train)
