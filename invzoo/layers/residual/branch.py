"""What layers with a residual branch share: any net that keeps the shape."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...engine import SideNames
from ...module import InvertibleModule
from .._checks import check_callable, check_returned, explain

__all__ = ["BranchLayer"]


class BranchLayer(InvertibleModule):
    """A layer that moves its input by ``f(x, **side)``, a module or a function that keeps the shape. Abstract."""

    f: Callable[..., Tensor]

    def __init__(self, f: Callable[..., Tensor], **options: Any) -> None:
        super().__init__(**options)
        check_callable(self, "f", f)
        self.f = f

    def side_names(self) -> SideNames:
        return SideNames.of(self.f)

    def evaluate(self, x: Tensor, side: dict[str, Any]) -> Tensor:
        """Return ``f(x, **side)``, in the dtype of ``x``."""
        try:
            h = self.f(x, **side)
        except Exception as error:
            explain(self, "f", x, error)
            raise
        check_returned(self, "f", h, x.shape)
        return h.to(x.dtype)
