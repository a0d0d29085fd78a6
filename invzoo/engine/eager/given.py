"""What a replay gets as it is, and must not have changed until then."""

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from .._torch import Stamp, stamps, version_of
from ..nested import attributes_of, map_tensors

__all__ = ["Given"]

_NONE: Mapping[int, Tensor] = MappingProxyType({})


class Given:
    """The tensors that a call keeps for its replay: side inputs, tensors' attributes, and inputs of a recomputed call.

    They are held without their graphs (rule 5). Beside them are weights that belong to no module.
    """

    __slots__ = ("_copies", "_tensors", "leaves")

    def __init__(self) -> None:
        self._tensors: Sequence[tuple[str, Tensor, int]] = ()  # with their versions
        self._copies = _NONE  # of tensors with attributes, by their identity
        self.leaves: Sequence[tuple[weakref.ref[Tensor], Stamp]] = ()

    def take(self, what: str, value: Any) -> Any:
        """Return ``value`` as the replay gets it; errors call it ``what``."""
        return map_tensors(partial(self._take, what), value)

    def take_all(self, what: str, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return what somebody set on a tensor, as the replay gets it."""
        return {name: self.take(f"{name} of {what}", value) for name, value in attributes.items()}

    def _take(self, what: str, tensor: Tensor) -> Tensor:
        if (data := self._copies.get(id(tensor))) is not None:  # it leads to itself
            return data
        data = tensor.detach().requires_grad_(tensor.requires_grad)
        self.keep(what, data)
        if attributes := attributes_of(tensor):
            self._copies = {**self._copies, id(tensor): data}
            vars(data).update(self.take_all(what, attributes))
        return data

    def keep(self, what: str, tensor: Tensor) -> None:
        self._tensors = (*self._tensors, (what, tensor, version_of(tensor)))

    def keep_leaf(self, leaf: Tensor) -> None:
        self.leaves = (*self.leaves, (weakref.ref(leaf), stamps([leaf])[0]))

    def check(self, name: str) -> None:
        """Before a replay: refuse changes in place."""
        for what, tensor, version in self._tensors:
            if version_of(tensor) != version:
                raise RuntimeError(
                    f"Expected {what} of {name} to stay as it was until backward; got one that was changed in place. "
                    "Use an out-of-place operation on it"
                )
        for ref, stamp in self.leaves:
            if (leaf := ref()) is not None and stamps([leaf])[0][:2] != stamp[:2]:
                raise RuntimeError(
                    f"Expected the weights of {name} to stay as they were between forward and backward; got a change "
                    f"of one of shape {tuple(leaf.shape)}. Call backward before optimizer.step()"
                )

    def forget(self) -> None:
        """After the last replay: hold nothing any more."""
        self._tensors, self._copies = (), _NONE
