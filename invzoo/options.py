"""The options of a layer, which the engine reads at each call."""

from collections.abc import Callable
from typing import Any

from .engine import Policy, check_of, mode_of

__all__ = ["Options", "option"]


def option(read: Callable[[Policy], Any], write: Callable[[Policy, Any], None], doc: str) -> Any:
    """Make a property of an option in a layer's policy; a container has its layers', or None where they differ."""

    def get(self: "Options") -> Any:
        values = {read(policy) for policy in self._policies()}
        return values.pop() if len(values) == 1 else None

    def put(self: "Options", value: Any) -> None:
        for policy in self._policies():
            write(policy, value)

    return property(get, put, doc=doc)


class Options:
    """What a layer may be asked to do beside its maths, at any time between calls."""

    _policy: Policy

    def _policies(self) -> list[Policy]:
        return [self._policy]

    mode = option(
        lambda policy: policy.mode,
        lambda policy, value: policy.set_mode(mode_of(value)),
        "How the layer keeps what backward needs; a name will do.",
    )
    check = option(
        lambda policy: policy.check,
        lambda policy, value: setattr(policy, "check", check_of(value)),
        "When a replay is compared with its forward (first, always or never).",
    )
    seed = option(
        lambda policy: policy.seed,
        lambda policy, value: setattr(policy, "seed", bool(value)),
        "Whether the random number generators' state is kept on every call, used or not.",
    )
    free_input = option(
        lambda policy: policy.free_input,
        lambda policy, value: setattr(policy, "free_input", bool(value)),
        "Whether a call frees the memory of its input until backward.",
    )
