"""What the checks of distributed training share: full-batch references, and the cases."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import invzoo as iz
from invzoo.testing.memory import track_memory
from tests.reference import BATCH, FEATURES, MODES, Case, assert_near, make

__all__ = [
    "FORMS",
    "WORLD",
    "Recorded",
    "Suite",
    "WithLogDet",
    "assert_overlaps",
    "assert_saves",
    "batches",
    "check_training",
    "full",
    "layers_of",
    "reference",
    "train",
]

WORLD = 2
FORMS = ("affine", "sequential", "stack", "streams")


def batches(case: Case) -> Tensor:
    return torch.randn(WORLD, BATCH, FEATURES, generator=torch.Generator().manual_seed(5))


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
    assert_near(grads, expected_grads, rtol)
    assert_near(values, expected, rtol)


class Suite(dict[str, Callable[..., None]]):
    """Checks by name."""

    def modes(self, check: Callable[[str, int], None], name: str = "", modes: tuple[str, ...] = MODES) -> None:
        """Add a check of a mode for each of them."""
        self.update({f"{name or check.__name__}-{mode}": partial(check, mode) for mode in modes})

    def each(self, *forms: str, modes: tuple[str, ...] = MODES) -> Callable[[Callable[[Case, int], None]], None]:
        """Add a check of one case for some kinds of nets, or for all, in each mode."""

        def add(check: Callable[[Case, int], None]) -> None:
            def run(form: str, mode: str, rank: int) -> None:
                check(make(form, mode=mode), rank)

            for form in forms or FORMS:
                self.modes(partial(run, form), f"{check.__name__}-{form}", modes)

        return add


def layers_of(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if hasattr(m, "f")]  # of a plain net too


class WithLogDet(nn.Module):
    """A net whose forward returns the log-determinant too, for those who watch no other method."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.forward_and_log_det(x)


class Recorded(nn.Linear):
    """Notes each of its runs in a log, in forward and in replays alike."""

    log: list[tuple[str, int]]
    layer: int

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(("run", self.layer))
        return super().forward(x)

    @classmethod
    def stack(cls, depth: int, log: list[tuple[str, int]], mode: str) -> iz.InvertibleSequential:
        net = iz.InvertibleSequential(*(iz.AdditiveCoupling(cls(3, 3), cls(3, 3)) for _ in range(depth)))
        for i, layer in enumerate(net):
            layer.f.log = layer.g.log = log
            layer.f.layer = layer.g.layer = i
        net.mode = mode
        return net


def assert_overlaps(log: list[tuple[str, int]], mode: str, depth: int) -> None:
    """Each layer's gradients leave before any earlier layer is replayed (the last layer first)."""
    sent = [log.index(("sent", i)) for i in range(depth)]
    assert sent == sorted(sent, reverse=True)
    if mode == "store":
        assert ("run", 0) not in log
        return
    for i in range(1, depth):
        last = max(n for n, event in enumerate(log) if event == ("sent", i))
        assert last < log.index(("run", i - 1)), log


def assert_saves(step: Callable[[Any, Tensor], Tensor | None], wrap: Callable[[nn.Module], Any], mode: str) -> None:
    """What forward holds and the peak of a step grow with depth in `store`, less in `recompute`, not in `invert`.

    A step returns its loss; one that is nothing but a whole step, backward too, returns None.
    """

    def growth(mode: str) -> list[int]:
        found = []
        for depth in (2, 5):
            nets = [nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2 * depth)]
            net = iz.InvertibleSequential(*map(iz.AdditiveCoupling, nets[::2], nets[1::2]))
            net.mode = mode
            wrapped, x = wrap(net), torch.randn(1024, 4)
            measure(wrapped, x)  # a first step checks more
            found.append(measure(wrapped, x))
        return [deep - shallow for shallow, deep in zip(*found)]

    def measure(wrapped: Any, x: Tensor) -> list[int]:
        with track_memory() as memory:
            if (loss := step(wrapped, x)) is None:
                return [memory.peak]
            held = memory.current
            loss.backward()
        return [held, memory.peak]

    limit = {"store": 1.01, "recompute": 0.5, "invert": 0.05}[mode]
    for grown, stored in zip(growth(mode), growth("store")):
        assert grown < limit * stored
