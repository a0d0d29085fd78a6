"""The interface of invtorch, the system that this one follows: flags, `requires_grad`, checks of a layer's contract.

It also calls an inverse that has the argument ``saved`` with the positions of the inputs that need no computing, and
takes ``strict_forward`` in `forward`, which has nothing to do here: the graph of a call is the real one.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .engine import Mode, Policy, SideNames, map_tensors, tolerance, tuple_of
from .options import Options, option

__all__ = ["Finding", "Flags", "requires_grad"]


@dataclass(frozen=True)
class Finding:
    """The outcome of a check: true if nothing was found; printed, what was found.

    Example:
        >>> layer = iz.InvertibleLeakyReLU()
        >>> print(layer.check_inverse(torch.randn(3)))
        True
    """

    problems: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return f"False: {'; '.join(self.problems)}" if self.problems else "True"


def requires_grad(
    inputs: Any = None,
    *,
    any: Iterable[Any] | None = None,  # noqa: A002 - invtorch's names
    all: Iterable[Any] | None = None,  # noqa: A002
) -> bool:
    """Say whether a tensor requires gradients, or set it by whether any or all of others do.

    Args:
        inputs: the tensor that is asked about, or set.
        any: values of which one at least must require gradients.
        all: values that all must.

    Returns:
        Whether ``inputs`` requires gradients, then.

    Example:
        >>> y = torch.zeros(2)
        >>> iz.requires_grad(y, any=(torch.ones(1), nn.Parameter(torch.ones(1))))
        True
    """
    if any is None and all is None:
        return isinstance(inputs, Tensor) and inputs.requires_grad
    required = (any is None or _some(any)) and (all is None or _every(all))
    if inputs is not None and inputs.requires_grad != required:
        inputs.requires_grad_(required)
    return required


def _some(values: Iterable[Any]) -> bool:
    return any(map(requires_grad, values))


def _every(values: Iterable[Any]) -> bool:
    return all(map(requires_grad, values))


@contextmanager
def _same_random_numbers() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _run(function: Callable[..., Any], inputs: Sequence[Any], side: dict[str, Any]) -> tuple[Any, ...]:
    with _same_random_numbers():
        return tuple_of(function(*inputs, **side))


def _clone(values: Sequence[Any]) -> list[Any]:
    return [map_tensors(lambda t: t.detach().clone().requires_grad_(t.requires_grad), v) for v in values]


def _differences(what: str, expected: Sequence[Any], got: Sequence[Any], *, exact: bool = False) -> Iterable[str]:
    if len(expected) != len(got):
        yield f"Expected {len(expected)} {what}s; got {len(got)}"
    for i, (a, b) in enumerate(zip(expected, got, strict=False)):
        if not isinstance(a, Tensor):
            continue
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            yield f"Expected {what} {i} to be {_describe(a)}; got {_describe(b)}"
        elif not (error := _error(a, b)) <= (0 if exact else tolerance([a.dtype])):
            yield f"Expected {what} {i} to come back the same; got a relative error of {error:.1e}"


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _error(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    kind = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.detach().to(kind), b.detach().to(kind)
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a).clamp_min(1e-300)).item()


def _check_function(layer: Any, inputs: Sequence[Any], side: dict[str, Any]) -> Finding:
    """Check that the function is deterministic, leaves its inputs alone and returns tensors."""
    given, problems = _clone(inputs), list[str]()
    layer = copy.deepcopy(layer)
    state = copy.deepcopy(layer.state_dict())
    with torch.enable_grad():
        outputs = _run(layer.function, given, side)
        problems += _differences("input", inputs, given, exact=True)
        layer.load_state_dict(state)  # a replay finds the buffers as they were, too
        again = _run(layer.function, _clone(inputs), side)
    problems += _differences("output of a second run", outputs, again, exact=True)
    if not any(isinstance(y, Tensor) for y in outputs):
        problems.append(f"Expected function to return tensors; got {_describe(outputs[0])}")
    if "strict_forward" in SideNames.of(layer.function).names:
        with torch.no_grad():
            strict = _run(layer.function, _clone(inputs), {**side, "strict_forward": True})
        for i, (a, b) in enumerate(zip(outputs, strict, strict=True)):
            if requires_grad(a) != requires_grad(b):
                problems.append(f"Expected strict_forward to set requires_grad of output {i} to {requires_grad(a)}")
    return Finding(tuple(problems))


@torch.no_grad()
def _check_inverse(layer: Any, inputs: Sequence[Any], side: dict[str, Any]) -> Finding:
    """Check that the inverse rebuilds the inputs, and, with ``saved``, those of them that are asked for."""
    layer = copy.deepcopy(layer)
    outputs = _run(layer.function, _clone(inputs), side)
    back = _run(partial(layer.in_direction, True, False), _clone(outputs), side)
    problems = [*_differences("input", inputs, back)]
    if "saved" in SideNames.of(layer.inverse).names:
        for position in range(len(inputs)):
            some = [*_run(layer.inverse, _clone(outputs), {**side, "saved": {position}})]
            some[position : position + 1] = [inputs[position]]
            problems += _differences(f"input (saved={position})", inputs, some)
    return Finding(tuple(problems))


def _set_checkpoint(policy: Policy, value: Any) -> None:
    policy.mode = policy.freeing if value else Mode.store


def _set_invertible(policy: Policy, value: Any) -> None:
    policy.freeing = Mode.invert if value else Mode.recompute
    if policy.mode is not Mode.store:
        policy.mode = policy.freeing


class Flags(Options):
    """The mode as two flags, and the checks of a layer."""

    checkpoint = option(
        lambda policy: policy.mode is not Mode.store,
        _set_checkpoint,
        "Whether anything is freed, as it is not in mode ``store``.",
    )
    invertible = option(
        lambda policy: policy.freeing is Mode.invert,
        _set_invertible,
        "Whether inputs are freed too, as they are not in mode ``recompute``.",
    )

    def check_function(self, *inputs: Any, **side: Any) -> Finding:
        """Say whether :meth:`function` keeps its contract on these inputs; true or false, and printed, why.

        It must give the same values twice from the same random state, leave its inputs as they are, return tensors or a
        tuple, and, if it has the argument ``strict_forward``, set ``requires_grad`` of its outputs as autograd would.
        """
        return _check_function(self, inputs, side)

    def check_inverse(self, *inputs: Any, **side: Any) -> Finding:
        """Say whether :meth:`inverse` rebuilds these inputs from their outputs; true or false, and printed, why."""
        return _check_inverse(self, inputs, side)
