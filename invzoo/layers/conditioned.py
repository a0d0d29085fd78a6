"""What layers with a conditioner have in common: a module or function that makes parameters of a side input."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine import SideNames
from ..module import InvertibleModule
from ._checks import check_callable, explain, refuse

__all__ = ["Conditioned", "Conditioner"]

Conditioner = Callable[..., Tensor]


class Conditioned(InvertibleModule):
    """A layer that may have a conditioner, and takes the side input ``context`` just then. Abstract."""

    conditioner: Conditioner | None

    def side_names(self) -> SideNames:
        return SideNames(frozenset(() if self.conditioner is None else ("context",)), any=False)

    def set_conditioner(self, conditioner: Conditioner | None) -> None:
        if conditioner is not None:
            check_callable(self, "conditioner", conditioner)
        self.conditioner = conditioner

    def evaluate_conditioner(self, context: Any) -> Tensor | None:
        """Return what the conditioner makes of the context; None if there is no conditioner."""
        if self.conditioner is None:
            return None
        if context is None:
            refuse(self, "context", "be what the conditioner takes", None, TypeError)
        try:
            h = self.conditioner(context)
        except Exception as error:
            explain(self, "conditioner", context, error)
            raise
        if not isinstance(h, Tensor):
            refuse(self, "conditioner", "return a Tensor", type(h).__name__, TypeError)
        return h
