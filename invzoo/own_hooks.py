"""Hooks on a module itself, and torch's older tools that compute a parameter in one, which no layer can have."""

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune

from .errors import refuse

__all__ = ["check_hook", "has_hooks"]

_TOOLS = {"torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.prune"}


def has_hooks(module: nn.Module) -> bool:
    """Whether there are hooks on a module, or on all modules, which a call fires."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or torch_module._has_any_global_hook()


def check_hook(layer: nn.Module, hook: Any) -> None:
    """Refuse a hook that computes a parameter of the layer itself, and put the parameter back.

    ``layer(x)`` alone calls hooks, so ``inverse`` and ``forward_and_log_det`` would go by the value of the last call.
    """
    if not any(kind.__module__ in _TOOLS for kind in type(hook).__mro__):
        return
    if isinstance(hook, prune.BasePruningMethod):
        name = hook._tensor_name
        delattr(layer, name)
        delattr(layer, f"{name}_mask")  # torch puts the parameter back
    else:
        name = hook.name
        was = getattr(layer, f"{name}_orig", None)
        was = getattr(layer, f"{name}_v") if was is None else was
        hook.remove(layer)
        setattr(layer, name, was if isinstance(was, nn.Parameter) else nn.Parameter(was))
    expected = "be computed by a parametrization of torch.nn.utils.parametrize, which every method sees"
    refuse(layer, name, expected, f"{type(hook).__name__}, a hook that layer(x) alone calls", TypeError)
