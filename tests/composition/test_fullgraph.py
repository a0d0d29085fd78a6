"""Chains under ``torch.compile(fullgraph=True)``: one function whose backward inverts, and what it refuses."""

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import invzoo as iz
from invzoo.engine.state import state
from tests.reference import FEATURES, HALF, assert_near, gradients, mlp

pytestmark = [  # torch's own business, with any net
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

usual = pytest.mark.usual


def among(names: Iterable[str], *in_every_run: str) -> list[Any]:
    """Return parameters, of which some stand for the others in a usual run."""
    return [pytest.param(name, marks=usual if name in in_every_run else ()) for name in names]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert state.record is None


def compiled(net: Callable[..., Any], backend: Any = "aot_eager") -> Any:
    return torch.compile(net, backend=backend, fullgraph=True)


class Graphs:
    """A backend that keeps its graphs, which it gets from the partitioner that inductor uses."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(
            fw_compiler=self.keep, bw_compiler=self.keep, partition_fn=min_cut_rematerialization_partition
        )

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return self.backend(graph, inputs)

    def keep(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)

    def saved(self) -> list[tuple[int, ...]]:
        """Return the shapes of what the backward gets besides gradients, parameters, inputs and fingerprints."""
        nodes = self.graphs[-1].graph.find_nodes(op="placeholder")
        return [
            tuple(n.meta["val"].shape) for n in nodes if not n.name.startswith(("primals", "tangents", "fingerprints"))
        ]

    def count(self, operator: Any) -> int:
        """Say how often the backward uses an operator."""
        return len(self.graphs[-1].graph.find_nodes(op="call_function", target=operator))


def loss_of(outputs: Any) -> Tensor:
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(y.sin().square().sum() for y in tensors)  # type: ignore[return-value]


def assert_same_gradients(
    net: nn.Module,
    *inputs: Tensor,
    backend: Any = "aot_eager",
    function: Callable[..., Any] | None = None,
    tolerance: float = 1e-9,
    **side: Any,
) -> None:
    """Compare a compiled net in its modes with itself in mode store, not compiled."""
    leaves = [*inputs, *(s for s in side.values() if isinstance(s, Tensor) and s.is_floating_point())]
    leaves = [t.requires_grad_() for t in leaves] + [p for p in net.parameters() if p.requires_grad]

    def step(*inputs: Tensor, **side: Any) -> Tensor:
        return loss_of((function or net)(*inputs, **side))

    with iz.mode(net, "store"):
        expected = torch.autograd.grad(step(*inputs, **side), leaves)
    assert_near(torch.autograd.grad(compiled(step, backend)(*inputs, **side), leaves), expected, tolerance)


def stack(depth: int, net: Callable[[int, int], nn.Module] = mlp) -> list[nn.Module]:
    additive, affine = partial(net, HALF, HALF), partial(net, HALF, FEATURES)
    return [iz.AdditiveCoupling(additive(), swap=True) if i % 2 else iz.AffineCoupling(affine()) for i in range(depth)]


def linear() -> nn.Module:
    """Make the layer that takes the compiler least, where any would do."""
    return iz.AdditiveCoupling(nn.Linear(HALF, HALF))


def x() -> Tensor:
    return torch.randn(4, FEATURES)


def saved_between(net: Callable[..., Any], *inputs: Tensor, **side: Any) -> tuple[Any, list[Tensor]]:
    """Return the outputs, and the tensors that autograd was given to save."""
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        outputs = net(*inputs, **side)
    return outputs, packed


@usual
@torch._dynamo.config.patch(assume_static_by_default=False)
def test_right_by_the_eager_backend_for_any_shape():
    assert_same_gradients(iz.InvertibleSequential(*stack(2)), x(), backend="eager")


@pytest.mark.parametrize("backend", among(("aot_eager", "min-cut"), "min-cut"))
def test_saves_one_activation_at_any_depth(backend: str):
    net = iz.InvertibleSequential(*(linear() for _ in range(8)))
    run = compiled(net, Graphs() if backend == "min-cut" else backend)
    run(torch.randn(64, FEATURES))  # compiles
    y, packed = saved_between(run, torch.randn(64, FEATURES))
    y.sum().backward()
    assert sum(t.nbytes for t in packed if t.shape[:1] == (64,)) == y.nbytes


@usual
def test_evaluates_each_subnet_once_in_backward():
    net, graphs = iz.InvertibleSequential(*stack(2)), Graphs()
    assert_same_gradients(net, x(), backend=graphs)
    subnets, maps = 2, 1  # each has one tanh; those of an affine map are no subnet's
    assert graphs.count(torch.ops.aten.tanh.default) == subnets + maps


def test_log_dets_and_layers_without_subnets():
    net = iz.InvertibleSequential(
        *stack(1), iz.InvertibleLinear(FEATURES, kind="plu"), iz.InvertibleLeakyReLU(), iz.Permute([1, 0, 2, 3, 5, 4])
    )
    graphs = Graphs()
    assert_same_gradients(net, x(), backend=graphs, function=net.forward_and_log_det)
    assert graphs.saved().count((4, FEATURES)) == 1
    net = net[:2]
    assert_same_gradients(net, x(), function=net.inverse_and_log_det)


class Conditioned(nn.Module):
    """A subnet that sees a context, alone and together with its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.context = mlp(HALF + 2, HALF), mlp(2, HALF)

    def forward(self, x: Tensor, context: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
        h = scale * self.net(torch.cat((x, context), 1)) + self.context(context)
        return h if shift is None else h + shift


@usual
def test_side_inputs():
    """What a subnet makes of the context alone is not saved for each layer either. Compiling warns of nothing."""
    net, graphs = iz.InvertibleSequential(*(iz.AdditiveCoupling(Conditioned()) for _ in range(2))), Graphs()
    side = {"context": torch.randn(4, 2), "scale": 0.5, "shift": torch.arange(HALF)}
    assert_same_gradients(net, x(), backend=graphs, **side)
    assert graphs.saved() == [(4, FEATURES), (4, 2), (HALF,)]  # a copy of each for the whole chain


class Joined(nn.Linear):
    """Sees its input beside a context, and saves neither."""

    def __init__(self) -> None:
        super().__init__(HALF + 2, HALF)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(torch.cat((x, context), 1))


@pytest.mark.parametrize("backend", ["aot_eager", "min-cut"])
@pytest.mark.parametrize("changed", among(("kept input", "side input", "output"), "output"))
def test_changed_in_place_in_the_same_graph(changed: str, backend: str):
    """Backward gets what was, not what the compiler makes of it."""
    net = iz.InvertibleSequential(iz.InvertibleTanh(), *(iz.AdditiveCoupling(Joined()) for _ in range(2)))

    def step(x: Tensor, context: Tensor) -> Tensor:
        tensors = {"kept input": x / 9, "side input": context.sin()}
        tensors["output"] = net(tensors["kept input"], context=tensors["side input"])
        tensors[changed] *= 2
        return torch.cat([*tensors.values()], 1)

    assert_same_gradients(
        net, x(), context=torch.randn(4, 2), function=step, backend=Graphs() if backend == "min-cut" else backend
    )


@usual
def test_error_of_a_layer_is_in_the_compilers():
    net = iz.InvertibleSequential(linear(), iz.InvertibleLinear(3))
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"raised exception .*InvertibleLinear: Expected x to have size 3"
    ):
        compiled(net)(x())


@pytest.mark.parametrize("how", ["loaded", "moved"])
def test_knows_an_initialised_act_norm(how: str):
    net, other = (iz.InvertibleSequential(linear(), iz.ActNorm(FEATURES), linear()) for _ in range(2))
    net(x())
    if how == "loaded":
        other.load_state_dict(net.state_dict())
        net = other
    else:  # to another device
        net[1].initialized = net[1].initialized.clone()
    given = x()
    y = compiled(net)(given)  # before an eager call, which would read the flag
    assert_near((y,), (net(given),))


class Shifted(nn.Linear):
    """Adds a buffer to what it sees, and a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__(HALF, HALF)
        self.register_buffer("shift", torch.zeros(HALF))
        self.frozen = nn.Parameter(torch.zeros(HALF), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x + self.shift + self.frozen).sin())


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("changed", among(("shift", "frozen", "weight"), "weight"))
def test_changed_between_forward_and_backward(changed: str, mode: str):
    net = iz.InvertibleSequential(
        iz.AdditiveCoupling(Shifted()), iz.AdditiveCoupling(Shifted(), swap=True), mode=mode, check="never"
    )
    loss = loss_of(compiled(net)(x()))
    with torch.no_grad():
        getattr(net[1].f, changed).fill_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["invert", "recompute"])
def test_buffers_changed_in_the_same_graph(mode: str):
    net = iz.InvertibleSequential(*(iz.AdditiveCoupling(Shifted()) for _ in range(2)), mode=mode, check="never")

    def step(x: Tensor) -> Tensor:
        for layer, shift in zip(net, (1.0, 2.0), strict=True):
            layer.f.shift.fill_(shift)
        y = net(x)
        for layer in net:
            layer.f.shift.zero_()
        return y

    assert_same_gradients(net, x(), function=step)


class Double(iz.InvertibleModule):
    """An inverse that is wrong by ``error``, by a factor or by a constant."""

    def __init__(self, *, constant: bool = False) -> None:
        super().__init__()
        self.constant = constant
        self.register_buffer("error", torch.tensor(0.0))

    def function(self, x: Tensor) -> Tensor:
        return 2 * x

    def inverse(self, y: Tensor) -> Tensor:
        return y / 2 + self.error if self.constant else y * (0.5 + self.error)


class Widen(iz.InvertibleModule):
    """Returns a part that its inverse can do without."""

    def function(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.sin()

    def inverse(self, y: Tensor, _: Tensor) -> Tensor:
        return y


class Second(Double):
    """Changes the second of two tensors."""

    def function(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, super().function(y)

    def inverse(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, super().inverse(y)


WRONG: dict[str, Callable[[], tuple[Double, nn.Module]]] = {
    "last, by a constant": lambda: ((wrong := Double(constant=True)), iz.InvertibleSequential(linear(), wrong)),
    "behind one that keeps its input": lambda: (
        (wrong := Double()),
        iz.InvertibleSequential(linear(), iz.InvertibleTanh(), wrong),
    ),
    "behind one whose inverse loses it": lambda: ((wrong := Second()), iz.InvertibleSequential(Widen(), wrong)),
}


@pytest.mark.parametrize("name", among(WRONG, "last, by a constant"))
def test_a_wrong_inverse_is_refused(name: str):
    wrong, net = WRONG[name]()
    wrong.error.fill_(1e-3)
    loss = loss_of(compiled(net)(x().requires_grad_()))
    with pytest.raises(
        RuntimeError, match=r"Expected InvertibleSequential to be replayed within .*One of them is wrong"
    ):
        loss.backward()


def test_right_by_inductor_and_a_wrong_inverse_refused():
    net, given = iz.InvertibleSequential(linear(), wrong := Double(), check="always"), x().requires_grad_()
    with iz.mode(net, "store"):
        expected = torch.autograd.grad(loss_of(net(given)), [given, *net.parameters()])
    run = compiled(net, "inductor")
    assert_near(torch.autograd.grad(loss_of(run(given)), [given, *net.parameters()]), expected)
    wrong.error.fill_(1e-3)
    loss = loss_of(run(given))
    with pytest.raises(RuntimeError, match="Expected InvertibleSequential to be replayed within a relative error"):
        loss.backward()


@pytest.mark.parametrize(
    ("check", "refused"),
    [
        pytest.param("first", [True, False, False], marks=usual),
        ("always", [True, False, True]),
        ("never", [False] * 3),
    ],
)
def test_when_inverses_are_checked(check: str, refused: list[bool]):
    """With ``first``, until one was right."""
    run = compiled(iz.InvertibleSequential(wrong := Double(), check=check))
    for error, refuses in zip((1e-3, 0.0, 1e-3), refused, strict=True):
        wrong.error.fill_(error)
        loss = loss_of(run(x().requires_grad_()))
        with pytest.raises(RuntimeError, match="to be replayed within") if refuses else nullcontext():
            loss.backward()


class Partial(nn.Module):
    """Uses one of its parameters, one without its gradient, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.detached, self.unused = (nn.Parameter(torch.randn(HALF)) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, other: Tensor) -> Tensor:
        return (x * self.used).sin() * self.detached.detach() + context + other.detach()


def test_what_is_not_used_has_no_gradient():
    """None, not zeros, which would let an optimizer decay a weight."""
    net = iz.InvertibleSequential(*(iz.AdditiveCoupling(Partial()) for _ in range(2)))
    given, context, other = (torch.randn(4, n, requires_grad=True) for n in (FEATURES, HALF, HALF))
    results = []
    for run in (net, compiled(net)):
        net.zero_grad()
        given.grad = context.grad = None
        loss_of(run(given, context=context, other=other)).backward()
        results.append(gradients(net, given, context, other))
    assert_near(results[1], results[0])
    assert [g is None for g in results[1]] == [False, True, True] * 2 + [False, False, True]


def test_batch_norm_in_subnets():
    """Training reads the statistics of the batch, and moves the running ones once."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return iz.InvertibleSequential(*(iz.AdditiveCoupling(mlp(HALF, HALF, nn.BatchNorm1d(5))) for _ in range(2)))

    graphs, expected, given = Graphs(), net(), x()
    with iz.mode(expected, "store"):
        loss_of(expected(given)).backward()
    actual = net()
    loss_of(compiled(actual, graphs)(given)).backward()
    assert_near([*gradients(actual), *actual.buffers()], [*gradients(expected), *expected.buffers()])
    assert graphs.saved() == [(4, FEATURES)]
    assert_same_gradients(net().eval(), given)


CONTAINERS: dict[str, Callable[[], nn.Module]] = {
    "nested, parallel, repeated, shared": lambda: iz.InvertibleSequential(
        iz.InvertibleSequential(shared := linear(), iz.Reverse()),
        iz.Parallel(iz.Reverse(), iz.InvertibleLeakyReLU()),
        iz.Repeat(shared, 2),
    ),
    "multi-scale": lambda: iz.MultiScale(linear(), iz.AdditiveCoupling(nn.Linear(1, 2)), input_shape=(FEATURES,)),
    "inverted": lambda: iz.InvertibleSequential(linear(), *stack(1)).inv,
    "chain in a subnet": lambda: iz.InvertibleSequential(
        iz.AdditiveCoupling(iz.InvertibleSequential(iz.Reverse(), iz.AdditiveCoupling(nn.Linear(1, 2))))
    ),
}


@pytest.mark.parametrize("name", among(CONTAINERS, "chain in a subnet"))
def test_containers(name: str):
    net, graphs = CONTAINERS[name](), Graphs()
    assert_same_gradients(net, x(), backend=graphs)
    assert graphs.saved() == [(4, FEATURES)]


@usual
def test_empty_chain():
    assert_same_gradients(iz.InvertibleSequential(), x())


@usual
def test_two_streams_also_if_they_are_one_tensor():
    net, stream = iz.InvertibleSequential(linear(), linear()), torch.randn(4, HALF)
    assert_same_gradients(net, torch.randn(4, HALF), stream)
    assert_same_gradients(net, stream, function=lambda stream: net(stream, stream))


def test_convolutions_in_channels_last():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    chain = iz.InvertibleSequential(iz.InvertibleConv1x1(4), iz.AffineCoupling(net))
    assert_same_gradients(chain, torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last))


@usual
def test_layers_that_keep_their_input():
    net, graphs = iz.InvertibleSequential(linear(), iz.InvertibleTanh(), linear()), Graphs()
    assert_same_gradients(net, x() / 8, backend=graphs)
    assert graphs.saved() == [(4, FEATURES)] * 2


@usual
def test_streams_of_integers():
    net = iz.Parallel(iz.Permute([1, 0, 2]), iz.AdditiveCoupling(mlp(HALF, HALF)))

    def step(x: Tensor) -> Tensor:
        return net(torch.arange(12).view(4, 3), x)[1]

    assert_same_gradients(net, x(), function=step)


@usual
def test_complex_values():
    net, given = iz.InvertibleSequential(Double(), Double()), torch.randn(4, dtype=torch.complex128, requires_grad=True)
    (found,) = torch.autograd.grad(compiled(net, "eager")(given.sin()).abs().sum(), given)
    assert_near([found], [*torch.autograd.grad(4 * given.sin().abs().sum(), given)])


def test_layers_that_ask_for_strides():
    assert_same_gradients(iz.InvertibleSequential(iz.EmergingConv(2, 3)), torch.randn(3, 2, 5, 5))


@usual
def test_mode_recompute():
    net = iz.InvertibleSequential(*stack(2), mode="recompute")
    graphs = Graphs()
    assert_same_gradients(net, x(), backend=graphs)
    assert graphs.saved() == [(4, FEATURES)] + [(4, HALF)] * 3  # the stream that the first one passes on, once


@usual
@pytest.mark.parametrize("why", ["mode store", "hooks"])
def test_steps_aside(why: str):
    net, graphs = iz.InvertibleSequential(*stack(1)), Graphs()
    if why == "hooks":
        net[0].f.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        net.mode = "store"
    assert_same_gradients(net, x(), backend=graphs)
    assert len(graphs.saved()) > 3


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_chain_itself_are_outside(hook: str):
    net, graphs = iz.InvertibleSequential(*stack(2)), Graphs()
    getattr(net, hook)(lambda module, *tensors: 2 * tensors[-1] if torch.is_tensor(tensors[-1]) else 2 * tensors[0][0])
    assert_same_gradients(net, x(), backend=graphs)
    assert graphs.saved() == [(4, FEATURES)]


def test_frozen_and_tied_and_parametrized_weights():
    net = iz.InvertibleSequential(*stack(2))
    net[0].f[0].weight.requires_grad_(False)
    net[1].f = nn.Sequential(shared := nn.Linear(HALF, HALF), nn.Tanh(), shared, nn.Linear(HALF, HALF))
    net[1].f[3].weight = shared.weight
    parametrizations.weight_norm(net[0].f[2])
    assert_same_gradients(net, x())


@usual
def test_a_function_over_the_modules_of_other_layers():
    class Both:
        def __init__(self) -> None:
            self.a, self.b = nn.Linear(HALF, HALF), nn.Linear(HALF, HALF)

        def __call__(self, x: Tensor) -> Tensor:
            return self.a(self.b(x).sin())

    both = Both()
    assert_same_gradients(iz.InvertibleSequential(*map(iz.AdditiveCoupling, (both, both.a, both.b))), x())


def test_half_precision_by_autocast():
    net = iz.InvertibleSequential(linear(), *stack(1)).float()

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    assert_same_gradients(net, x().float(), function=step, tolerance=1e-2)


def test_no_new_compilation_in_the_next_steps():
    net = iz.InvertibleSequential(linear(), linear())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run, optimizer = compiled(net, counter), torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        run(x()).square().sum().backward()
        optimizer.step()
    assert counter.frame_count == 1
    for batch in (5, 7, 9):
        run(torch.randn(batch, FEATURES)).square().sum().backward()
    assert counter.frame_count == 2  # the second one takes any batch


class Untraceable(iz.InvertibleModule):
    def function(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x * 2

    def inverse(self, y: Tensor) -> Tensor:
        return y / 2


class OneWay(iz.InvertibleModule):
    def function(self, x: Tensor) -> Tensor:
        return 2 * x


class Between(iz.InvertibleSequential):
    """Does something between its layers that is no layer's."""

    def _run(self, values: Any, side: Any, log_dets: Any, *, inverted: bool) -> Any:
        return super()._run((2 * values[0],), side, log_dets, inverted=inverted)


def dropout(*sizes: int) -> nn.Module:
    return mlp(*sizes, nn.Dropout(0.5))


def attention(dropout: float) -> nn.Module:
    class Attention(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = super().forward(x).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

    return Attention(HALF, 3 * HALF)


def spectral(*sizes: int) -> nn.Module:
    net = mlp(*sizes)
    parametrizations.spectral_norm(net[0])
    return net


WEIGHT = torch.ones(HALF, requires_grad=True)


class ReadsStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HALF)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.norm.running_var.sqrt()


class ReadsOthers(ReadsStatistics):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm.running_var.sqrt()


def coupled(*subnets: Callable[[Tensor], Tensor]) -> nn.Module:
    return iz.InvertibleSequential(*map(iz.AdditiveCoupling, subnets))


RANDOM = r"draw no random numbers.*"
CHANGED = r"leave their parameters and buffers as they are.*"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (
        lambda: iz.InvertibleSequential(iz.Reverse(), *stack(1, dropout)),
        rf"{RANDOM}AffineCoupling \(f\) in layer 1 \(AffineCoupling\).*'dropout'.*mode 'store'",
    ),
    "noise": (
        lambda: coupled(lambda x: x + torch.randn_like(x)),
        rf"{RANDOM}AdditiveCoupling \(f\) in layer 0 .*'randn_like'",
    ),
    "noise in place": (lambda: coupled(lambda x: x + torch.zeros_like(x).normal_()), rf"{RANDOM}'normal_'"),
    "attention with dropout": (lambda: coupled(attention(0.1)), rf"{RANDOM}'scaled_dot_product_attention'"),
    "checkpoint": (
        lambda: coupled(lambda x: checkpoint(torch.sin, x, use_reentrant=False)),
        r"do without torch.utils.checkpoint.*AdditiveCoupling \(f\) in layer 0",
    ),
    "vmap": (lambda: coupled(lambda x: torch.func.vmap(torch.sin)(x)), r"do without torch.func's transforms"),
    "value": (lambda: coupled(lambda x: x * x.detach().sum().item()), r"look at no tensor's value"),
    "power iteration": (
        lambda: iz.InvertibleSequential(*stack(1, spectral)),
        rf"{CHANGED}AffineCoupling \(f\) in layer 0",
    ),
    "statistics": (lambda: coupled(ReadsStatistics()), rf"{CHANGED}or reads statistics"),
    "statistics of a later layer": (
        lambda: coupled(f := ReadsOthers(), f.norm),
        rf"{CHANGED}in layer 1 .*or reads statistics",
    ),
    "closure": (
        lambda: coupled(lambda x: WEIGHT * x),
        r"tensors that need a gradient to be inputs, side inputs or parameters.*shape \(3,\)",
    ),
    "no inverse": (lambda: iz.InvertibleSequential(OneWay()), r"with an inverse.*OneWay in layer 0 \(OneWay\)"),
    "between": (lambda: Between(*stack(1)), r"pass on what its layers return.*an input of"),
    "untraceable": (
        lambda: iz.InvertibleSequential(iz.InvertibleSequential(*stack(1), Untraceable())),
        r"in Untraceable in layer 1 \(Untraceable\) in layer 0 \(InvertibleSequential\)\n.*2 \* x if x.sum\(\) > 0",
    ),
}


