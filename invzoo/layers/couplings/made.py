"""A masked net that gives parameters for each feature as functions of the features before it."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...dtypes import full_precision, widen
from ...own_hooks import has_hooks

__all__ = ["MADE", "spread"]


def spread(units: int, first: int, count: int) -> list[int]:
    """Give each unit a degree from ``first`` on, one of ``count``: rising, and as evenly as can be."""
    return [first + (2 * unit + 1) * count // (2 * units) for unit in range(units)]


class WideLinear(nn.Linear):
    """A linear layer that computes in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(widen(x), self.seen(), None if self.bias is None else widen(self.bias))

    def seen(self) -> Tensor:
        """Return the weight that the input meets."""
        return widen(self.weight)


class MaskedLinear(WideLinear):
    """Likewise, with an output of degree d that sees the inputs of degrees up to d. Its net sets the degrees."""

    degrees: Tensor

    def __init__(self, inputs: int, outputs: int, **factory: Any) -> None:
        super().__init__(inputs, outputs, **factory)
        degrees = torch.empty(inputs + outputs, dtype=torch.long, device=self.weight.device)
        self.register_buffer("degrees", degrees, persistent=False)

    def seen(self) -> Tensor:
        before, after = self.degrees.split([self.in_features, self.out_features])
        return torch.where(after[:, None] >= before, widen(self.weight), 0)


class MADE(nn.Module):
    """A net whose outputs for feature i depend on the features before it: (..., D) -> (..., outputs * D).

    A unit of degree d sees the units of degrees up to d in the layer before it. Feature i, counted from 1, has degree
    i, and its outputs have degree i - 1. A context goes to all hidden units, of which one at least then has degree 0 in
    each layer: by it the outputs of the first feature depend on the context. The last layer starts at zero.

    Its layers are called as modules, so that hooks on them fire; what is put in their places may be any module that
    maps the last dim, as those do that adapt a linear layer, and sees no more than they.

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
        if context_features is not None:
            inner = [[0, *degrees[1:]] for degrees in inner]
        self._degrees = [[*range(1, features + 1)], *inner, [*range(features)] * outputs]
        self._counts = [[n[d] for d in range(features + 1)] for n in map(Counter, self._degrees)]
        self.layers = nn.ModuleList(MaskedLinear(len(n), len(m), **factory) for n, m in pairwise(self._degrees))
        self.contexts = nn.ModuleList(
            WideLinear(context_features, n, bias=False, **factory) for n in hidden if context_features is not None
        )
        self.features, self.activation = features, activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        layers: list[Any] = [*self.layers, *self.contexts]
        for layer in layers:
            layer.reset_parameters()
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        for layer, (before, after) in zip(layers, pairwise(self._degrees), strict=False):
            layer.degrees.copy_(torch.tensor([*before, *after], device="cpu"))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with full_precision(x):
            h = widen(x)
            for i, layer in enumerate(self.layers):
                h = layer(h) if isinstance(layer, MaskedLinear) else self._masked(i, h)
                if i < len(self.layers) - 1:
                    h = self.activation(h if context is None else h + self.contexts[i](context))
            return h

    def solve(
        self, y: Tensor, inverse: Callable[[Tensor, Tensor, int], Tensor], context: Tensor | None = None
    ) -> Tensor:
        """Find the x for which ``inverse(y, self(x, context), -1) = x``, feature by feature."""
        with full_precision(y):
            plain = not has_hooks(self) and all(map(_is_plain, self.layers))
            parameters = self._incremental(y, context) if plain else partial(self._evaluated, context)
            found = [y[..., :0]]
            for value in y.split(1, -1):
                found.append(inverse(value, parameters(found), -1).to(y.dtype))
            return torch.cat(found, -1)

    def _evaluated(self, context: Tensor | None, found: list[Tensor]) -> Tensor:
        """Return the parameters of the first feature that is not found, by a call of the whole net."""
        x = torch.cat(found, -1)
        known = x.shape[-1]
        return self(F.pad(x, (0, self.features - known)), context)[..., known :: self.features]

    def _incremental(self, y: Tensor, context: Tensor | None) -> Callable[[list[Tensor]], Tensor]:
        """Likewise, by the weights: as one evaluation of the net in all, a piece at each step."""
        columns, sums = self._columns(), [bias.expand(*y.shape[:-1], -1) for bias in self._biases(context)]
        sums[-1] = rearrange(sums[-1], "... (n d) -> ... (d n)", d=self.features)
        return lambda found: self._advance(len(found) - 1, widen(found[-1]), columns, sums)

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

    def _masked(self, i: int, h: Tensor) -> Tensor:
        """Call a layer that knows no masks: once for each degree, all stacked, with zeros where that must not look."""
        before, after = (torch.tensor(degrees, device=h.device) for degrees in self._degrees[i : i + 2])
        steps = torch.tensor(sorted({*self._degrees[i + 1]}), device=h.device).view(-1, *[1] * h.ndim)
        outputs = self.layers[i](torch.where(before <= steps, h, 0))
        return torch.where(after == steps, outputs, 0).sum(0)

    def _columns(self) -> list[tuple[Tensor, ...]]:
        """Return the weights cut by the degrees of what they see, with the outputs of a feature side by side."""
        *inner, last = (widen(layer.weight) for layer in _linears(self.layers))
        last = rearrange(last, "(n d) units -> (d n) units", d=self.features)
        return [weight.split(counts, 1) for weight, counts in zip((*inner, last), self._counts, strict=False)]

    def _biases(self, context: Tensor | None) -> list[Tensor]:
        """Return what each layer's units have before they see a feature."""
        *inner, last = (widen(layer.bias) for layer in _linears(self.layers))
        if context is not None:
            inner = [bias + layer(context) for bias, layer in zip(inner, self.contexts, strict=True)]
        return [*inner, last]


def _linears(layers: nn.ModuleList) -> list[nn.Linear]:
    return [*layers]


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call does nothing but its formula, so that the weight may be read in its place."""
    is_own = isinstance(layer, MaskedLinear) and getattr(layer.forward, "__func__", None) is MaskedLinear.forward
    return is_own and not has_hooks(layer)
