"""What a layer that is compiled in place has the engine call."""

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

__all__ = ["CompiledMethods"]


class CompiledMethods:
    """Compiles methods that belong to a module, each when it is first asked for.

    The compiler allows so many compilations (8) of the code of one function, whoever calls it. Modules of one structure
    share these, and only these.

    Args:
        module: says which structure.
        args: for `torch.compile`, after the function.
        options: for `torch.compile`.
    """

    def __init__(self, module: nn.Module, *args: Any, **options: Any) -> None:
        tensors = [(name, x.shape, x.dtype, x.device) for name, x in module.state_dict(keep_vars=True).items()]
        self._structure = f"{module} {tensors}"
        self._args, self._options = args, options
        self._functions: dict[Any, Callable[..., Any]] = {}

    def __call__(self, method: Any) -> Callable[..., Any]:
        """Return a bound method, compiled."""
        if torch.compiler.is_compiling():  # all of it
            return method
        function = method.__func__
        if function not in self._functions:
            copy = _copy(function, self._structure)
            self._functions[function] = torch.compile(copy, *self._args, **self._options)
        return partial(self._functions[function], method.__self__)


@cache
def _copy(function: Any, structure: str) -> FunctionType:  # noqa: ARG001 - one for each
    """Return the same function with code of its own."""
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
