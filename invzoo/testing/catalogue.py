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
``independent_samples=False`` (a batch norm), ``kept_bytes=...`` (by each call in mode ``invert``), tolerances of
iterative inverses, and ``without={"assert_gradients": "the gradient is straight-through"}`` for a whole assertion, with
the reason.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

import invzoo as iz

from ..module import InvertibleModule
from .entries import Case, Entry
from .inputs import Draw, Shape

__all__ = ["CATALOGUE", "cases"]


def cases() -> Iterator[Case]:
    """Yield every case of every layer."""
    for entry in CATALOGUE:
        yield from entry.cases


def _subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def _convolutions(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, outputs, 1))


class _Cubic(nn.Module):
    """An increasing function of each value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x + self.a.square() * x**3 + (0 if context is None else context)


class _Conditioned(nn.Module):
    """A subnet that sees a context."""

    def __init__(self, inputs: int, context: int, outputs: int) -> None:
        super().__init__()
        self.net = _subnet(inputs + context, outputs)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat((x, context), 1))


class _Contraction(nn.Module):
    """A subnet with a Lipschitz constant below 0.8, whatever its weights."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(features + context, features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = x if context is None else torch.cat((x, context), 1)
        return 0.8 * torch.tanh(self.linear(h)) / (1 + self.linear.weight.square().sum())


def _matrix_cases(
    layer: type[iz.InvertibleLinear | iz.InvertibleConv1x1], size: int, shape: Shape, wide: int
) -> list[Case]:
    """Return a case for each kind of matrix, and a wide one."""
    kinds = ("householder", "cayley", "scaled", "plu", "free")
    square = [Case(lambda kind=kind: layer(size, kind=kind), shape, id=kind) for kind in kinds]  # type: ignore[misc]

    def conditioned(kind: str) -> InvertibleModule:
        numbers = layer(size, kind=kind).num_parameters
        return layer(size, kind=kind, conditioner=nn.Linear(2, numbers))

    contexts = [
        Case(lambda kind=kind: conditioned(kind), shape, id=f"{kind}, context", side={"context": (2,)})  # type: ignore[misc]
        for kind in ("householder", "scaled", "plu")
    ]
    return [*square, Case(lambda: layer(size, wide), shape, id="wide"), *contexts]


def _after_a_batch(layer: InvertibleModule, *shape: int) -> InvertibleModule:
    """Let a layer see a training batch, away from mean 0 and std 1."""
    with torch.no_grad():
        layer(1 + 2 * torch.randn(20, *shape))
    return layer


