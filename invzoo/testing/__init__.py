"""What a layer must do, as assertions for any layer, and the catalogue of this library's layers."""

from .catalogue import CATALOGUE, Case, Entry, cases

__all__ = ["CATALOGUE", "Case", "Entry", "cases"]
