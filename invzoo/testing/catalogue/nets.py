"""Subnets of the catalogue's layers, and how a layer sees its first batch or a context."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...module import InvertibleModule
from ..entries import Case
from ..inputs import Shape

__all__ = ["Conditioned", "after_a_batch", "convolutions", "subnet", "with_context"]


def subnet(inputs: int, outputs: int) -> nn.Module:
    """Make a subnet from so many features to so many."""
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def convolutions(inputs: int, outputs: int) -> nn.Module:
    """Make a subnet of images, from so many channels to so many."""
    return nn.Sequential(nn.Conv2d(inputs, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, outputs, 1))


class Conditioned(nn.Module):
    """A subnet that sees a context."""

    def __init__(self, inputs: int, context: int, outputs: int) -> None:
        super().__init__()
        self.net = subnet(inputs + context, outputs)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat((x, context), 1))


def after_a_batch(layer: InvertibleModule, *shape: int, **side: int) -> InvertibleModule:
    """Let a layer see a training batch, away from mean 0 and std 1, and side inputs of so many features."""
    with torch.no_grad():
        layer(1 + 2 * torch.randn(20, *shape), **{name: torch.randn(20, size) for name, size in side.items()})
    return layer


def with_context(features: int, make: Callable[[], InvertibleModule], *shapes: Shape) -> Case:
    """Make the case of a layer that sees a context of so many features."""
    return Case(make, *shapes, id="context", side={"context": (features,)})
