"""An entry of the catalogue: a layer in words, and the cases in which it is tested."""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..domains import of_each
from ..module import InvertibleModule
from .assertions import assertions_of
from .inputs import Draw, Shape, draw_from, in_words

__all__ = ["Case", "Entry"]


class Case:
    """A way to build a layer, and the inputs that it takes.

    Args:
        make: builds the layer, from torch's random state.
        shapes: of the inputs, without the batch.
        id: what tells this variant from the others of its class.
        side: shapes of the side inputs by name, without the batch.
        draw: ``draw(shape, generator) -> Tensor`` in float64, in place of a draw from the layer's domain.
        allowances: arguments of :func:`invzoo.testing.assert_invertible`.

    Example:
        >>> case = iz.testing.Case(iz.InvertibleSigmoid, (3, 4))
        >>> case.layer(), case.inputs(batch=2)[0].shape
        (InvertibleSigmoid(), torch.Size([2, 3, 4]))
    """

    name: str

    def __init__(
        self,
        make: Callable[[], InvertibleModule],
        *shapes: Shape,
        id: str = "",  # noqa: A002 - pytest's word
        side: dict[str, Shape] | None = None,
        draw: Draw | None = None,
        **allowances: Any,
    ) -> None:
        self.make, self.shapes, self.id, self.side, self.draw = make, shapes, id, side or {}, draw
        self.allowances = allowances
        self.name = id

    def layer(self, seed: int = 0, dtype: torch.dtype = torch.float64, perturbation: float = 0.1) -> InvertibleModule:
        """Build the layer, and move its parameters by ``perturbation`` times normal noise; torch's state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = self.make().to(dtype)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(perturbation * torch.randn_like(parameter))
        return layer

    def inputs(self, batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
        """Draw the inputs."""
        generator = torch.Generator().manual_seed(seed)
        draws = [self.draw or partial(draw_from, domain) for domain in of_each(self.layer().domain, len(self.shapes))]
        pairs = zip(draws, self.shapes, strict=True)
        return tuple(draw((batch, *shape), generator).to(dtype) for draw, shape in pairs)

    def side_inputs(self, batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Draw the side inputs."""
        generators = {name: torch.Generator().manual_seed(seed + zlib.crc32(name.encode())) for name in self.side}
        return {
            name: torch.randn(batch, *shape, generator=generators[name], dtype=torch.float64).to(dtype)
            for name, shape in self.side.items()
        }

    def assertions(self) -> dict[str, Callable[[], None]]:
        """Return the assertions that apply, by name, on the layer away from its start; each is ready to be called."""
        return assertions_of(self.layer(), *self.inputs(), **{**self.side_inputs(), **self.allowances})

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Entry:
    """A layer class in words, and the cases that its tests build.

    Args:
        layer: the class.
        map: y as a function of x.
        log_det: the log-determinant in words; ``"none"`` if the layer is no bijection.
        cases: one for each variant.
        cost: of the inverse, in runs of the forward.
        keeps: what a call in mode ``invert`` keeps; by default its input if the first case's layer is ``saturating`` or
            has a ``slow_inverse``, and else nothing.
    """

    def __init__(
        self,
        layer: type[InvertibleModule],
        map: str,  # noqa: A002 - the field's word
        log_det: str,
        *cases: Case,
        cost: str = "1x",
        keeps: str = "",
    ) -> None:
        self.layer, self.map, self.log_det, self.cases, self.cost, self._keeps = layer, map, log_det, cases, cost, keeps
        for case in cases:
            case.name = f"{self.name}[{case.id}]" if case.id else self.name

    @property
    def name(self) -> str:
        return self.layer.__name__

    @property
    def conditioned(self) -> bool:
        """Whether the layer can take side inputs."""
        return any(case.side for case in self.cases)

    @property
    def domain(self) -> str:
        """The values that the layer takes, in words."""
        return ", ".join(map(in_words, of_each(self.cases[0].layer().domain, 1)))

    @property
    def keeps(self) -> str:
        """What a call in mode ``invert`` keeps, in words."""
        layer = self.cases[0].layer()
        return self._keeps or ("its input" if layer.saturating or layer.slow_inverse else "nothing")

    def __repr__(self) -> str:
        return f"Entry({self.name}, {self.map!r})"
