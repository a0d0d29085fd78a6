"""The engine: frees what backward needs after forward, and rebuilds it. It knows callables and tensors, no layers."""

from ._torch import functorch_active, is_fake, tracing, version_of
from .checkpoint import checkpoint
from .dispatch import run_chain
from .eager.call import call
from .eager.freeing import freeing
from .eager.tape import Tape
from .fingerprint import tolerance
from .nested import map_tensors, tuple_of
from .operation import Operation, Through
from .policy import Mode, Policy, check_of, mode_of
from .signatures import SideNames, modules_of, unregistered
from .state import inside_container, place, steps_aside, transformed, unrecorded
from .uncompiled import uncompiled

__all__ = [
    "Mode",
    "Operation",
    "Policy",
    "SideNames",
    "Tape",
    "Through",
    "call",
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
    "run_chain",
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
