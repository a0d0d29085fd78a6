"""The engine: frees what backward needs after forward, and rebuilds it. It knows callables and tensors, no layers."""

from ._torch import functorch_active, is_fake, tracing, version_of
from .call import call
from .callables import SideNames, modules_of, unregistered
from .chain import chain
from .checkpoint import checkpoint
from .fingerprint import tolerance
from .freeing import freeing
from .methods import CompiledMethods
from .mode import Mode, Policy, check_of, mode_of
from .nested import map_tensors
from .operation import Operation, Through
from .state import inside_container, place, steps_aside, transformed, unrecorded
from .tape import Tape, tuple_of
from .uncompiled import uncompiled

__all__ = [
    "CompiledMethods",
    "Mode",
    "Operation",
    "Policy",
    "SideNames",
    "Tape",
    "Through",
    "call",
    "chain",
    "check_of",
    "checkpoint",
    "freeing",
    "functorch_active",
    "inside_container",
    "is_fake",
    "map_tensors",
    "mode_of",
    "modules_of",
    "place",
    "steps_aside",
    "tolerance",
    "tracing",
    "transformed",
    "tuple_of",
    "uncompiled",
    "unrecorded",
    "unregistered",
    "version_of",
]
