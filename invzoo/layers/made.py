"""A masked net that gives parameters for each feature as functions of the features before it."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .matrix import full_precision, widen

__all__ = ["MADE", "spread"]


def spread(units: int, first: int, count: int) -> list[int]:
    """Give each unit a degree from ``first`` on, one of ``count``: rising, and as evenly as can be."""
    return [first + (2 * unit + 1) * count // (2 * units) for unit in range(units)]


class MADE(nn.Module):
    """A net whose outputs for feature i depend on the features before i: (..., D) -> (..., outputs * D).

    A unit of degree d sees the units of degrees up to d in the layer before it. Feature i, counted from 1, has degree
    i, and its outputs have degree i - 1. A context goes to all hidden units, of which some then have degree 0: by them
    the outputs of the first feature depend on it. The last layer starts at zero.

    Args:
        features: D.
        outputs: how many there are for each feature, stacked as blocks of D.
        hidden: sizes of the hidden layers.
        context_features: size of the context's last dim, or None.
        activation: a function of each value.
        factory: device and dtype of the parameters.

    Reference:
        "MADE: Masked Autoencoder for Distribution Estimation", Germain, Gregor, Murray and Larochelle, 2015.
    """

    degrees: Tensor

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int],
        context_features: int | None,
        activation: Callable[[Tensor], Tensor],
        **factory: Any,
    ) -> None:
        super().__init__()
        first = 1 if context_features is None else 0
        inner = [spread(units, first, max(features - first, 1)) for units in hidden]
        self._degrees = [[*range(1, features + 1)], *inner, [*range(features)] * outputs]
        self._counts = [[n[d] for d in range(features + 1)] for n in map(Counter, self._degrees)]
        self.sizes = [*map(len, self._degrees)]
        self.layers = nn.ModuleList(nn.Linear(n, m, **factory) for n, m in pairwise(self.sizes))
        self.contexts = nn.ModuleList(
            nn.Linear(context_features, n, bias=False, **factory) for n in hidden if context_features is not None
        )
        self.features, self.activation = features, activation
        degrees = torch.empty(sum(self.sizes), dtype=torch.long, device=factory.get("device"))
        self.register_buffer("degrees", degrees, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (*_linears(self.layers), *_linears(self.contexts)):
            layer.reset_parameters()
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.degrees.copy_(torch.tensor([*chain(*self._degrees)], device="cpu"))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with full_precision(x):
            *inner, (weight, bias) = zip(self._weights(), self._biases(context), strict=True)
            h = widen(x)
            for masked, shift in inner:
                h = self.activation(F.linear(h, masked) + shift)
            return F.linear(h, weight, bias)

    def solve(
        self, y: Tensor, inverse: Callable[[Tensor, Tensor, int], Tensor], context: Tensor | None = None
    ) -> Tensor:
        """Find the x for which ``inverse(y, self(x, context), -1) = x``, feature by feature."""
        with full_precision(y):
            columns = self._columns()
            sums = [bias.expand(*y.shape[:-1], -1) for bias in self._biases(context)]
            sums[-1] = rearrange(sums[-1], "... (n d) -> ... (d n)", d=self.features)
            found = [y[..., :0]]
            for step, value in enumerate(y.split(1, -1)):
                h = self._advance(step, widen(found[-1]), columns, sums)
                found.append(inverse(value, h, -1).to(y.dtype))
            return torch.cat(found, -1)

    def _advance(self, step: int, units: Tensor, columns: list[tuple[Tensor, ...]], sums: list[Tensor]) -> Tensor:
        """Let a feature bring every unit whose last one it is to its value; return the outputs among them.

        The units of a layer are sorted by degree, so those are the first of its ``sums`` that are not complete. What
        they add goes to the rest only: a unit is evaluated once, and the masks are not needed.
        """
        for layer, blocks in enumerate(columns):
            if layer:
                units = self.activation(units.clone())  # a view would keep the rest
            rows, count = sums[layer].shape[-1], self._counts[layer + 1][step]
            block = blocks[step]
            total = sums[layer] + F.linear(units, block[len(block) - rows :])
            units, sums[layer] = total.split([count, rows - count], -1)
        return units

    def _weights(self) -> list[Tensor]:
        """Return the weights, with zeros at what a unit must not see."""
        masks = (after[:, None] >= before for before, after in pairwise(self.degrees.split(self.sizes)))
        weights = (widen(layer.weight) for layer in _linears(self.layers))
        return [torch.where(mask, weight, 0) for mask, weight in zip(masks, weights, strict=True)]

    def _columns(self) -> list[tuple[Tensor, ...]]:
        """Return the weights cut by the degrees of what they see, with the outputs of a feature side by side."""
        *inner, last = (widen(layer.weight) for layer in _linears(self.layers))
        last = rearrange(last, "(n d) units -> (d n) units", d=self.features)
        return [weight.split(counts, 1) for weight, counts in zip((*inner, last), self._counts, strict=False)]

    def _biases(self, context: Tensor | None) -> list[Tensor]:
        """Return what each layer's units have before they see a feature."""
        *inner, last = (widen(layer.bias) for layer in _linears(self.layers))
        if context is not None:
            added = (F.linear(widen(context), widen(layer.weight)) for layer in _linears(self.contexts))
            inner = [bias + more for bias, more in zip(inner, added, strict=True)]
        return [*inner, last]


def _linears(layers: nn.ModuleList) -> list[nn.Linear]:
    return [*layers]
