"""What a layer must do, as assertions for any layer, and the catalogue of this library's layers."""

from .catalogue import CATALOGUE, cases
from .entries import Case, Entry

__all__ = ["CATALOGUE", "Case", "Entry", "cases"]
