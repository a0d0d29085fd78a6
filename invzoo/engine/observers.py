"""Forward hooks on the modules inside a call: they fire in forward, and not again in its replay."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as torch_module

__all__ = ["Observers"]

Hook = Callable[..., Any]


def _is_torch(hook: Any) -> bool:
    """Whether a hook is torch's own (spectral norm, pruning, FSDP): part of the computation, so it runs in replays."""
    hook = getattr(hook, "func", hook)  # functools.partial
    owner = getattr(hook, "__module__", None) or type(hook).__module__
    return owner.split(".")[0] == "torch"


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


class Observers:
    """The users' forward and pre-forward hooks on some modules, and on all modules.

    What autograd saves inside a hook is kept as it is, since a replay does not run the hook. One that returns a value
    changes what the function computes, so it runs in replays as well.
    """

    __slots__ = ("active", "sites")

    def __init__(self, sites: list[tuple[dict[int, Hook], int, Hook]]):
        self.sites = sites
        self.active: set[int] = set()  # the sites whose hooks returned a value

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> "Observers | None":
        """Find the hooks; None where there are none, which is the rule."""
        tables = [t for m in modules for t in (m._forward_pre_hooks, m._forward_hooks) if t]
        tables += [
            t for n in ("_global_forward_pre_hooks", "_global_forward_hooks") if (t := getattr(torch_module, n, None))
        ]
        tables = list({id(t): t for t in tables}.values())  # a shared module comes twice
        sites = [(table, key, hook) for table in tables for key, hook in table.items() if not _is_torch(hook)]
        return cls(sites) if sites else None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """During forward: learn which hooks return a value, and keep what autograd saves inside them."""
        for index, (table, key, hook) in enumerate(self.sites):
            table[key] = self._watch(index, hook)
        try:
            yield
        finally:
            for table, key, hook in self.sites:
                if key in table:  # a hook may remove itself
                    table[key] = hook

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """During a replay: run torch's own hooks, and of the users' those alone that returned a value in forward."""
        tables = list({id(table): table for table, _, _ in self.sites}.values())
        before = [dict(table) for table in tables]
        try:
            for table in tables:
                table.update({key: _nothing for key, hook in table.items() if not _is_torch(hook)})
            for index in self.active:
                table, key, hook = self.sites[index]
                table[key] = self._watch(index, hook)
            yield
        finally:
            for table, was in zip(tables, before, strict=True):
                table.clear()
                table.update(was)

    def _watch(self, index: int, hook: Hook) -> Hook:
        @wraps(hook)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
                result = hook(*args, **kwargs)
            if result is not None:
                self.active.add(index)
            return result

        return watched
