"""The catalogue: one entry per layer class, which the tests, the README's table and ``invzoo zoo`` read.

To add a layer, add one :class:`Entry` to the file of its family; ``invzoo zoo --markdown`` writes the README's rows::

    Entry(iz.Tanh, "tanh(x)", "sum log(1 - y^2)", Case(iz.Tanh, (3, 4))),

with the class, its map and its log-determinant in words ("0" if it keeps volumes, "none" if it has none), and a
:class:`Case` for each variant that is worth a test of its own::

    Case(lambda: iz.Linear(6, kind="plu"), (6,), id="plu"),
    Case(lambda: iz.Conditioned(net), (6,), id="images", side={"context": (1, 2, 4)}),
    with_context(2, lambda: iz.Conditioned(6, nn.Linear(2, 6)), (6,)),

Shapes are those of one sample, without the batch. Several shapes are several inputs. Inputs are drawn inside the
layer's ``domain``; where that says too little (values away from a kink, integers), give ``draw``. Keep shapes small:
every property is checked on every case. The map is also the text of the README's row, beside what a call keeps in mode
``invert``: its input, if the layer is ``saturating`` or has a ``slow_inverse``, else nothing, unless ``keeps`` says so.

What a layer cannot do is said in its case, with the arguments of :func:`invzoo.testing.assert_invertible`:
``independent_samples=False`` (a batch norm), ``kept_bytes=...`` (by each call in mode ``invert``), tolerances of
iterative inverses, and ``without={"assert_gradients": "the gradient is straight-through"}`` for a whole assertion, with
the reason.
"""

from collections.abc import Iterator

from ..entries import Case, Entry
from .activations import ACTIVATIONS
from .containers import CONTAINERS
from .couplings import COUPLINGS
from .linear import LINEAR
from .monotone import MONOTONE
from .normalisation import NORMALISATION
from .rearrangements import REARRANGEMENTS
from .residual import RESIDUAL
from .surjections import SURJECTIONS

__all__ = ["CATALOGUE", "FAMILIES", "cases", "tables"]

FAMILIES: dict[str, tuple[Entry, ...]] = {
    "Couplings and autoregressive layers": COUPLINGS,
    "Matrices and convolutions": LINEAR,
    "Scales and normalisations": NORMALISATION,
    "Activations": ACTIVATIONS,
    "Monotone functions": MONOTONE,
    "Residual blocks": RESIDUAL,
    "Orders, shapes and transforms": REARRANGEMENTS,
    "Surjections": SURJECTIONS,
    "Containers and blocks": CONTAINERS,
}
CATALOGUE: tuple[Entry, ...] = tuple(entry for family in FAMILIES.values() for entry in family)


def cases() -> Iterator[Case]:
    """Yield every case of every layer."""
    for entry in CATALOGUE:
        yield from entry.cases


def tables() -> str:
    """Return the tables of the layers in Markdown, family by family: those of the README."""
    lines = []
    for family, entries in FAMILIES.items():
        lines += [f"### {family}", "", "| layer | map | kept in mode `invert` |", "|---|---|---|"]
        lines += [f"| `{entry.name}` | {entry.map} | {entry.keeps} |" for entry in entries]
        lines.append("")
    return "\n".join(lines)
