"""What layers with a residual branch share: any net that keeps the shape."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine import SideNames
from ..module import InvertibleModule
from ._checks import check_callable, check_floating, refuse

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
        check_floating(self, "x", x)
        if side:
            self.side_names().check(self, side)
        h = self.f(x, **side)
        if not isinstance(h, Tensor) or h.shape != x.shape:
            got = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            refuse(self, "f", f"return a Tensor of shape {tuple(x.shape)}", got)
        return h.to(x.dtype)
