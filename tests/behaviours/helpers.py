"""What tests of behaviours have in common."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tests.reference import Subject, assert_same_run, mlp

__all__ = ["Subnet", "all_gradients", "blocks", "holds", "some_loss", "twice_the_same"]

Module = TypeVar("Module", bound=nn.Module)


def holds(program: Callable[..., Any] | None = None, *, block: Callable[..., nn.Module] = mlp) -> Callable[..., Any]:
    """Make a test of a program on a net: with ours it does the same as with the plain one, in every form and mode.

    Besides the net it takes fixtures and parameters; ``block``, if it is among them, is what makes the subnets.
    """
    if program is None:
        return functools.partial(holds, block=block)

    @functools.wraps(program)
    def test(subject: Subject, **given: Any) -> None:
        subject.holds(lambda net: program(net, **given), given.get("block", block))

    signature = inspect.signature(program)
    _, *others = signature.parameters.values()
    subject = inspect.Parameter("subject", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    test.__signature__ = signature.replace(parameters=[subject, *others])  # type: ignore[attr-defined]
    return test


def twice_the_same(program: Callable[[nn.Module], Any], plain: nn.Module, ours: nn.Module, *tolerance: float) -> None:
    """Assert that a program does the same with either net: on the first call, which is checked, and on the next."""
    for _ in range(2):
        assert_same_run(program, plain, ours, *tolerance)


def some_loss(y: Tensor) -> Tensor:
    """Weigh every number of an output differently."""
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.real.dtype).view(y.shape)).abs().square().sum()


def all_gradients(net: nn.Module, x: Tensor, **side: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of a loss with respect to the input and all parameters."""
    return torch.autograd.grad(some_loss(net(x, **side)), [x, *net.parameters()], allow_unused=True)


def blocks(net: nn.Module, kind: type[Module]) -> list[Module]:
    """Return the modules of a kind inside a net."""
    return [module for module in net.modules() if isinstance(module, kind)]


class Subnet(nn.Module):
    """An MLP, which subclasses do something with."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = mlp(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
