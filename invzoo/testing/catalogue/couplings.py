"""Couplings and autoregressive layers."""

import invzoo as iz

from ...layers.maps.mixture import MixtureOfLogistics
from ...layers.maps.spline import RationalQuadratic
from ..entries import Case, Entry
from .nets import Conditioned, convolutions, subnet, with_context

__all__ = ["COUPLINGS"]

COUPLINGS: tuple[Entry, ...] = (
    # ---- couplings ----
    Entry(
        iz.AdditiveCoupling,
        "y1 = x1 + f(x2), y2 = x2 + g(y1)",
        "0",
        Case(lambda: iz.AdditiveCoupling(subnet(3, 3), subnet(3, 3)), (6,)),
        Case(lambda: iz.AdditiveCoupling(subnet(2, 3)), (5,), id="one-sided"),
        Case(lambda: iz.AdditiveCoupling(subnet(3, 2), subnet(2, 3), split="interleave", swap=True), (5,), id="swap"),
        Case(lambda: iz.AdditiveCoupling(subnet(4, 1), subnet(1, 4), split=(1, 4)), (5,), id="sizes"),
        Case(lambda: iz.AdditiveCoupling(subnet(2, 2), subnet(2, 2), swap=True), (2,), (2,), id="streams"),
        Case(lambda: iz.AdditiveCoupling(convolutions(2, 2), split="checkerboard"), (2, 3, 2), id="checkerboard"),
        with_context(3, lambda: iz.AdditiveCoupling(Conditioned(2, 3, 2)), (4,)),
    ),
    Entry(
        iz.AffineCoupling,
        "y1 = x1 exp(s(x2)) + t(x2), y2 likewise",
        "sum of s",
        Case(lambda: iz.AffineCoupling(subnet(3, 6), subnet(3, 6)), (6,)),
        Case(lambda: iz.AffineCoupling(subnet(2, 6), scale="softclip"), (5,), id="softclip"),
        Case(lambda: iz.AffineCoupling(subnet(2, 4), scale="sigmoid", split="interleave"), (4,), id="sigmoid"),
        Case(lambda: iz.AffineCoupling(subnet(2, 4), scale="unit", zero_init=True), (4,), id="unit"),
        Case(lambda: iz.AffineCoupling(subnet(2, 4), scale="exp", swap=True), (4,), id="exp"),
        Case(lambda: iz.AffineCoupling(subnet(1, 6), subnet(3, 2), split=0.25, swap=True), (4,), id="fraction"),
        Case(lambda: iz.AffineCoupling(convolutions(2, 4), split="checkerboard"), (2, 3, 2), id="checkerboard"),
        Case(lambda: iz.AffineCoupling(subnet(2, 4), dim=-1), (2,), (2,), id="streams"),
        Case(lambda: iz.AffineCoupling(subnet(2, 4), dim=-1), (3, 4), id="last"),
        with_context(3, lambda: iz.AffineCoupling(Conditioned(2, 3, 4)), (4,)),
    ),
    Entry(
        iz.GINCoupling,
        "as AffineCoupling, the log-scales of a sample centred",
        "0",
        Case(lambda: iz.GINCoupling(subnet(3, 6), subnet(3, 6)), (6,)),
    ),
    Entry(
        iz.RationalQuadraticCoupling,
        "y1 = spline(x1) with bins and slopes from x2, y2 likewise",
        "sum of log slopes",
        Case(lambda: iz.RationalQuadraticCoupling(subnet(3, 33), subnet(3, 33), bins=4), (6,)),
        Case(lambda: iz.RationalQuadraticCoupling(subnet(2, 18), bins=3, tails="circular"), (4,), id="circular"),
        Case(lambda: iz.RationalQuadraticCoupling(subnet(2, 20), bins=3, tails=None), (4,), id="no_tails"),
        Case(
            lambda: iz.RationalQuadraticCoupling(convolutions(2, 10), bins=2, split="checkerboard"),
            (2, 3, 2),
            id="checkerboard",
        ),
        with_context(3, lambda: iz.RationalQuadraticCoupling(Conditioned(2, 3, 46)), (4,)),
    ),
    Entry(
        iz.MixtureLogisticCoupling,
        "y1 = e^a logit(F(x1)) + b, F a mixture of logistics from x2, y2 likewise",
        "sum of log slopes",
        Case(lambda: iz.MixtureLogisticCoupling(subnet(3, 24), subnet(3, 24), components=2), (6,)),
        with_context(3, lambda: iz.MixtureLogisticCoupling(Conditioned(2, 3, 28)), (4,)),
        cost="a run, and 10 to 25 of the mixture",
    ),
    # ---- autoregressive layers ----
    Entry(
        iz.MaskedAutoregressive,
        "y[i] = map(x[i]) with parameters from x[0], ..., x[i - 1]",
        "sum of log slopes",
        Case(lambda: iz.MaskedAutoregressive(3, (6, 4)), (3,)),
        Case(lambda: iz.MaskedAutoregressive(3, (5,), map="shift", order="reversed"), (2, 3), id="shift"),
        Case(lambda: iz.MaskedAutoregressive(3, (4,), map="spline", order="random"), (3,), id="spline"),
        Case(lambda: iz.MaskedAutoregressive(3, (4,), map=MixtureOfLogistics(2)), (3,), id="mixture"),
        Case(lambda: iz.MaskedAutoregressive(3, (4,), map=RationalQuadratic(3, tails=None)), (3,), id="no_tails"),
        with_context(2, lambda: iz.MaskedAutoregressive(3, (6, 4), context_features=2), (3,)),
        cost="a run, in a step for each feature",
    ),
)
