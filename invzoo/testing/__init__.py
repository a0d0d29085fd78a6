"""What a layer must do, as assertions for any layer, and the catalogue of this library's layers."""

from .assertions import ASSERTIONS, assert_invertible, assertions_of
from .catalogue import CATALOGUE, cases
from .entries import Case, Entry
from .modes import assert_memory, assert_modes_agree
from .modules import assert_inputs_unchanged, assert_portable, assert_trainable
from .values import assert_batch_sizes, assert_dtypes, assert_gradients, assert_log_det, assert_round_trip

__all__ = [
    "ASSERTIONS",
    "CATALOGUE",
    "Case",
    "Entry",
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
]
