"""All layers of a family of the catalogue in one module, for tools that take seconds for a graph of any size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from invzoo.engine import tuple_of
from invzoo.layers.maps import mixture, roots
from invzoo.testing import Case

__all__ = ["DIRECTIONS", "FAMILIES", "FORWARD", "INVERSE", "REFUSED", "Together", "given", "take_few_steps", "together"]

FORWARD, INVERSE = DIRECTIONS = ("forward", "inverse")

FAMILIES = [name for name in vars(iz.testing.catalogue) if name.isupper() and name not in ("CATALOGUE", "FAMILIES")]


# By `torch.export`: a graph has no branches that depend on values.
REFUSED = {
    "InvertibleResidual-inverse": "the fixed-point iteration stops when it has converged",
    "InvertibleResidual[series]-inverse": "as above",
    "InvertibleResidual[roulette]-inverse": "as above",
    "InvertibleResidual[solve]-inverse": "as above",
    "InvertibleResidual[context]-inverse": "as above",
    "Slice[context]-inverse": "its decoder makes a distribution that checks its parameters",
    "Augment[context]-forward": "as above",
}


def take_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let inverses that search take as few steps as find anything: tools unroll loops."""
    monkeypatch.setattr(roots.bracket.__wrapped__, "__defaults__", (6,))
    monkeypatch.setattr(roots.newton.__wrapped__, "__defaults__", (1,))
    monkeypatch.setattr(mixture, "_STEPS", 1)


def given(
    case: Case, direction: str, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """Return a layer, or its inverse, in the state behind a first batch, and what to call it with."""
    layer, values, side = case.layer(dtype=dtype), case.inputs(dtype=dtype), case.side_inputs(dtype=dtype)
    with torch.no_grad():
        outputs = tuple_of(layer(*values, **side))
    return (layer, values, side) if direction == FORWARD else (layer.inv, outputs, side)


class Together(nn.Module):
    """Layers side by side, each on inputs of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, values: list[tuple[Tensor, ...]], sides: list[dict[str, Tensor]]) -> list[Tensor]:
        calls = zip(self.layers, values, sides, strict=True)
        return [y for layer, value, side in calls for y in tuple_of(layer(*value, **side))]


def catalogued(family: str) -> tuple[iz.testing.Entry, ...]:
    return getattr(iz.testing.catalogue, family)


def together(
    family: str, direction: str, left_out: Callable[[str], bool], dtype: torch.dtype = torch.float64
) -> tuple[Together, tuple[Any, Any]]:
    """Return the layers of a family, each in its first form that is not left out by name, ``"Slice-inverse"``."""
    forms = [[c for c in entry.cases if not left_out(f"{c.name}-{direction}")] for entry in catalogued(family)]
    found = [given(cases[0], direction, dtype) for cases in forms if cases]
    layers, values, sides = zip(*found, strict=True)
    return Together(*layers), ([*values], [*sides])
