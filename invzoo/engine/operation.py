"""What the engine knows of a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .policy import Policy

__all__ = ["Operation", "Through"]

Through = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]  # passes values and side inputs, and log-determinants


@dataclass(slots=True)
class Operation:
    """What the engine knows of a layer: a function, the way back, and what its replay must find as it was.

    Args:
        name: what errors call it.
        function: ``function(*inputs, **side) -> outputs``.
        inverse: ``inverse(*outputs, **side) -> inputs``; None where there is none.
        replay: ``replay(tape, *outputs, **side)`` rebuilds the inputs and runs the function once on the tape; None
            inverts first and then runs the function.
        roots: the modules whose parameters, buffers, flags and hooks the function sees.
        policy: mode and checks.
        keeps_input: whether ``invert`` keeps the inputs instead of inverting, which loses precision or takes long.
        takes_saved: whether ``inverse`` has the argument ``saved``, the set of input positions not to compute.
        log_det: whether the function returns a log-determinant behind its outputs, which ``inverse`` and ``replay`` do
            without, so that nobody holds it.
        in_pieces: whether ``replay`` returns the outputs, and does no more than run pieces of the function and rebuild
            inputs: then a compiler may trace it.
        foreign: whether it runs functions that somebody gave, besides the code of its roots.
    """

    name: str
    function: Callable[..., Any]
    inverse: Callable[..., Any] | None
    replay: "Callable[..., None] | None"
    roots: Sequence[nn.Module]
    policy: Policy
    keeps_input: bool = False
    takes_saved: bool = False
    log_det: bool = False
    foreign: bool = False
    in_pieces: bool = False
