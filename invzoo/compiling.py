"""Compiling a layer in place: what the engine then calls."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["Compilable", "CompiledMethods"]


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


class Compilable(nn.Module):
    """A module that the compiler sees in pieces, as the engine calls them."""

    _compiled: CompiledMethods | None = None  # what compiles the layer's methods

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile in place, with the arguments of `torch.compile`; memory is saved as before.

        What the engine calls is compiled, in forward and in replay: the subnets, where they are modules and not plain
        functions; or, of a layer that takes no subnets, the function, the inverse and the log-determinant. Layers of
        one structure share their compilations. A container is compiled as one function instead.
        """
        subnets = [*_subnets(self.children())]
        for subnet in subnets:
            # As nn.Module.compile does, which by itself does nothing for torch's own modules.
            subnet._compiled_call_impl = CompiledMethods(subnet, *args, **options)(MethodType(_call, subnet))
        self._compiled = None if subnets else CompiledMethods(self, *args, **options)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_compiled"}  # a copy is compiled anew


def _call(module: nn.Module, *args: Any, **options: Any) -> Any:
    return module._call_impl(*args, **options)


def _subnets(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield modules that can be called, and what is in others instead of them: lists of modules, or matrices."""
    for module in modules:
        if type(module).forward is nn.Module.forward or not getattr(module, "subnet", True):
            yield from _subnets(module.children())
        else:
            yield module
