"""All that must hold of an invertible layer, in one line."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ..module import InvertibleModule
from .modes import assert_memory, assert_modes_agree
from .modules import assert_inputs_unchanged, assert_portable, assert_trainable
from .running import options_of
from .values import assert_batch_sizes, assert_dtypes, assert_gradients, assert_log_det, assert_round_trip

__all__ = ["ASSERTIONS", "assert_invertible", "assertions_of"]

ASSERTIONS: tuple[Callable[..., None], ...] = (
    assert_round_trip,
    assert_log_det,
    assert_gradients,
    assert_modes_agree,
    assert_memory,
    assert_inputs_unchanged,
    assert_portable,
    assert_dtypes,
    assert_batch_sizes,
    assert_trainable,
)


def assert_invertible(
    layer: InvertibleModule, *inputs: Tensor, without: Mapping[str, str] | None = None, **arguments: Any
) -> None:
    """Assert all that must hold of an invertible layer, on copies of it.

    Args:
        layer: the layer, as it is to be used; parameters away from their start show more.
        inputs: a batch of at least two samples inside its domain.
        without: assertions that do not apply, by name, each with the reason.
        arguments: the side inputs, and options of the assertions.

    Raises:
        AssertionError: saying which layer does what else.
        ValueError: for a name in ``without`` that is no assertion's, or without a reason.

    Example:
        >>> layer = iz.AffineCoupling(nn.Linear(2, 4))
        >>> iz.testing.assert_invertible(layer, torch.randn(3, 4))
    """
    for run in assertions_of(layer, *inputs, without=without, **arguments).values():
        run()


def assertions_of(
    layer: InvertibleModule, *inputs: Tensor, without: Mapping[str, str] | None = None, **arguments: Any
) -> dict[str, Callable[[], None]]:
    """Return, by name, the assertions that :func:`assert_invertible` makes, each ready to be called."""
    without = without or {}
    names = [assertion.__name__ for assertion in ASSERTIONS]
    for name, reason in without.items():
        if name not in names or not reason:
            raise ValueError(f"Expected without to give reasons for some of {', '.join(names)}; got {name}: {reason!r}")
    options = {assertion: options_of(assertion) for assertion in ASSERTIONS}

    def bind(assertion: Callable[..., None]) -> Callable[[], None]:
        others = frozenset[str]().union(*options.values()) - options[assertion]
        return partial(assertion, layer, *inputs, **{n: value for n, value in arguments.items() if n not in others})

    return {assertion.__name__: bind(assertion) for assertion in ASSERTIONS if assertion.__name__ not in without}
