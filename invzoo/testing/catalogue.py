"""The catalogue: one entry per layer class, which the tests, the README's table and ``invzoo zoo`` read.

To add a layer, add one :class:`Entry` to :data:`CATALOGUE`, in the section of its family::

    Entry(iz.Tanh, "tanh(x)", "sum log(1 - y^2)", Case(iz.Tanh, (3, 4)), keeps="its input"),

with the class, its map and its log-determinant in words ("0" if it keeps volumes, "none" if it has none), and a
:class:`Case` for each variant that is worth a test of its own::

    Case(lambda: iz.Linear(6, kind="plu"), (6,), id="plu"),
    Case(lambda: iz.Conditioned(6, nn.Linear(2, 6)), (6,), id="context", side={"context": (2,)}),

Shapes are those of one sample, without the batch. Several shapes are several inputs. Inputs are drawn inside the
layer's ``domain``; where that says too little (values away from a kink, integers), give ``draw``. Keep shapes small:
every property is checked on every case. The map is also the text of the README's row.

What a layer cannot do is said in its case, with the arguments of :func:`invzoo.testing.assert_invertible`:
``independent_samples=False`` (a batch norm), ``kept_bytes=...`` (per layer in mode ``invert``), and
``without={"assert_gradients": "the gradient is straight-through"}`` for a whole assertion, with the reason.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import invzoo as iz

from ..module import InvertibleModule
from .entries import Case, Entry
from .inputs import Shape

__all__ = ["CATALOGUE", "cases"]


def cases() -> Iterator[Case]:
    """Yield every case of every layer."""
    for entry in CATALOGUE:
        yield from entry.cases


def _subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def _convolutions(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, outputs, 1))


class _Conditioned(nn.Module):
    """A subnet that sees a context."""

    def __init__(self, inputs: int, context: int, outputs: int) -> None:
        super().__init__()
        self.net = _subnet(inputs + context, outputs)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat((x, context), 1))


def _matrix_cases(layer: Callable[..., InvertibleModule], size: int, shape: Shape, wide: int) -> list[Case]:
    """Return a case for each kind of matrix, and a wide one."""
    kinds = ("householder", "cayley", "scaled", "plu", "free")
    square = [Case(lambda kind=kind: layer(size, kind=kind), shape, id=kind) for kind in kinds]  # type: ignore[misc]
    return [*square, Case(lambda: layer(size, wide), shape, id="wide")]


CATALOGUE: tuple[Entry, ...] = (
    # ---- couplings ----
    Entry(
        iz.AdditiveCoupling,
        "y1 = x1 + f(x2), y2 = x2 + g(y1)",
        "0",
        Case(lambda: iz.AdditiveCoupling(_subnet(3, 3), _subnet(3, 3)), (6,)),
        Case(lambda: iz.AdditiveCoupling(_subnet(2, 3)), (5,), id="one-sided"),
        Case(lambda: iz.AdditiveCoupling(_subnet(2, 2), _subnet(2, 2), swap=True), (2,), (2,), id="streams"),
        Case(lambda: iz.AdditiveCoupling(_convolutions(2, 2), split="checkerboard"), (2, 3, 2), id="checkerboard"),
        Case(lambda: iz.AdditiveCoupling(_Conditioned(2, 3, 2)), (4,), id="context", side={"context": (3,)}),
    ),
    Entry(
        iz.AffineCoupling,
        "y1 = x1 exp(s(x2)) + t(x2), y2 likewise",
        "sum of s",
        Case(lambda: iz.AffineCoupling(_subnet(3, 6), _subnet(3, 6)), (6,)),
        Case(lambda: iz.AffineCoupling(_subnet(2, 6), scale="softclip"), (5,), id="softclip"),
        Case(lambda: iz.AffineCoupling(_subnet(2, 4), scale="sigmoid", split="interleave"), (4,), id="sigmoid"),
        Case(lambda: iz.AffineCoupling(_subnet(2, 4), scale="unit", zero_init=True), (4,), id="unit"),
        Case(lambda: iz.AffineCoupling(_subnet(2, 4), scale="exp", swap=True), (4,), id="exp"),
        Case(lambda: iz.AffineCoupling(_convolutions(2, 4), split="checkerboard"), (2, 3, 2), id="checkerboard"),
        Case(lambda: iz.AffineCoupling(_Conditioned(2, 3, 4)), (4,), id="context", side={"context": (3,)}),
    ),
    Entry(
        iz.GINCoupling,
        "as AffineCoupling, the log-scales of a sample centred",
        "0",
        Case(lambda: iz.GINCoupling(_subnet(3, 6), _subnet(3, 6)), (6,)),
    ),
    # ---- linear layers and convolutions ----
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
    # ---- activations ----
    Entry(
        iz.InvertibleLeakyReLU,
        "x where x > 0, slope x elsewhere",
        "sum of log slope over x < 0",
        Case(iz.InvertibleLeakyReLU, (3, 4)),
        Case(lambda: iz.InvertibleLeakyReLU(2.0), (5,), id="steep"),
    ),
    Entry(
        iz.InvertibleSigmoid,
        "1 / (1 + exp(-x))",
        "-sum(softplus(x) + softplus(-x))",
        Case(iz.InvertibleSigmoid, (3, 4)),
        keeps="its input",
    ),
    Entry(
        iz.InvertibleLogit,
        "log(x) - log(1 - x)",
        "-sum(log(x) + log(1 - x))",
        Case(iz.InvertibleLogit, (3, 4)),
        keeps="its input",
    ),
    Entry(
        iz.InvertibleTanh,
        "tanh(x)",
        "2 sum(log 2 - x - softplus(-2 x))",
        Case(iz.InvertibleTanh, (3, 4)),
        keeps="its input",
    ),
    Entry(
        iz.InvertibleAtanh,
        "atanh(x)",
        "-sum(log(1 + x) + log(1 - x))",
        Case(iz.InvertibleAtanh, (3, 4)),
        keeps="its input",
    ),
    Entry(iz.Identity, "x", "0", Case(iz.Identity, (3,))),
    # ---- orders, splits ----
    Entry(
        iz.Permute,
        "y[i] = x[permutation[i]]",
        "0",
        Case(lambda: iz.Permute([2, 0, 1]), (3,)),
        Case(lambda: iz.Permute([1, 0], dim=-1), (3, 2), id="last"),
    ),
    Entry(iz.Shuffle, "the same with a random order", "0", Case(lambda: iz.Shuffle(5), (5, 2))),
    Entry(iz.Reverse, "y[i] = x[n - 1 - i]", "0", Case(iz.Reverse, (3, 2))),
    Entry(
        iz.Swap,
        "(x1, x2) -> (x2, x1)",
        "0",
        Case(iz.Swap, (4,)),
        Case(iz.Swap, (5, 2), id="odd"),
        Case(iz.Swap, (3,), (2,), id="streams"),
    ),
    Entry(
        iz.Interleave,
        "[a0 a1 b0 b1] -> [a0 b0 a1 b1]",
        "0",
        Case(iz.Interleave, (4,)),
        Case(iz.Interleave, (5, 2), id="odd"),
    ),
    Entry(
        iz.Deinterleave,
        "[a0 b0 a1 b1] -> [a0 a1 b0 b1]",
        "0",
        Case(iz.Deinterleave, (4,)),
        Case(iz.Deinterleave, (5, 2), id="odd"),
    ),
    Entry(
        iz.Split,
        "x -> (x1, x2)",
        "0",
        Case(iz.Split, (4,)),
        Case(lambda: iz.Split(split="interleave"), (5, 2), id="interleave"),
        Case(lambda: iz.Split(split=(1, 3)), (4,), id="sizes"),
    ),
    Entry(
        iz.Merge,
        "(x1, x2) -> x",
        "0",
        Case(iz.Merge, (2,), (2,)),
        Case(lambda: iz.Merge(split="interleave"), (3, 2), (2, 2), id="interleave"),
    ),
    # ---- containers ----
    Entry(
        iz.InvertibleSequential,
        "one layer after the other",
        "sum of its layers'",
        Case(
            lambda: iz.InvertibleSequential(
                iz.AffineCoupling(_subnet(2, 4)), iz.Swap(), iz.InvertibleLinear(4), iz.InvertibleLeakyReLU(0.5)
            ),
            (4,),
        ),
        Case(
            lambda: iz.InvertibleSequential(iz.AffineCoupling(_Conditioned(2, 3, 4)), iz.Reverse()),
            (4,),
            id="context",
            side={"context": (3,)},
        ),
        cost="sum of its layers'",
        keeps="what its layers keep",
    ),
    Entry(
        iz.Repeat,
        "one layer several times",
        "sum of its layer's",
        Case(lambda: iz.Repeat(iz.InvertibleSequential(iz.AffineCoupling(_subnet(2, 4)), iz.Reverse()), 3), (4,)),
        cost="that of its layer",
        keeps="what its layer keeps, each time",
    ),
    Entry(
        iz.Parallel,
        "(x1, ..., xn) -> (layer1(x1), ..., layern(xn))",
        "sum of its layers'",
        Case(lambda: iz.Parallel(iz.AffineCoupling(_subnet(2, 4)), iz.Reverse(), sizes=(4, 2)), (6,)),
        Case(lambda: iz.Parallel(*(iz.AffineCoupling(_subnet(1, 2)) for _ in range(3))), (2,), (2,), (2,), id="parts"),
        cost="sum of its layers'",
        keeps="what its layers keep",
    ),
    Entry(
        iz.MultiScale,
        "x -> (z1, ..., zn), a latent after each stage",
        "sum of its stages'",
        Case(lambda: iz.MultiScale(iz.AffineCoupling(_subnet(4, 8)), iz.AffineCoupling(_subnet(2, 4))), (8,)),
        Case(lambda: iz.MultiScale(iz.AffineCoupling(_subnet(2, 4)), iz.Reverse(), input_shape=(4,)), (4,), id="cat"),
        cost="sum of its stages'",
        keeps="what its stages keep",
    ),
)
