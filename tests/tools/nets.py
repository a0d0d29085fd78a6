"""A net with an invertible trunk, something to learn, and what each trainer must show: it learns, agrees and saves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import invzoo as iz
from invzoo.testing.memory import track_memory

__all__ = ["BATCH", "Net", "assert_learns_and_saves", "examples"]

BATCH, FEATURES, WIDTH = 256, 6, 16


def subnet() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH // 2, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))


class Net(nn.Module):
    """Regression with couplings between two plain layers; nothing in it knows who trains it."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 1)
        self.trunk = iz.InvertibleSequential(*(iz.AffineCoupling(subnet(), swap=bool(i % 2)) for i in range(depth)))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.head(self.trunk(self.encoder(x).tanh())).squeeze(1)
        return {"logits": y} if labels is None else {"loss": F.mse_loss(y, labels), "logits": y}


def examples(batches: int = 3) -> list[dict[str, Tensor]]:
    """Draw a data set, always the same."""
    x = torch.randn(BATCH * batches, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [{"x": v, "labels": v.sin().sum()} for v in x]


def assert_learns_and_saves(
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module], Sequence[float]],
    *,
    rtol: float = 1e-7,
    less: float = 3,
) -> None:
    """Train from the same start in two modes: losses fall, and the weights that come out are the same.

    Args:
        make: builds the net.
        train: trains the net that it gets, with whatever tool, and returns the losses of the steps or epochs.
        rtol: how far apart the weights may be, relative to the largest.
        less: how many times less the peak of memory must be in mode ``invert``.
    """
    results: dict[str, Any] = {}
    for mode in ("store", "invert"):
        torch.manual_seed(0)
        net = make()
        with iz.mode(net, mode), track_memory() as memory:
            torch.manual_seed(0)
            losses = train(net)
        results[mode] = memory.peak, [p.detach() for p in net.parameters()]
        assert losses[-1] < 0.8 * losses[0], f"Expected the loss to fall in mode {mode}; got {losses}"
    (stored, expected), (peak, actual) = results["store"], results["invert"]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=rtol * e.abs().max().item())
    assert peak * less < stored, f"Expected {less} times less memory; got a peak of {peak} bytes instead of {stored}"