@usual
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    make_net, match = REFUSED[name]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"(?s){match}"):
        compiled(make_net())(x())


@pytest.mark.parametrize("name", ["dropout", "power iteration", "closure", "untraceable"])
def test_what_is_refused_runs_without_fullgraph(name: str):
    """The compiler then does without the chain, and stores; what it could not trace runs eagerly."""
    net, given = REFUSED[name][0](), x().requires_grad_()
    grads = []
    for run in (net, torch.compile(net, backend="aot_eager")):
        net.zero_grad()
        torch.manual_seed(0)
        warns = nullcontext() if run is net else pytest.warns(UserWarning, match="could not trace InvertibleSequential")
        with iz.mode(net, "store" if run is net else "invert"), warns:
            for buffer in net.buffers():
                buffer.copy_(nn.functional.normalize(torch.arange(1.0, len(buffer) + 1), dim=0))
            grads.append([*torch.autograd.grad(loss_of(run(given)), [given, *net.parameters()]), *net.buffers()])
            grads[-1] = [g.clone() for g in grads[-1]]
    assert_near(*grads)


def test_random_layers_in_eval_mode_and_attention_without_dropout():
    net = iz.InvertibleSequential(iz.AdditiveCoupling(dropout(HALF, HALF)), iz.AdditiveCoupling(attention(0.0))).eval()
    net.append(iz.AdditiveCoupling(lambda h: torch.native_dropout(h, 0.5, False)[0]))
    assert_same_gradients(net, x())


