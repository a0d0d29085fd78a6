"""What autograd saved of a call: handles in place of tensors, until the call is rebuilt."""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from .._torch import version_of

__all__ = ["Handle", "Meta", "Saved"]

Meta = tuple[torch.Size, torch.dtype]  # of a saved tensor


class Handle:
    """Stands in the graph for a tensor that autograd saved; its value comes when the call is rebuilt.

    It knows the value's version when it was saved, since autograd does not compare that of what hooks return.
    """

    __slots__ = ("__weakref__", "value", "version")

    def __init__(self, value: Tensor):
        self.value: Tensor | None = value
        self.version = version_of(value)

    def changed(self, name: str) -> RuntimeError:
        """Return the error for a value that was changed in place since; it calls the call ``name``."""
        shape = tuple(self.value.shape) if self.value is not None else None
        return RuntimeError(
            f"Expected the function of {name} to leave what autograd saved for its backward as it is; got a tensor of "
            f"shape {shape} that was changed in place later. Use an out-of-place operation"
        )


class Saved:
    """The handles of a call, in order, and what their tensors look like; the graph holds them, the call does not."""

    __slots__ = ("handles", "metas")

    def __init__(self) -> None:
        self.handles: list[weakref.ref[Handle]] = []
        self.metas: list[Meta] = []

    def add(self, tensor: Tensor) -> Handle:
        """Return a handle for a tensor that autograd is about to save."""
        handle = Handle(tensor.detach())
        self.handles.append(weakref.ref(handle))
        self.metas.append((tensor.shape, tensor.dtype))
        return handle

    def live(self) -> Iterator[Handle]:
        """Yield the handles that a graph waits for."""
        return (handle for ref in self.handles if (handle := ref()) is not None)

    @property
    def awaited(self) -> bool:
        """Whether a graph waits for any."""
        return any(ref() is not None for ref in self.handles)

    def values(self) -> list[Tensor | None]:
        """Return what the handles hold; None for those that nobody waits for."""
        return [None if (handle := ref()) is None else handle.value for ref in self.handles]

    def release(self) -> None:
        """Forget what the handles hold."""
        for handle in self.live():
            handle.value = None
