"""The engine: frees what backward needs after forward, and rebuilds it. It knows callables and tensors, no layers."""

from .call import Operation, Tape, call, place, steps_aside, tuple_of
from .callables import modules_of
from .mode import Mode, Policy, check_of

__all__ = ["Mode", "Operation", "Policy", "Tape", "call", "check_of", "modules_of", "place", "steps_aside", "tuple_of"]