class _WithStatistics(InvertibleModule):
    """A layer that normalises each sample, and shows the statistics that its inverse needs."""

    def __init__(self, norm: InvertibleModule) -> None:
        super().__init__()
        self.norm, self._policy = norm, norm._policy

    def function(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.norm.function(x)

    def inverse(self, *outputs: Tensor) -> Tensor:
        return self.norm.inverse(*outputs)

    @property
    def inv(self) -> InvertibleModule:
        return self.norm.inv


def _with_statistics(make: Callable[[], InvertibleModule], *shape: int, id: str = "statistics") -> Case:  # noqa: A002
    without = {
        "assert_dtypes": "statistics stay in float32",
        "assert_memory": "the inverse keeps its inputs, and the forward its statistics",
    }
    return Case(lambda: _WithStatistics(make()), shape, id=id, without=without)


class _Gaussian(_Conditioned):
    """A distribution of features that depends on others and on a context."""

    def __init__(self, inputs: int, context: int, outputs: int) -> None:
        super().__init__(inputs, context, 2 * outputs)

    def forward(self, x: Tensor, context: Tensor) -> Any:
        mean, log_scale = super().forward(x, context).chunk(2, 1)
        return Normal(mean, log_scale.tanh().exp())


def _surjection(
    make: Callable[[], InvertibleModule],
    shape: Shape,
    *,
    id: str = "",  # noqa: A002
    side: dict[str, Shape] | None = None,
    draw: Draw | None = None,
    **without: str,
) -> Case:
    reasons = {
        "assert_round_trip": "what is lost one way is drawn the other way",
        "assert_log_det": "it is a term of a bound, not of a Jacobian",
        "assert_dtypes": "two runs draw two values",
        "assert_trainable": "it asserts a round trip",
        **without,
    }
    return Case(make, shape, id=id, side=side, draw=draw, independent_samples=False, without=reasons)


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
    Entry(
        iz.RationalQuadraticCoupling,
        "y1 = spline(x1) with bins and slopes from x2, y2 likewise",
        "sum of log slopes",
        Case(lambda: iz.RationalQuadraticCoupling(_subnet(3, 33), _subnet(3, 33), bins=4), (6,)),
        Case(lambda: iz.RationalQuadraticCoupling(_subnet(2, 18), bins=3, tails="circular"), (4,), id="circular"),
        Case(
            lambda: iz.RationalQuadraticCoupling(_convolutions(2, 10), bins=2, split="checkerboard"),
            (2, 3, 2),
            id="checkerboard",
        ),
        Case(lambda: iz.RationalQuadraticCoupling(_Conditioned(2, 3, 46)), (4,), id="context", side={"context": (3,)}),
    ),
    Entry(
        iz.MixtureLogisticCoupling,
        "y1 = e^a logit(F(x1)) + b, F a mixture of logistics from x2, y2 likewise",
        "sum of log slopes",
        Case(lambda: iz.MixtureLogisticCoupling(_subnet(3, 24), _subnet(3, 24), components=2), (6,)),
        Case(lambda: iz.MixtureLogisticCoupling(_Conditioned(2, 3, 28)), (4,), id="context", side={"context": (3,)}),
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
        Case(
            lambda: iz.MaskedAutoregressive(3, (6, 4), context_features=2), (3,), id="context", side={"context": (2,)}
        ),
        cost="a run, in a step for each feature",
        keeps="its input",
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
    Entry(
        iz.WoodburyLinear,
        "y = (D + U V^T) x + b along one dim, D diagonal, U and V of low rank",
        "sum s + log det(I + V^T D^-1 U) at each position",
        Case(lambda: iz.WoodburyLinear(4, 2), (3, 4)),
        Case(lambda: iz.WoodburyLinear(3, 1, dim=1, bias=False), (3, 2, 2), id="channels"),
    ),
    Entry(
        iz.InvertiblePatchConv,
        "y = Q x + b for each patch of pixels, Q with orthonormal columns",
        "0",
        Case(lambda: iz.InvertiblePatchConv(2, None, (1, 2)), (2, 2, 4)),
        Case(lambda: iz.InvertiblePatchConv(2, 5, (2,), kind="cayley"), (2, 4), id="wide"),
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
        keeps="its input",
    ),
    Entry(
        iz.PeriodicConv,
        "y = K * x + b, k x k and around the edges",
        "log abs det K_f over all frequencies f",
        Case(lambda: iz.PeriodicConv(2, 3), (2, 3, 2)),
        Case(lambda: iz.PeriodicConv(2, (2,), bias=False), (2, 5), id="sequence"),
    ),
    # ---- splines ----
    Entry(
        iz.RationalQuadraticSpline,
        "spline(x) for each feature",
        "sum of log slopes",
        Case(lambda: iz.RationalQuadraticSpline(3), (3, 2)),
        Case(lambda: iz.RationalQuadraticSpline(3, dim=-1, bins=3, tails="circular"), (2, 3), id="circular"),
        Case(
            lambda: iz.RationalQuadraticSpline(3, bins=4, conditioner=nn.Linear(2, 33)),
            (3, 2),
            id="context",
            side={"context": (2,)},
        ),
    ),
    # ---- scales and shifts, normalisation ----
    Entry(
        iz.ElementwiseAffine,
        "y = e^s x + b for each feature",
        "pixels times the sum of s",
        Case(lambda: iz.ElementwiseAffine(3), (3, 2)),
        Case(lambda: iz.ElementwiseAffine(3, dim=-1, bias=False), (2, 3), id="last"),
        Case(
            lambda: iz.ElementwiseAffine(3, conditioner=nn.Linear(2, 6)), (3, 2), id="context", side={"context": (2,)}
        ),
    ),
    Entry(
        iz.ConditionalAffine,
        "y = exp(s(c)) x + t(c)",
        "sum of s",
        Case(lambda: iz.ConditionalAffine(nn.Linear(2, 6)), (3, 2), side={"context": (2,)}),
        Case(
            lambda: iz.ConditionalAffine(_convolutions(1, 6), scale="softclip"),
            (3, 2, 4),
            id="images",
            side={"context": (1, 2, 4)},
        ),
    ),
    Entry(
        iz.ActNorm,
        "y = e^s (x - mean) / std + b, mean and std of the first batch",
        "pixels times the sum of s - log std",
        Case(lambda: _after_a_batch(iz.ActNorm(3), 3, 2), (3, 2)),
    ),
    Entry(
        iz.InvertibleBatchNorm,
        "y = e^s (x - mean) / std + b, mean and std of the batch, or running ones",
        "pixels times the sum of s - log std",
        Case(lambda: _after_a_batch(iz.InvertibleBatchNorm(3), 3, 2).eval(), (3, 2), id="eval"),
        Case(
            lambda: _after_a_batch(iz.InvertibleBatchNorm(3), 3, 2),
            (3, 2),
            id="training",
            independent_samples=False,
            kept_bytes=256,
            without=dict.fromkeys(
                ("assert_round_trip", "assert_log_det", "assert_dtypes", "assert_trainable"),
                "the public inverse and the log-determinant hold statistics fixed",
            ),
        ),
        keeps="mean and std",
    ),
    Entry(
        iz.InvertibleLayerNorm,
        "y = e^s (x - mean) rstd + b for each token",
        "none",
        _with_statistics(lambda: iz.InvertibleLayerNorm(4), 3, 4),
        _with_statistics(lambda: iz.InvertibleLayerNorm((3, 4), elementwise_affine=False), 3, 4, id="plain"),
        keeps="mean and rstd",
    ),
    Entry(
        iz.InvertibleRMSNorm,
        "y = e^s x rrms for each token",
        "none",
        _with_statistics(lambda: iz.InvertibleRMSNorm(4), 3, 4),
        keeps="rrms",
    ),
    Entry(
        iz.InvertibleGroupNorm,
        "y = e^s (x - mean) rstd + b for each group of channels",
        "none",
        _with_statistics(lambda: iz.InvertibleGroupNorm(2, 4), 4, 3),
        keeps="mean and rstd",
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
        iz.InvertiblePReLU,
        "a x where x > 0, b x elsewhere, a and b learned",
        "sum of log a and log b",
        Case(lambda: iz.InvertiblePReLU(3), (3, 4)),
        Case(lambda: iz.InvertiblePReLU(4, 2.0, dim=-1), (3, 4), id="last"),
        Case(lambda: iz.InvertiblePReLU(3, conditioner=nn.Linear(2, 6)), (3, 2), id="context", side={"context": (2,)}),
    ),
    Entry(
        iz.SneakyReLU,
        "(x + a (sqrt(1 + x^2) - 1)) / (1 + a)",
        "sum of log((1 + a x / sqrt(1 + x^2)) / (1 + a))",
        Case(iz.SneakyReLU, (3, 4)),
    ),
    Entry(
        iz.InvertibleELU,
        "x where x > 0, alpha (exp(x) - 1) elsewhere",
        "sum of x + log alpha over x < 0",
        Case(iz.InvertibleELU, (3, 4)),
        Case(lambda: iz.InvertibleELU(0.5), (5,), id="alpha"),
        keeps="its input",
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
    Entry(
        iz.InvertibleSoftplus,
        "log(1 + exp(x))",
        "-sum softplus(-x)",
        Case(iz.InvertibleSoftplus, (3, 4)),
        keeps="its input",
    ),
    Entry(iz.InvertibleExp, "exp(x)", "sum of x", Case(iz.InvertibleExp, (3, 4)), keeps="its input"),
    Entry(iz.InvertibleLog, "log(x)", "-sum log(x)", Case(iz.InvertibleLog, (3, 4)), keeps="its input"),
    Entry(
        iz.SinhArcsinh,
        "sinh(exp(t) asinh(x) + s), s and t learned",
        "sum of t + log cosh(exp(t) asinh(x) + s) - log cosh(asinh(x))",
        Case(lambda: iz.SinhArcsinh(3), (3, 4)),
        Case(lambda: iz.SinhArcsinh(3, conditioner=nn.Linear(2, 6)), (3, 2), id="context", side={"context": (2,)}),
    ),
    Entry(
        iz.Snake,
        "x + sin(a x)^2 / (2 a), a learned",
        "sum log(1 + sin(2 a x) / 2)",
        Case(lambda: iz.Snake(3), (3, 4)),
        Case(lambda: iz.Snake(3, conditioner=nn.Linear(2, 3)), (3, 2), id="context", side={"context": (2,)}),
        cost="about 8 evaluations",
    ),
    # ---- monotone functions ----
    Entry(
        iz.Monotone,
        "curve(x), any increasing one",
        "sum of log of autograd's derivative",
        Case(lambda: iz.Monotone(_Cubic()), (3, 4)),
        Case(lambda: iz.Monotone(_Cubic()), (4,), id="context", side={"context": (4,)}),
        Case(lambda: iz.Monotone(torch.logit, (0, 1)), (4,), id="bounds"),
        cost="about 20 evaluations",
        keeps="its input",
    ),
    Entry(
        iz.UnconstrainedMonotonic,
        "c + integral from 0 to x of exp(net(t)) dt",
        "sum of net(x)",
        Case(lambda: iz.UnconstrainedMonotonic(3, hidden=3), (3, 2)),
        Case(
            lambda: iz.UnconstrainedMonotonic(3, hidden=2, conditioner=nn.Linear(2, 24)),
            (3,),
            id="context",
            side={"context": (2,)},
        ),
        cost="about 20 evaluations",
        keeps="its input",
    ),
    Entry(
        iz.SumOfSquares,
        "c + integral from 0 to x of a mean of squared polynomials",
        "sum of log of that mean",
        Case(lambda: iz.SumOfSquares(3), (3, 2)),
        Case(
            lambda: iz.SumOfSquares(3, degree=2, conditioner=nn.Linear(2, 21)),
            (3,),
            id="context",
            side={"context": (2,)},
        ),
        cost="about 20 evaluations",
        keeps="its input",
    ),
    Entry(
        iz.BernsteinPolynomial,
        "an increasing polynomial, linear beyond tail_bound",
        "sum of log of its derivative",
        Case(lambda: iz.BernsteinPolynomial(3), (3, 2)),
        Case(
            lambda: iz.BernsteinPolynomial(3, degree=3, tail_bound=1.0, conditioner=nn.Linear(2, 12)),
            (3,),
            id="context",
            side={"context": (2,)},
        ),
        cost="about 20 evaluations",
        keeps="its input",
    ),
    Entry(iz.Identity, "x", "0", Case(iz.Identity, (3,))),
    # ---- residual blocks ----
    Entry(
        iz.InvertibleResidual,
        "y = x + f(x), f a contraction",
        "sum over k of -(-1)^k / k tr J^k, J = df / dx",
        Case(lambda: iz.InvertibleResidual(_Contraction(3)), (3,)),
        Case(
            lambda: iz.InvertibleResidual(_Contraction(3), log_det="series", terms=3),
            (2, 3),
            id="series",
            without=dict.fromkeys(
                ("assert_log_det", "assert_dtypes", "assert_batch_sizes", "assert_trainable"),
                "the log-determinant is an estimate, with noise",
            ),
        ),
        Case(lambda: iz.InvertibleResidual(_Contraction(3), solve=True), (3,), id="solve"),
        Case(lambda: iz.InvertibleResidual(_Contraction(2, 3)), (2,), id="context", side={"context": (3,)}),
        cost="about 10 runs",
        keeps="its input",
    ),
    Entry(
        iz.Leapfrog,
        "(x_prev, x) -> (x, 2 x - x_prev + h^2 f(x))",
        "0",
        Case(lambda: iz.Leapfrog(_subnet(3, 3), 0.5), (3,), (3,)),
        Case(lambda: iz.Leapfrog(_Conditioned(2, 3, 2)), (2,), (2,), id="context", side={"context": (3,)}),
    ),
    Entry(
        iz.MomentumResidual,
        "v' = gamma v + (1 - gamma) f(x), x' = x + v'",
        "log gamma times the size of x",
        Case(lambda: iz.MomentumResidual(_subnet(3, 3)), (3,), (3,)),
        Case(lambda: iz.MomentumResidual(_Conditioned(2, 3, 2), 0.5), (2,), (2,), id="context", side={"context": (3,)}),
    ),
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
    # ---- shapes ----
    Entry(
        iz.Squeeze,
        "(c, h p, w q) -> (c p q, h, w)",
        "0",
        Case(iz.Squeeze, (1, 2, 4)),
        Case(lambda: iz.Squeeze((3,), order="positions_first"), (2, 6), id="positions"),
    ),
    Entry(
        iz.Unsqueeze,
        "(c p q, h, w) -> (c, h p, w q)",
        "0",
        Case(iz.Unsqueeze, (4, 2, 1)),
        Case(lambda: iz.Unsqueeze(order="positions_first"), (8, 1, 2, 1), id="positions"),
    ),
    Entry(iz.Flatten, "(c, h, w) -> (c h w)", "0", Case(lambda: iz.Flatten((2, 3)), (2, 3))),
    Entry(iz.Reshape, "the same entries in another shape", "0", Case(lambda: iz.Reshape((2, 6), (3, -1)), (2, 6))),
    Entry(
        iz.Rearrange,
        "what an einops pattern says",
        "0",
        Case(lambda: iz.Rearrange("b (h p) c -> b h (c p)", {"p": 2, "c": 3}), (4, 3)),
    ),
    Entry(
        iz.Pad,
        "x -> (0, x, 0)",
        "none",
        Case(lambda: iz.Pad(2), (3, 2)),
        Case(lambda: iz.Pad((1, 2), dim=(-1, -2)), (1, 2, 3), id="pixels"),
    ),
    # ---- orthonormal transforms ----
    Entry(
        iz.HaarDownsample,
        "means and differences of each cell of pixels, as channels",
        "0",
        Case(iz.HaarDownsample, (1, 2, 4)),
        Case(lambda: iz.HaarDownsample("db2", order="positions_first"), (2, 6), id="db2"),
    ),
    Entry(
        iz.HaarUpsample,
        "the same the other way round",
        "0",
        Case(iz.HaarUpsample, (4, 1, 2)),
        Case(lambda: iz.HaarUpsample("db3"), (2, 4), id="db3"),
    ),
    Entry(
        iz.DCT,
        "the cosine transform of some dims",
        "0",
        Case(iz.DCT, (2, 5)),
        Case(lambda: iz.DCT((-2, -1)), (2, 3), id="pixels"),
    ),
    Entry(iz.Hadamard, "the Hadamard transform of some dims", "0", Case(iz.Hadamard, (4, 2))),
    # ---- surjections ----
    Entry(
        iz.Slice,
        "(x1, x2) -> x1, and back with x2 drawn given x1",
        "log p(x2 | x1)",
        _surjection(lambda: iz.Slice(2), (4,)),
        _surjection(lambda: iz.Slice(2, distribution=_Gaussian(2, 3, 2)), (4,), id="context", side={"context": (3,)}),
        keeps="its input",
    ),
    Entry(
        iz.Augment,
        "x -> (x, e) with e drawn given x",
        "-log q(e | x)",
        _surjection(lambda: iz.Augment(2), (3,)),
        _surjection(lambda: iz.Augment(2, distribution=_Gaussian(2, 3, 2)), (2,), id="context", side={"context": (3,)}),
        keeps="its input",
    ),
    Entry(
        iz.Abs,
        "abs(x), and back with signs drawn",
        "log p(sign | y)",
        _surjection(iz.Abs, (4,)),
        keeps="its input",
    ),
    Entry(
        iz.Dequantize,
        "(x + u) / levels with u drawn in [0, 1), and back by floor",
        "-n log(levels) - log q(u | x)",
        _surjection(
            lambda: iz.Dequantize(8, dtype=torch.float64),
            (4,),
            draw=lambda shape, generator: torch.randint(8, shape, generator=generator).double(),
            assert_gradients="floor has no gradient",
            assert_modes_agree="floor has no gradient",
            assert_batch_sizes="floor has no gradient",
        ),
        keeps="its input",
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
    # ---- blocks ----
    Entry(
        iz.GlowStep,
        "coupling(W actnorm(x) + b)",
        "sum of its layers'",
        Case(lambda: _after_a_batch(iz.GlowStep(3, _convolutions(1, 4)), 3, 2, 4), (3, 2, 4)),
        Case(
            lambda: _after_a_batch(iz.GlowStep(4, _subnet(2, 4), kind="plu", dim=-1, scale="sigmoid"), 4),
            (4,),
            id="vectors",
        ),
    ),
    Entry(
        iz.HINTCoupling,
        "(x1, x2) -> (h1(x1), h2(x2 exp(s(x1)) + t(x1))), h1 and h2 likewise",
        "sum over its couplings",
        Case(lambda: iz.HINTCoupling(5, _subnet), (5,)),
        Case(lambda: iz.HINTCoupling(4, _convolutions, depth=1), (4, 2, 2), id="images"),
        Case(
            lambda: iz.HINTCoupling(4, lambda n, m: _Conditioned(n, 3, m), depth=2),
            (4,),
            id="context",
            side={"context": (3,)},
        ),
    ),
    Entry(
        iz.Inverse,
        "layer.inverse(x)",
        "minus its layer's",
        Case(lambda: iz.Inverse(iz.InvertibleLinear(4, kind="plu")), (4,)),
        Case(lambda: iz.Inverse(iz.AffineCoupling(_Conditioned(2, 3, 4))), (4,), id="context", side={"context": (3,)}),
        cost="1x",
        keeps="what its layer keeps",
    ),
)
