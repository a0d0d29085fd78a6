"""What a fuzz case is: a net and a training program, as plain data that prints as the code that makes it again."""

from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

__all__ = ["Case", "Forward", "Group", "Iteration", "Leaf", "Net", "Step", "cases"]


class _Readable:
    def __repr__(self) -> str:
        shown = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        given = [f"{name}={value!r}" for name, value, default in shown if default is MISSING or value != default]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class Leaf(_Readable):
    """One layer: invertible, or one of `NEIGHBOURS`."""

    kind: str
    mode: str = "invert"
    check: str = "first"
    seed: bool = False
    inv: bool = False
    f: str | None = None  # subnets, by kind
    g: str | None = None
    split: Any = "half"
    swap: bool = False
    scale: str = "tanh"
    matrix: str = "householder"
    slope: float = 0.5
    dim: int = 1
    order: int = 0


@dataclass(frozen=True, repr=False)
class Group(_Readable):
    """Several layers: one after the other, or around one input."""

    kind: str  # hand, sequential, invertible; residual, branch; streams
    items: "tuple[Leaf | Group, ...]"
    repeat: int = 1  # how often the same layers are applied
    inv: bool = False
    split: Any = "half"  # of streams
    flip: bool = False  # f(x) + x rather than x + f(x); streams made and merged by layers rather than by hand


@dataclass(frozen=True, repr=False)
class Net(_Readable):
    items: tuple[Leaf | Group, ...]
    features: int
    rank: int = 2
    dtype: str = "float64"
    seed: int = 0
    frozen: float = 0.0  # the share of parameters without gradient
    zeros: bool = False  # whether neighbours may return exact zeros, which no inverse rebuilds exactly: no kinks there


@dataclass(frozen=True, repr=False)
class Forward(_Readable):
    input: int = 0
    needs_grad: bool = True
    layout: str = "plain"
    grad: str = "on"
    train: bool = True
    condition: str = "none"
    times: int = 1
    mid: int = 0
    loss: str = "square"


@dataclass(frozen=True, repr=False)
class Step(_Readable):
    """What is done with one forward's graph, if it is still there."""

    kind: str
    forward: int = 0
    retain: bool = False
    pick: int = 0  # which parameters, in bits


@dataclass(frozen=True, repr=False)
class Iteration(_Readable):
    forwards: tuple[Forward, ...]
    steps: tuple[Step, ...]
    mode: str | None = None  # of all layers, in forward
    mode_after: str | None = None  # and in backward
    flip: bool = False  # train to eval, or back, before backward
    update: bool = False
    clear: bool = False


@dataclass(frozen=True, repr=False)
class Case(_Readable):
    net: Net
    iterations: tuple[Iteration, ...]
    seed: int = 0


FROZEN = (0.0, 0.0, 0.3, 0.7, 1.0)
MODES = ("invert", "invert", "invert", "recompute", "store")
SUBNETS = ("linear", "mlp", "dropout", "batchnorm", "both", "condition", "relu", "inplace")
SMOOTH = SUBNETS[:-2]
NEIGHBOURS = ("dense", "relu", "exp", "sigmoid", "scale", "transposed", "dense_relu_")
SQUASHED = (("logit", False), ("atanh", False), ("sigmoid_layer", True), ("tanh", True))  # domains hold [0.26, 0.74]

_seeds = st.integers(0, 2**16)


def _splits(features: int, rank: int) -> SearchStrategy[Any]:
    sizes = st.integers(1, features - 1).map(lambda k: (k, features - k))
    return st.sampled_from(["half", "interleave", 0.3, *(["checkerboard"] if rank == 4 else [])]) | sizes


def _options() -> dict[str, SearchStrategy[Any]]:
    return {
        "mode": st.sampled_from(MODES),
        "check": st.sampled_from(("first", "first", "always", "never")),
        "seed": st.sampled_from((False, False, False, True)),
        "inv": st.sampled_from((False, False, True)),
    }


def _couplings(net: Net, splits: SearchStrategy[Any]) -> SearchStrategy[Leaf]:
    subnets = st.sampled_from(SUBNETS if net.dtype == "float64" else SMOOTH)
    common = _options() | {"f": subnets, "g": st.none() | subnets, "split": splits, "swap": st.booleans()}
    scales = st.sampled_from(("tanh", "softclip", "sigmoid", "unit", "exp"))
    return st.builds(Leaf, st.just("additive"), **common) | st.builds(Leaf, st.just("affine"), scale=scales, **common)


@cache
def _layers(net: Net) -> SearchStrategy[Leaf]:
    dims = st.sampled_from((1, -1) if net.rank == 2 else (1, 1, 2, -1))
    matrices = st.sampled_from(("householder", "cayley", "scaled", "plu", "free"))
    orders = ("reverse", "swap", "interleave", "deinterleave")
    smooth = ("tanh", "sigmoid_layer", "identity")
    plain = _options() | {"inv": st.just(False)}
    layers = [
        *[_couplings(net, _splits(net.features, net.rank))] * 3,
        st.builds(Leaf, st.just("matrix"), matrix=matrices, **_options()),
        st.builds(Leaf, st.sampled_from(orders), dim=dims, **_options()),
        st.builds(Leaf, st.sampled_from(("permute", "shuffle")), order=_seeds, **_options()),
        st.builds(Leaf, st.sampled_from(smooth), **plain),
    ]
    if net.dtype == "float64" and not net.zeros:  # in float32, too many values lie close enough to the kink
        layers.append(st.builds(Leaf, st.just("leaky"), slope=st.sampled_from((0.3, 0.5, 2.0)), **_options()))
    return st.one_of(layers)


