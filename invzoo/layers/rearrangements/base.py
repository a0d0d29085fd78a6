"""What layers that only move entries have in common."""

from ...module import InvertibleModule

__all__ = ["Rearrangement"]


class Rearrangement(InvertibleModule):
    """The same entries in other places, none of them changed. Abstract."""

    volume_preserving = True
    rearranges = True
    exact = True
