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
from tests.reference import FEATURES, HALF, Case, assert_near, gradients, make, mlp, train_step


def together(*functions: Callable[[], object]) -> list[object]:
    """Run functions in threads that start at once, and return what they return, or raise what they raise."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> object:
        barrier.wait(60)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(120) for future in [pool.submit(run, f) for f in functions]]


def stack(depth: int) -> nn.Module:
    return iz.InvertibleSequential(
        *(iz.AdditiveCoupling(mlp(HALF, 3), mlp(HALF, 3), check="never") for _ in range(depth))
    )


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


def test_backward_in_another_thread(case: Case):
    def step(net: nn.Module) -> list[Tensor | None]:
        net.zero_grad()
        x = case.x.clone().requires_grad_()
        loss = net(x.sigmoid()).square().sum()
        together(loss.backward)
        return gradients(net, x)

    for _ in range(2):
        assert_near(step(case.net), step(case.plain))


def test_double_backward_in_another_thread(case: Case):
    def step(net: nn.Module) -> list[Tensor | None]:
        net.zero_grad()
        x = case.x.clone().requires_grad_()
        loss = net(x.sigmoid()).square().sum()
        ((g,),) = together(lambda: torch.autograd.grad(loss, x, create_graph=True))
        together((loss + g.square().sum()).backward)
        return gradients(net, x)

    for _ in range(2):
        assert_near(step(case.net), step(case.plain))


def test_forward_in_two_threads_and_backward_in_a_third(mode: str):
    case = make("sequential")

    def step(net: nn.Sequential) -> list[Tensor | None]:
        net.zero_grad()
        x = case.x.clone().requires_grad_()
        (middle,) = together(lambda: net[0](x.sigmoid()))
        (y,) = together(lambda: net[1:](middle))
        together(y.square().sum().backward)
        return gradients(net, x)

    with iz.mode(case.net, mode):
        for _ in range(2):
            assert_near(step(case.net), step(case.plain))


def test_one_graph_walked_by_four_threads(case: Case):
    """A graph that is kept may be walked by several threads at once."""
    x = case.x.clone().requires_grad_()
    wanted = [x, *case.net.parameters()]
    expected = torch.autograd.grad(case.plain(x.sigmoid()).square().sum(), [x, *case.plain.parameters()])
    for _ in range(15):
        loss = case.net(x.sigmoid()).square().sum()
        for found in together(*[lambda loss=loss: torch.autograd.grad(loss, wanted, retain_graph=True)] * 4):
            assert_near(found, expected)


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
    trunk, left, right = make("stack"), make("sequential"), make("sequential")

    def step(trunk: nn.Module, left: nn.Module, right: nn.Module) -> list[Tensor | None]:
        x = trunk_x.clone().requires_grad_()
        y = trunk(x.sigmoid())
        losses = [left(y).square().sum(), right(y).sin().sum()]
        wanted = [x, *trunk.parameters()]
        found = together(*(lambda v=v: torch.autograd.grad(v, wanted, retain_graph=True) for v in losses))
        return [t for group in found for t in group]

    trunk_x = trunk.x
    with iz.mode(trunk.net, mode), iz.mode(left.net, mode), iz.mode(right.net, mode):
        for _ in range(15):
            assert_near(step(trunk.net, left.net, right.net), step(trunk.plain, left.plain, right.plain))


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


def test_one_model_shared_by_threads(case: Case):
    """As in lock-free training: the parameters are shared, the graphs are not."""
    x = case.x.clone().requires_grad_()
    wanted = [x, *case.net.parameters()]
    expected = torch.autograd.grad(case.plain(x.sigmoid()).square().sum(), [x, *case.plain.parameters()])

    def train() -> None:
        for _ in range(10):
            assert_near(torch.autograd.grad(case.net(x.sigmoid()).square().sum(), wanted), expected)

    together(train, train, train)


def test_a_shared_model_with_hooks_fires_them_in_every_thread(mode: str):
    """A replay in one thread must not keep hooks or flags from the forward of another."""
    case, count, lock = make("stack"), [0], threading.Lock()

    def hook(*args: object) -> None:
        with lock:
            count[0] += 1

    for layer in case.net:
        layer.f.register_forward_hook(hook)

    def train() -> None:
        for _ in range(20):
            x = case.x.clone().requires_grad_()
            torch.autograd.grad(case.net(x).square().sum(), x)

    with iz.mode(case.net, mode):
        together(train, train)
    assert count[0] == 2 * 20 * len(case.net)


def test_batch_norm_beside_a_thread_that_draws_random_numbers(mode: str):
    """One thread trains with BatchNorm; another draws random numbers: no wrong number, though a replay may refuse."""
    case = make("stack", lambda *sizes: mlp(*sizes, nn.BatchNorm1d(5)))
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(1000)

    def train() -> None:
        try:
            for _ in range(10):
                assert_near(train_step(case.net, case.x), train_step(case.plain, case.x))
        except RuntimeError as error:
            assert "Another thread may have drawn" in str(error)  # noqa: PT017 - once in a while
        finally:
            stop.set()

    with iz.mode(case.net, mode):
        together(train, draw)


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
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(10)

    def train() -> None:
        try:
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
        finally:
            stop.set()

    together(train, draw)
