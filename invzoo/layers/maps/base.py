"""Maps of each value by parameters of its own: what couplings, conditioned and autoregressive layers have in common.

A map knows no layer. Its parameters come stacked along ``dim``, as many blocks as the map has parameters, each of the
shape of the value (or broadcast to it). Who gives them, another half, a condition, an autoregressive net or a weight,
is the layer's business.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributions import constraints

from ...protocol import BaseMap, Like
from ..elementwise import check_real

__all__ = ["Map", "by_map", "register_functions"]


def by_map(*words: str) -> Iterator[Any]:
    """Make properties by which what has a ``map`` says these words as that does."""
    return map(_by_map, words)


def _by_map(word: str) -> Any:
    def read(self: Any) -> Any:
        return getattr(self.map, word)

    return property(read)


class Map(BaseMap, ABC):
    """A monotone map of each value by parameters of its own. Abstract: a subclass writes `move`, `undo`, `log_slope`.

    A map's ``domain`` is its codomain, too. What it returns has the dtype of the value that it moves.
    """

    domain: ClassVar[constraints.Constraint] = constraints.real

    @property
    @abstractmethod
    def parameters(self) -> int:
        """How many parameters each value has."""

    def parts(self, h: Tensor, like: Like, dim: int) -> tuple[Any, ...]:
        """Return what `move` and `undo` get of the parameters, which come stacked along ``dim``."""
        return h, dim

    def functions(self) -> list[Any]:
        """Return the functions that the map was given, modules among them."""
        return [value for value in vars(self).values() if callable(value)]

    def check(self, owner: object) -> None:
        """Raise if the options make no map; ``owner`` is the layer that has them."""

    def check_value(self, owner: object, argument: str, x: Any) -> None:
        """Raise if ``x``, an input or an output, is none that the map takes: its dtype would cut what comes out."""
        check_real(owner, argument, x)

    def reset(self, weight: Tensor) -> None:
        """Write the parameters of the start, (parameters, features), into ``weight``."""
        weight.zero_()


def register_functions(layer: nn.Module, map_: Map) -> list[Any]:
    """Register the modules among a map's functions as a layer's own, and return all of the functions."""
    functions = map_.functions()
    for i, module in enumerate(f for f in functions if isinstance(f, nn.Module)):
        layer.add_module(f"map_{i}", module)
    return functions
