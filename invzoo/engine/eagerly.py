"""What imports the compiler, to leave a function out of what it compiles."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["eagerly"]


@torch.compiler.disable(reason="its steps depend on values")  # type: ignore[untyped-decorator]
def eagerly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function, without the compiler."""
    return function(*args, **options)
