"""Forward hooks on the modules inside a call: they fire in forward, and not again in its replay."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as torch_module

__all__ = ["Observers"]

Hook = Callable[..., Any]


def _is_torch(hook: Any) -> bool:
    """Whether a hook is torch's own (spectral norm, pruning, FSDP): part of the computation, so it runs in replays."""
    hook = getattr(hook, "func", hook)  # functools.partial
    owner = getattr(hook, "__module__", None) or type(hook).__module__
    return owner.split(".")[0] == "torch"


class _StandIn:
    """Stands in a module's table for a user's hook, and lets the thread that calls it decide whether it runs."""

    __slots__ = ("hook", "users")

    def __init__(self, hook: Hook):
        self.hook = hook
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _thread.run(self.hook, args, kwargs)


def _plainly(hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return hook(*args, **kwargs)


class _Thread(threading.local):
    run: Callable[[Hook, tuple[Any, ...], dict[str, Any]], Any] = staticmethod(_plainly)


_thread = _Thread()
_lock = threading.Lock()
_Site = tuple[dict[int, Hook], int, Hook]
_NOTHING = contextlib.nullcontext()
_pre_hooks, _hooks = attrgetter("_forward_pre_hooks"), attrgetter("_forward_hooks")
_GLOBAL = [getattr(torch_module, name, {}) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")]


def _is_watched(modules: list[nn.Module]) -> bool:
    """Whether there are any hooks on these modules or on all modules, torch's own among them."""
    return any(map(_pre_hooks, modules)) or any(map(_hooks, modules)) or any(_GLOBAL)


def _sites(modules: list[nn.Module]) -> list[_Site]:
    """Find the users' hooks on these modules and on all modules."""
    if not _is_watched(modules):
        return []
    tables = [*_GLOBAL]
    for m in modules:
        tables += (m._forward_pre_hooks, m._forward_hooks)
    tables = list({id(table): table for table in tables if table}.values())  # a shared module comes twice
    found = [(t, key, hook.hook if isinstance(hook, _StandIn) else hook) for t in tables for key, hook in t.items()]
    return [site for site in found if not _is_torch(site[2])]


@contextlib.contextmanager
def _standing_in(sites: list[_Site], run: Callable[..., Any]) -> Iterator[None]:
    """Run the hooks at these sites, as far as this thread calls them, through ``run``."""
    with _lock:
        held = [(table, key, _stand_in(table, key, hook)) for table, key, hook in sites]
    before, _thread.run = _thread.run, run
    try:
        yield
    finally:
        _thread.run = before
        with _lock:
            for table, key, stand_in in held:
                stand_in.users -= 1
                if not stand_in.users and table.get(key) is stand_in:  # a hook may remove itself
                    table[key] = stand_in.hook


def _stand_in(table: dict[int, Hook], key: int, hook: Hook) -> _StandIn:
    """Put a stand-in in a hook's place, or use the one of another thread."""
    found = table.get(key)
    stand_in = found if isinstance(found, _StandIn) else _StandIn(hook)
    stand_in.users += 1
    table[key] = stand_in
    return stand_in


class Observers:
    """The users' forward and pre-forward hooks on some modules, and on all modules.

    What autograd saves inside a hook is kept as it is, since a replay does not run the hook. One that returns a value,
    sets a tensor of its module or switches its mode changes what the function computes, so it runs in replays as well.
    """

    __slots__ = ("active", "modules")

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self.active: list[_Site] = []  # those whose hooks changed what the function computes

    def present(self) -> bool:
        """Whether a replay might meet a hook."""
        return _is_watched(self.modules)

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """During forward: learn which hooks change it, and keep what autograd saves inside them."""
        sites = _sites(self.modules)
        return self._watch(sites) if sites else _NOTHING

    @contextlib.contextmanager
    def _watch(self, sites: list[_Site]) -> Iterator[None]:
        acted: set[int] = set()

        def run(hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = _traits(args[0])
            result = _run_apart(hook, args, kwargs)
            if result is not None or not _same(before, _traits(args[0])):
                acted.add(id(hook))
            return result

        with _standing_in(sites, run):
            yield
        self.active = [site for site in sites if id(site[2]) in acted]

    def silenced(self) -> contextlib.AbstractContextManager[None]:
        """During a replay: run torch's own hooks, and of the users' those alone that returned a value in forward."""
        gone = [(table, key) for table, key, _ in self.active if key not in table]
        sites = _sites(self.modules) + [(t, k, hook) for t, k, hook in self.active if (t, k) in gone]
        return self._silence(sites, gone) if sites else _NOTHING

    @contextlib.contextmanager
    def _silence(self, sites: list[_Site], gone: list[tuple[dict[int, Hook], int]]) -> Iterator[None]:
        active = {id(hook) for _, _, hook in self.active}
        with _standing_in(sites, lambda hook, *call: _run_apart(hook, *call) if id(hook) in active else None):
            try:
                yield
            finally:
                for table, key in gone:
                    table.pop(key, None)

    def arm(self) -> None:
        """Put the hooks that returned a value in place, though one may have removed itself since."""
        for table, key, hook in self.active:
            if key not in table:
                table[key] = _StandIn(hook)


def _traits(module: nn.Module) -> dict[str, Any]:
    """Return what a module computes with besides its parameters: tensors that are mere attributes, and its mode."""
    return {name: x for name, x in vars(module).items() if isinstance(x, Tensor) or name == "training"}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def _run_apart(hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        return hook(*args, **kwargs)