@usual
def test_other_transforms_of_a_chain():
    net, given = iz.InvertibleSequential(*stack(2)), x()
    expected = torch.func.grad(lambda x: net(x).sum())(given)
    assert_near([compiled(torch.func.grad(lambda x: net(x).sum()))(given)], [expected])
    assert_near([torch.export.export(net, (given,)).module()(given)], [net(given)])
    with torch.no_grad():
        assert_near([compiled(net)(given)], [net(given)])


count_compilations = partial(torch._dynamo.testing.CompileCounterWithBackend, "aot_eager")


ENTRIES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "forward": lambda net: net,
    "forward_and_log_det": lambda net: net.forward_and_log_det,
    "inverse": lambda net: net.inverse,
    "inverse_and_log_det": lambda net: net.inverse_and_log_det,
    "inv": lambda net: net.inv,
    "a density": lambda net: iz.as_transform(net).inv,
}


@pytest.mark.parametrize("name", among(ENTRIES, "forward_and_log_det"))
def test_a_container_compiled_in_place_is_one_function(name: str):
    counter, given, results = count_compilations(), torch.randn(64, FEATURES, requires_grad=True), []
    net = iz.InvertibleSequential(*stack(3))
    entry = ENTRIES[name](net)
    for compiles in (False, True):
        if compiles:
            net.compile(backend=counter, fullgraph=True)
            entry(given)
        outputs, packed = saved_between(entry, given)
        results.append([*iz.engine.tuple_of(outputs), *torch.autograd.grad(loss_of(outputs), given)])
    assert counter.frame_count == 1
    assert [t.shape for t in packed if t.shape[:1] == (64,)] == [(64, FEATURES)]
    assert_near(*results)


