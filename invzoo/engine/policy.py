"""How a module keeps what its backward needs."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

__all__ = ["Check", "Mode", "Policy", "check_of", "mode_of"]

Check = Literal["first", "always", "never"]


class Mode(StrEnum):
    """How a module keeps what its backward needs.

    ``store`` keeps every tensor that autograd saves, as a plain module does; ``recompute`` keeps the inputs and runs
    the function again in backward; ``invert`` keeps nothing but the last output of a chain and rebuilds the rest.

    Example:
        >>> iz.Mode("invert") is iz.Mode.invert
        True
    """

    store = "store"
    recompute = "recompute"
    invert = "invert"


@dataclass(slots=True)
class Policy:
    """The options of one module, as the engine reads them at each call.

    Args:
        mode: how the module keeps what its backward needs.
        check: on which calls a replay is compared with its forward.
        seed: keep the random number generators' state even if the call seems not to use it.
        free_input: free the memory of the input as well, which the caller holds.
        verified: the operations whose replay was right once.
        freeing: the mode that was set last and is not ``store``.
    """

    mode: Mode
    check: Check
    seed: bool
    free_input: bool
    verified: set[str] = field(default_factory=set)
    freeing: Mode = Mode.invert

    def set_mode(self, mode: Mode) -> None:
        """Set the mode, and remember one that frees."""
        self.mode = mode
        if mode is not Mode.store:
            self.freeing = mode


def mode_of(value: Mode | str) -> Mode:
    """Turn a name into a :class:`Mode`, or say which names there are."""
    try:
        return Mode(value)
    except ValueError:
        names = ", ".join(repr(mode.value) for mode in Mode)
        raise ValueError(f"Expected mode to be one of {names}; got {value!r}") from None


def check_of(value: str) -> Check:
    """Return ``value`` if it is a way of checking, or say which there are."""
    if value not in ("first", "always", "never"):
        raise ValueError(f"Expected check to be one of 'first', 'always', 'never'; got {value!r}")
    return value  # type: ignore[return-value]
