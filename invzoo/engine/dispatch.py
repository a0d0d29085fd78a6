"""Where the engine meets `torch.compile`: containers pass their values through here."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ._torch import functorch_active, with_tensors
from .operation import Through
from .policy import Mode, Policy

__all__ = ["run_chain"]


def run_chain(
    owner: nn.Module,
    policies: Callable[[], Iterable[Policy]],
    through: Through,
    values: tuple[Any, ...],
    side: dict[str, Any],
    log_dets: Any,
) -> Any:
    """Return ``through(values, side, log_dets)``, as one function if the compiler traces it.

    Args:
        owner: the container; its parameters get gradients.
        policies: returns those of its layers.
        through: passes values through the layers, and their log-determinants to ``log_dets.add``, if that is not None.
        values: the inputs.
        side: the side inputs.
        log_dets: what collects log-determinants, or None.
    """
    if not _traces(owner, policies):
        return through(values, side, log_dets)
    from .compiled.chain import run  # noqa: PLC0415
    from .compiled.tracer import begin, gave_up  # noqa: PLC0415 - imports the compiler

    begin(type(owner).__name__)
    return (through if gave_up() else partial(run, owner, through))(values, side, log_dets)


def _traces(owner: nn.Module, policies: Callable[[], Iterable[Policy]]) -> bool:
    """Whether the compiler traces the container, and can trace it as one function."""
    return (
        torch.compiler.is_dynamo_compiling()
        and torch.is_grad_enabled()  # not so inside a chain's forward
        and not functorch_active()  # but so inside its backward
        and not torch.compiler.is_exporting()
        and with_tensors is not None
        and not any(policy.mode is Mode.store for policy in policies())
        and not any(_is_watched(module) for module in owner.modules() if module is not owner)  # its own see the whole
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks see what a module does: a replay would call them once more, and no gradient passes through them."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )
