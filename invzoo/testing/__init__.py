"""What a layer must do, as assertions for any layer, and the catalogue of this library's layers.

:func:`assert_invertible` makes all assertions on a layer of yours, and :class:`track_memory` counts the bytes that it
holds. ``strategies`` draws inputs and stacks of layers; it needs hypothesis, which nothing else here does.
"""

from importlib import import_module
from typing import Any

from .assertions import ASSERTIONS, assert_invertible, assertions_of
from .catalogue import CATALOGUE, cases
from .entries import Case, Entry
from .inputs import Draw, Shape, draw_from
from .memory import track_memory
from .modes import assert_memory, assert_modes_agree
from .modules import assert_inputs_unchanged, assert_portable, assert_trainable
from .values import assert_batch_sizes, assert_dtypes, assert_gradients, assert_log_det, assert_round_trip

__all__ = [
    "ASSERTIONS",
    "CATALOGUE",
    "Case",
    "Draw",
    "Entry",
    "Shape",
    "assert_batch_sizes",
    "assert_dtypes",
    "assert_gradients",
    "assert_inputs_unchanged",
    "assert_invertible",
    "assert_log_det",
    "assert_memory",
    "assert_modes_agree",
    "assert_portable",
    "assert_round_trip",
    "assert_trainable",
    "assertions_of",
    "cases",
    "draw_from",
    "strategies",
    "track_memory",
]


def __getattr__(name: str) -> Any:
    if name != "strategies":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(".strategies", __name__)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError("invzoo.testing.strategies needs hypothesis; pip install hypothesis") from error
