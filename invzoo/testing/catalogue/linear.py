"""Linear layers and convolutions."""

from functools import partial

from torch import nn

import invzoo as iz

from ...module import InvertibleModule
from ..entries import Case, Entry
from ..inputs import Shape
from .nets import with_context

__all__ = ["LINEAR"]


def _matrix_cases(
    layer: type[iz.InvertibleLinear | iz.InvertibleConv1x1], size: int, shape: Shape, wide: int
) -> list[Case]:
    """Return a case for each kind of matrix, a wide one of those that can be, and one with a context."""

    def conditioned(kind: str) -> InvertibleModule:
        numbers = layer(size, kind=kind).num_parameters
        return layer(size, kind=kind, conditioner=nn.Linear(2, numbers))

    orthonormal = ("householder", "cayley", "scaled")
    kinds = (*orthonormal, "plu", "free")
    square = [Case(partial(layer, size, kind=kind), shape, id=kind) for kind in kinds]
    wider = [Case(partial(layer, size, wide, kind=kind), shape, id=f"wide {kind}") for kind in orthonormal]
    side: dict[str, Shape] = {"context": (2,)}
    contexts = [Case(partial(conditioned, kind), shape, id=f"{kind}, context", side=side) for kind in kinds]
    return [*square, *wider, *contexts]


LINEAR: tuple[Entry, ...] = (
    Entry(
        iz.InvertibleLinear,
        "y = W x + b over the last dim",
        "log abs det W at each position",
        *_matrix_cases(iz.InvertibleLinear, 4, (3, 4), 6),
    ),
    Entry(
        iz.InvertibleConv1x1,
        "y = W x + b over the channels",
        "log abs det W at each pixel",
        *_matrix_cases(iz.InvertibleConv1x1, 3, (3, 2, 3), 5),
    ),
    Entry(
        iz.WoodburyLinear,
        "y = (D + U V^T) x + b along one dim, D diagonal, U and V of low rank",
        "sum s + log det(I + V^T D^-1 U) at each position",
        Case(lambda: iz.WoodburyLinear(4, 2), (3, 4)),
        Case(lambda: iz.WoodburyLinear(3, 1, dim=1, bias=False), (3, 2, 2), id="channels"),
    ),
    Entry(
        iz.InvertiblePatchConv,
        "y = W x + b for each patch of pixels, of all channels",
        "log abs det W at each patch",
        Case(lambda: iz.InvertiblePatchConv(2, None, (1, 2)), (2, 2, 4)),
        Case(lambda: iz.InvertiblePatchConv(1, kind="plu"), (1, 2, 4), id="plu"),
        Case(lambda: iz.InvertiblePatchConv(2, 5, (2,), kind="cayley"), (2, 4), id="wide"),
        with_context(3, lambda: iz.InvertiblePatchConv(1, kind="scaled", conditioner=nn.Linear(3, 40)), (1, 2, 4)),
    ),
    Entry(
        iz.OrthogonalDownsample,
        "(c, h p, w q) -> (c p q, h, w), each channel's cells times a learned orthogonal matrix",
        "0",
        Case(lambda: iz.OrthogonalDownsample(2, 2), (2, 2, 4)),
        Case(lambda: iz.OrthogonalDownsample(2, (3,), init="dct", kind="cayley"), (2, 6), id="dct"),
        Case(lambda: iz.OrthogonalDownsample(1, (1, 2, 2), init="random"), (1, 2, 2, 2), id="random"),
    ),
    Entry(
        iz.OrthogonalUpsample,
        "(c p q, h, w) -> (c, h p, w q), the same the other way round",
        "0",
        Case(lambda: iz.OrthogonalUpsample(8, 2), (8, 1, 2)),
        Case(lambda: iz.OrthogonalUpsample(4, (2,), kind="cayley"), (4, 3), id="cayley"),
    ),
    Entry(
        iz.EmergingConv,
        "y = A' A x + b, two k x k convolutions that are triangular",
        "pixels times the sum of all s",
        Case(lambda: iz.EmergingConv(2, 3), (2, 3, 2)),
        Case(lambda: iz.EmergingConv(2, (3,), bias=False), (2, 4), id="sequence"),
        Case(lambda: iz.EmergingConv(2, 2, mask="corner"), (2, 2, 3), id="corner"),
        cost="a run and one step for each pixel of an edge",
    ),
    Entry(
        iz.PeriodicConv,
        "y = K * x + b, k x k and around the edges",
        "log abs det K_f over all frequencies f",
        Case(lambda: iz.PeriodicConv(2, 3), (2, 3, 2)),
        Case(lambda: iz.PeriodicConv(2, (2,), bias=False), (2, 5), id="sequence"),
        Case(lambda: iz.PeriodicConv(2, (5, 2)), (2, 2, 3), id="larger than its image"),
        Case(lambda: iz.PeriodicConv(2, (3, 1, 2)), (2, 3, 2, 4), id="volumes"),
    ),
)