@st.composite
def _squashing(draw: st.DrawFn) -> list[Leaf]:
    """Into an interval, and out of it with another layer."""
    kind, inv = draw(st.sampled_from(SQUASHED))
    modes = [draw(st.sampled_from(MODES)) for _ in range(3)]
    return [Leaf("tanh", modes[0]), Leaf("sigmoid_layer", modes[1]), Leaf(kind, modes[2], inv=inv)]


def _tuple_of(items: SearchStrategy[Any], most: int, least: int = 1) -> SearchStrategy[tuple[Any, ...]]:
    sizes = st.integers(least, most)  # each as likely, where lists would mostly be short
    return sizes.flatmap(lambda n: st.tuples(*[items] * n))


@cache
def _stacks(net: Net, depth: int = 2) -> SearchStrategy[Group]:
    """Invertible as a whole, but for those with squashing layers, which are not turned round."""
    inside = _layers(net) if depth == 1 else st.one_of(_layers(net), _layers(net), _stacks(net, depth - 1))
    repeats, invs = st.sampled_from((1, 1, 1, 2)), st.sampled_from((False, False, True))
    turned = st.builds(Group, st.just("invertible"), _tuple_of(inside.filter(_invertible), 4), repeats, invs)
    squashed = _squashing().flatmap(
        lambda s: st.builds(Group, st.just("invertible"), _tuple_of(inside, 2).map(lambda t: (*t, *s)), repeats)
    )
    return st.one_of(turned, turned, squashed)


def _invertible(item: Leaf | Group) -> bool:
    """Whether the item can be inverted at any value."""
    if isinstance(item, Group):
        return all(map(_invertible, item.items))
    return item.kind not in ("tanh", "sigmoid_layer", "logit", "atanh")


@cache
def _streams(net: Net) -> SearchStrategy[Group]:
    splits = _splits(net.features, 2)
    inside = st.one_of(*[_couplings(net, st.just("half"))] * 2, st.builds(Leaf, st.just("swap"), **_options()))
    groups = st.builds(Group, st.just("invertible"), _tuple_of(inside, 3), inv=st.booleans())
    return st.builds(Group, st.just("streams"), _tuple_of(inside | groups, 4), split=splits, flip=st.booleans())


@cache
def _items(net: Net, depth: int = 2) -> SearchStrategy[Leaf | Group]:
    neighbours = st.sampled_from([kind for kind in NEIGHBOURS if net.zeros or "relu" not in kind]).map(Leaf)
    leaves = [_layers(net), _layers(net), neighbours, _stacks(net), _streams(net)]
    if depth == 0:
        return st.one_of(leaves)
    inside = _tuple_of(_items(net, depth - 1), 3)
    repeats = st.sampled_from((1, 1, 1, 2))
    return st.one_of(
        *leaves,
        st.builds(Group, st.sampled_from(("hand", "sequential")), inside, repeats),
        st.builds(Group, st.just("residual"), inside, flip=st.booleans()),
        st.builds(Group, st.just("branch"), _tuple_of(_items(net, depth - 1), 2, least=2)),
    )


@cache
def _forwards() -> SearchStrategy[Forward]:
    return st.builds(
        Forward,
        input=st.integers(0, 1),
        needs_grad=st.booleans(),
        layout=st.sampled_from(("plain", "plain", "slice", "transposed", "expanded")),
        grad=st.sampled_from(("on", "on", "on", "on", "on", "no_grad", "inference")),
        train=st.sampled_from((True, True, False)),
        condition=st.sampled_from(("none", "data", "leaf", "encoder")),
        times=st.sampled_from((1, 1, 1, 2)),
        mid=st.integers(0, 5),
        loss=st.sampled_from(("square", "part", "mid", "twice", "view")),
    )


KINDS = (
    *("backward", "backward", "inputs", "parameters", "mid", "some"),
    *("split", "penalty", "joint", "peek", "draw", "drop"),
)


@cache
def _steps(forwards: int) -> SearchStrategy[Step]:
    which = st.integers(0, forwards - 1)
    return st.builds(Step, st.sampled_from(KINDS), which, st.booleans(), st.integers(0, 255))


@cache
def _iterations() -> SearchStrategy[Iteration]:
    modes = st.sampled_from((None, None, None, None, "invert", "recompute", "store"))
    often, seldom = st.sampled_from((True, True, False)), st.sampled_from((True, False, False, False))
    last = st.sampled_from(((Step("joint"),), (Step("joint"),), ()))

    def with_steps(forwards: tuple[Forward, ...]) -> SearchStrategy[Iteration]:
        steps = st.tuples(_tuple_of(_steps(len(forwards)), 4), last).map(lambda pair: pair[0] + pair[1])
        return st.builds(Iteration, st.just(forwards), steps, modes, modes, seldom, often, often)

    return _tuple_of(_forwards(), 3).flatmap(with_steps)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a net and a program for it."""
    kind = Net(
        (),
        features=draw(st.sampled_from((3, 5, 4, 2, 6))),
        rank=draw(st.sampled_from((2, 2, 4))),
        dtype=draw(st.sampled_from(("float64",) * 7 + ("float32",))),
        zeros=draw(st.booleans()),
    )
    net = replace(kind, items=draw(_tuple_of(_items(kind), 4)), seed=draw(_seeds), frozen=draw(st.sampled_from(FROZEN)))
    return Case(net, draw(_tuple_of(_iterations(), 2)), draw(_seeds))
