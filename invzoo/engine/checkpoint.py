"""The engine for plain callables."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from .eager.call import call
from .eager.freeing import freeing
from .operation import Operation
from .policy import Mode, Policy, check_of
from .signatures import SideNames, modules_of

__all__ = ["checkpoint"]

_verified: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    inverse: Callable[..., Any] | None = None,
    enabled: bool = True,
    seed: bool = False,
    check: str = "first",
    free_input: bool = False,
    **side: Any,
) -> Any:
    """Return ``function(*args, **side)``, without keeping what its backward needs.

    With an ``inverse``, backward rebuilds the inputs from the outputs; without one, the inputs are kept. Either way the
    function runs once more in backward.

    Args:
        function: maps one or several tensors to one or several. Modules are found if it is one, is bound to one or
            closes over some.
        args: its inputs.
        inverse: ``inverse(*outputs, **side) -> inputs``.
        enabled: whether anything is freed at all.
        seed: keep the state of the random number generators on every call; otherwise on calls that use them.
        check: when a replay is compared with its forward: ``'first'``, ``'always'`` or ``'never'``.
        free_input: free the memory of the inputs, although the caller holds them, until backward.
        side: keyword arguments of both; never freed.

    Raises:
        ValueError: for another ``check``, or an input that cannot be freed.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> y = iz.checkpoint(torch.exp, x, inverse=torch.log)
        >>> y.sum().backward()
        >>> x.grad
        tensor([2.7183, 2.7183, 2.7183])
    """
    mode = Mode.store if not enabled else Mode.recompute if inverse is None else Mode.invert
    policy = Policy(mode, check_of(check), seed, free_input, _verified_of(function))
    name = getattr(function, "__name__", type(function).__name__)
    saved = inverse is not None and "saved" in SideNames.of(inverse).names
    roots = modules_of(function, inverse)
    foreign = not isinstance(function, nn.Module)
    operation = Operation(name, function, inverse, None, roots, policy, takes_saved=saved, foreign=foreign)
    if free_input and enabled:
        with freeing(name, args):
            return call(operation, args, side)
    return call(operation, args, side)


def _verified_of(function: Callable[..., Any]) -> set[str]:
    """Return what a function's calls have verified so far, which lives as long as the function."""
    owner = getattr(function, "__self__", function)  # a bound method is made anew each time
    try:
        return _verified.setdefault(owner, set())
    except TypeError:  # builtins cannot be referred to weakly
        return set()
