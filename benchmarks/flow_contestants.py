"""Normalizing flows of one architecture as each library builds them: what comes in is data, what comes out a loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import invzoo as iz

from .contestants import installed

__all__ = ["KINDS", "Sizes", "build", "names"]

KINDS = ("glow", "spline")


@dataclass(frozen=True)
class Sizes:
    """What all libraries agree on."""

    batch: int = 4096
    features: int = 16
    hidden: int = 64
    bins: int = 8
    bound: float = 3.0

    def subnet(self, inputs: int, outputs: int) -> nn.Module:
        """Return the conditioner of a coupling."""
        hidden = self.hidden
        layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        return nn.Sequential(*layers)

    @property
    def mask(self) -> Tensor:
        """Mark the half of the features that moves."""
        return torch.arange(self.features) >= self.features // 2


class Density(nn.Module):
    """The mean negative log-likelihood of a map to normal noise, for libraries whose maps return a log-determinant."""

    def __init__(self, transform: nn.Module, call: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.transform, self.call = transform, call

    def forward(self, x: Tensor) -> Tensor:
        z, log_det = self.call(self.transform, x)
        return (0.5 * z.square().sum(1) + 0.5 * z.shape[1] * math.log(2 * math.pi) - log_det).mean()


class LogProb(nn.Module):
    """The same for libraries whose flows are distributions."""

    def __init__(self, flow: nn.Module, log_prob: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.flow, self.log_prob = flow, log_prob

    def forward(self, x: Tensor) -> Tensor:
        return -self.log_prob(self.flow, x).mean()


def invzoo(kind: str, depth: int, sizes: Sizes, mode: str) -> nn.Module:
    """Build the flow of InvZoo's layers."""
    half = sizes.features // 2
    if kind == "glow":
        steps = [iz.GlowStep(sizes.features, sizes.subnet(half, 2 * half), dim=-1) for _ in range(depth)]
    else:
        parameters = half * (3 * sizes.bins - 1)
        steps = [
            step
            for _ in range(depth)
            for step in (
                iz.Shuffle(sizes.features),
                iz.RationalQuadraticCoupling(sizes.subnet(half, parameters), bins=sizes.bins, bound=sizes.bound),
            )
        ]
    net = iz.InvertibleSequential(*steps)
    net.mode = mode
    return Density(net, lambda net, x: net.forward_and_log_det(x))


class WithoutContext(nn.Module):
    """nflows and normflows hand a context to a subnet."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def freia(_: str, depth: int, sizes: Sizes) -> nn.Module:
    """Build the flow of FrEIA, whose block is norm, matrix and coupling in one."""
    from FrEIA.framework import SequenceINN  # noqa: PLC0415 - a peer is imported if it takes part
    from FrEIA.modules import AllInOneBlock  # noqa: PLC0415 - as above

    net = SequenceINN(sizes.features)
    for _ in range(depth):
        net.append(AllInOneBlock, subnet_constructor=sizes.subnet, learned_householder_permutation=sizes.features)
    return Density(net, lambda net, x: net(x))


def nflows(kind: str, depth: int, sizes: Sizes) -> nn.Module:
    """Build the flow of nflows."""
    from nflows import transforms as t  # noqa: PLC0415 - as above
    from nflows.distributions import StandardNormal  # noqa: PLC0415 - as above
    from nflows.flows import Flow  # noqa: PLC0415 - as above

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return WithoutContext(sizes.subnet(inputs, outputs))

    layers: list[nn.Module] = []
    for _ in range(depth):
        if kind == "glow":
            coupling = t.AffineCouplingTransform(sizes.mask, subnet)
            layers += t.ActNorm(sizes.features), t.LULinear(sizes.features), coupling
        else:
            options = {"num_bins": sizes.bins, "tails": "linear", "tail_bound": sizes.bound}
            coupling = t.PiecewiseRationalQuadraticCouplingTransform(sizes.mask, subnet, **options)
            layers += t.RandomPermutation(sizes.features), coupling
    flow = Flow(t.CompositeTransform(layers), StandardNormal([sizes.features]))
    return LogProb(flow, lambda flow, x: flow.log_prob(x))


def normflows(kind: str, depth: int, sizes: Sizes) -> nn.Module:
    """Build the flow of normflows, whose layers map noise to data: a density goes from the last one to the first."""
    import normflows as nf  # noqa: PLC0415 - as above

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return WithoutContext(sizes.subnet(inputs, outputs))

    half, layers = sizes.features // 2, []
    for _ in range(depth):
        if kind == "glow":
            coupling = nf.flows.AffineCouplingBlock(sizes.subnet(half, 2 * half), scale_map="sigmoid")
            layers += coupling, nf.flows.LULinearPermute(sizes.features), nf.flows.ActNorm(sizes.features)
        else:
            options = {"num_bins": sizes.bins, "tails": "linear", "tail_bound": sizes.bound}
            coupling = nf.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling(sizes.mask, subnet, **options)
            layers += coupling, nf.flows.Permute(sizes.features)
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(sizes.features, trainable=False), layers)
    return LogProb(flow, lambda flow, x: flow.log_prob(x))


def zuko(kind: str, depth: int, sizes: Sizes) -> nn.Module:
    """Build the flow of zuko, whose couplings move what the mask does not mark."""
    import zuko as zk  # noqa: PLC0415 - as above

    n, layers, hidden = sizes.features, [], {"hidden_features": (sizes.hidden, sizes.hidden)}
    for _ in range(depth):
        if kind == "glow":
            affine = zk.transforms.MonotonicAffineTransform, torch.zeros(n), torch.zeros(n)
            linear = zk.transforms.LULinearTransform, torch.eye(n)
            norm = zk.lazy.UnconditionalTransform(*affine)
            coupling = zk.flows.coupling.GeneralCouplingTransform(n, mask=~sizes.mask, **hidden)
            layers += norm, zk.lazy.UnconditionalTransform(*linear), coupling
        else:
            order = zk.transforms.PermutationTransform, torch.randperm(n)
            spline = partial(zk.transforms.MonotonicRQSTransform, bound=sizes.bound)
            shapes = {"shapes": [(sizes.bins,), (sizes.bins,), (sizes.bins - 1,)]}
            coupling = zk.flows.coupling.GeneralCouplingTransform(
                n, mask=~sizes.mask, univariate=spline, **shapes, **hidden
            )
            layers += zk.lazy.UnconditionalTransform(*order, buffer=True), coupling
    base = zk.lazy.UnconditionalDistribution(zk.distributions.DiagNormal, torch.zeros(n), torch.ones(n), buffer=True)
    return LogProb(zk.lazy.Flow(layers, base), lambda flow, x: flow().log_prob(x))


PEERS = {"FrEIA": freia, "normflows": normflows, "nflows": nflows, "zuko": zuko}
BUILDERS: dict[str, Callable[[str, int, Sizes], nn.Module]] = {
    **{f"invzoo {mode}": partial(invzoo, mode=mode) for mode in iz.Mode},
    **PEERS,
}


def names(kind: str) -> list[str]:
    """Return the names of the contestants that can take part; FrEIA 0.2 has no splines."""
    return [n for n in BUILDERS if n not in PEERS or (installed(n) and (kind, n) != ("spline", "FrEIA"))]


def build(name: str, kind: str, depth: int, sizes: Sizes) -> nn.Module:
    """Return a flow with weights of its own; it starts in its library's own way."""
    np.random.seed(0)  # noqa: NPY002 - FrEIA draws permutations from it
    torch.manual_seed(0)
    return BUILDERS[name](kind, depth, sizes)
