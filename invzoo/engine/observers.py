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


def _tables(modules: Iterable[nn.Module]) -> list[dict[int, Hook]]:
    tables = [t for m in modules for t in (m._forward_pre_hooks, m._forward_hooks) if t]
    tables += [getattr(torch_module, name, {}) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")]
    return list({id(table): table for table in tables if table}.values())  # a shared module comes twice


class Observers:
    """The users' forward and pre-forward hooks on some modules, and on all modules.

    What autograd saves inside a hook is kept as it is, since a replay does not run the hook. One that returns a value
    changes what the function computes, so it runs in replays as well.
    """

    __slots__ = ("active", "modules")

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self.active: dict[tuple[int, int], tuple[dict[int, Hook], int, Hook]] = {}  # those that returned a value

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """During forward: learn which hooks return a value, and keep what autograd saves inside them."""
        sites = [(t, key, hook) for t in _tables(self.modules) for key, hook in t.items() if not _is_torch(hook)]
        for site in sites:
            site[0][site[1]] = self._watch(*site)
        try:
            yield
        finally:
            for table, key, hook in sites:
                if key in table:  # a hook may remove itself
                    table[key] = hook

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """During a replay: run torch's own hooks, and of the users' those alone that returned a value in forward."""
        tables = _tables(self.modules) + [table for table, _, _ in self.active.values()]
        tables = list({id(table): table for table in tables}.values())
        before = [dict(table) for table in tables]
        try:
            for table in tables:
                table.update({key: _nothing for key, hook in table.items() if not _is_torch(hook)})
            self.arm()
            yield
        finally:
            for table, was in zip(tables, before, strict=True):
                table.clear()
                table.update(was)

    def arm(self) -> None:
        """Put the hooks that returned a value in place, though one may have removed itself since."""
        for table, key, hook in self.active.values():
            table[key] = self._watch(table, key, hook)

    def _watch(self, table: dict[int, Hook], key: int, hook: Hook) -> Hook:
        @wraps(hook)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
                result = hook(*args, **kwargs)
            if result is not None:
                self.active[id(table), key] = (table, key, hook)
            return result

        return watched