@usual
def test_a_container_compiled_in_place_cannot_free_its_input():
    net = iz.InvertibleSequential(*stack(2), free_input=True)
    net.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="InvertibleSequential: Expected free_input to be False for a container that"):
        net(x())


def test_layers_of_one_structure_compiled_in_place_share_their_compilations():
    counts = []
    for depth in (1, 2, 6):
        torch._dynamo.reset()
        counter, given = count_compilations(), x().requires_grad_()
        net = nn.Sequential(*stack(2 * depth), *(iz.InvertibleLinear(FEATURES) for _ in range(depth)))
        for layer in net:
            layer.compile(backend=counter, fullgraph=True)
        for _ in range(2):
            net(given).sum().backward()
        counts.append(counter.frame_count)
    assert counts[2] == counts[1] <= counts[0] + 1  # the first layer's input may be unlike the others'


IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "a subnet": lambda: iz.AffineCoupling(mlp(HALF, FEATURES)),
    "a matrix": lambda: iz.InvertibleLinear(FEATURES, kind="plu"),
    "a matrix and a subnet": lambda: iz.InvertibleLinear(
        FEATURES, kind="plu", conditioner=nn.Linear(2, FEATURES**2 + FEATURES)
    ),
    "a spline": lambda: iz.RationalQuadraticSpline(FEATURES),
    "an activation": iz.InvertibleLeakyReLU,
    "statistics": lambda: iz.InvertibleBatchNorm(FEATURES),
}


