"""Containers and blocks."""

import invzoo as iz

from ..entries import Case, Entry
from .nets import Conditioned, after_a_batch, convolutions, subnet, with_context

__all__ = ["CONTAINERS"]

CONTAINERS: tuple[Entry, ...] = (
    # ---- containers ----
    Entry(iz.Identity, "x", "0", Case(iz.Identity, (3,))),
    Entry(
        iz.InvertibleSequential,
        "one layer after the other",
        "sum of its layers'",
        Case(
            lambda: iz.InvertibleSequential(
                iz.AffineCoupling(subnet(2, 4)), iz.Swap(), iz.InvertibleLinear(4), iz.InvertibleLeakyReLU(0.5)
            ),
            (4,),
        ),
        with_context(3, lambda: iz.InvertibleSequential(iz.AffineCoupling(Conditioned(2, 3, 4)), iz.Reverse()), (4,)),
        cost="sum of its layers'",
        keeps="what its layers keep",
    ),
    Entry(
        iz.Repeat,
        "one layer several times",
        "sum of its layer's",
        Case(lambda: iz.Repeat(iz.InvertibleSequential(iz.AffineCoupling(subnet(2, 4)), iz.Reverse()), 3), (4,)),
        cost="that of its layer",
        keeps="what its layer keeps, each time",
    ),
    Entry(
        iz.Parallel,
        "(x1, ..., xn) -> (layer1(x1), ..., layern(xn))",
        "sum of its layers'",
        Case(lambda: iz.Parallel(iz.AffineCoupling(subnet(2, 4)), iz.Reverse(), sizes=(4, 2)), (6,)),
        Case(lambda: iz.Parallel(*(iz.AffineCoupling(subnet(1, 2)) for _ in range(3))), (2,), (2,), (2,), id="parts"),
        cost="sum of its layers'",
        keeps="what its layers keep",
    ),
    Entry(
        iz.MultiScale,
        "x -> (z1, ..., zn), a latent after each stage",
        "sum of its stages'",
        Case(lambda: iz.MultiScale(iz.AffineCoupling(subnet(4, 8)), iz.AffineCoupling(subnet(2, 4))), (8,)),
        Case(lambda: iz.MultiScale(iz.AffineCoupling(subnet(2, 4)), iz.Reverse(), input_shape=(4,)), (4,), id="cat"),
        Case(
            lambda: iz.MultiScale(
                iz.AffineCoupling(subnet(4, 8)),
                iz.InvertibleSequential(iz.Swap(), iz.AffineCoupling(subnet(1, 2))),
                split=0.25,
            ),
            (8,),
            id="unequal",
        ),
        cost="sum of its stages'",
        keeps="what its stages keep",
    ),
    # ---- blocks ----
    Entry(
        iz.GlowStep,
        "coupling(W actnorm(x) + b)",
        "sum of its layers'",
        Case(lambda: after_a_batch(iz.GlowStep(3, convolutions(1, 4)), 3, 2, 4), (3, 2, 4)),
        Case(
            lambda: after_a_batch(iz.GlowStep(4, subnet(2, 4), kind="plu", dim=-1, scale="sigmoid"), 4),
            (4,),
            id="vectors",
        ),
        Case(
            lambda: after_a_batch(iz.GlowStep(4, Conditioned(2, 3, 4), dim=-1), 4, context=3),
            (4,),
            id="context",
            side={"context": (3,)},
        ),
    ),
    Entry(
        iz.HINTCoupling,
        "(x1, x2) -> (h1(x1), h2(x2 exp(s(x1)) + t(x1))), h1 and h2 likewise",
        "sum over its couplings",
        Case(lambda: iz.HINTCoupling(5, subnet), (5,)),
        Case(lambda: iz.HINTCoupling(4, convolutions, depth=1), (4, 2, 2), id="images"),
        with_context(3, lambda: iz.HINTCoupling(4, lambda n, m: Conditioned(n, 3, m), depth=2), (4,)),
    ),
    Entry(
        iz.Inverse,
        "layer.inverse(x)",
        "minus its layer's",
        Case(lambda: iz.Inverse(iz.InvertibleLinear(4, kind="plu")), (4,)),
        with_context(3, lambda: iz.Inverse(iz.AffineCoupling(Conditioned(2, 3, 4))), (4,)),
        cost="1x",
        keeps="what its layer keeps",
    ),
)