@pytest.mark.parametrize("direction", ["layer", "inv"])
@pytest.mark.parametrize("name", among(IN_PLACE, "a subnet", "a matrix and a subnet", "an activation"))
def test_layers_compiled_in_place(name: str, direction: str):
    """Forward and replay run compiled, with and without log-determinants, and no more is saved than before."""
    layer, counter, results = IN_PLACE[name](), count_compilations(), []
    layer, given = layer if direction == "layer" else layer.inv, x().requires_grad_()
    side = {"context": torch.randn(4, 2, requires_grad=True)} if "and a subnet" in name else {}
    leaves = [given, *side.values(), *layer.parameters()]
    for compiles in (False, True):
        if compiles:
            layer.compile(backend=counter, fullgraph=True)
        y, kept = saved_between(layer, given, **side)
        (z, log_det), more = saved_between(layer.forward_and_log_det, given, **side)
        results.append([y, z, log_det, *torch.autograd.grad(loss_of((y, z, log_det)), leaves)])
        assert kept == more == []
    assert counter.frame_count > 0
    assert_near(*results)


def test_layers_compiled_in_place_are_of_any_number_of_structures():
    """The compiler allows 8 compilations of one piece of code; it raises where `fullgraph` would need more."""
    counter = count_compilations()
    for n in range(1, 10):
        for layer in (iz.AdditiveCoupling(nn.Sequential(nn.Linear(n, n))), iz.InvertibleLinear(2 * n)):
            given = torch.randn(3, 2 * n)
            expected = layer(given)
            before = counter.frame_count
            layer.compile(backend=counter, fullgraph=True)
            assert_near([layer(given)], [expected])
            assert counter.frame_count == before + 1


@usual
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_layers_compiled_in_place_are_as_they_were(copied: Callable[[nn.Module], nn.Module]):
    counter, layer = count_compilations(), iz.InvertibleLinear(FEATURES)
    layer.compile(backend=counter)
    other = copied(layer)
    other.load_state_dict(iz.InvertibleLinear(FEATURES).state_dict())
    before = layer(given := x())
    assert counter.frame_count == 1
    assert not torch.equal(other(given), before)
    assert_near([other(given)], [nn.functional.linear(given, other.weight, other.bias)])
    assert counter.frame_count == 1
