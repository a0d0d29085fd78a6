"""Functional calls, torch.func, higher derivatives, tracing: other ways to run a step."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as hessian_by_autograd
from torch.autograd.functional import jacobian as jacobian_by_autograd
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import invzoo as iz
from invzoo.engine import tuple_of
from invzoo.testing import track_memory
from invzoo.testing.running import flat, has_log_det
from tests.reference import (
    FEATURES,
    HALF,
    Called,
    Case,
    assert_near,
    assert_same_step,
    first_cases,
    make,
    mlp,
    train_step,
)

# Forward mode decomposes some operators with a compiler that torch itself no longer recommends.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

SAVING = pytest.mark.parametrize("mode", ["recompute", "invert"])


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def sum_of_sines(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x).sin().sum()


# ---- functional_call ------------------------------------------------------------------------------------------------


def other_parameters(net: nn.Module, kind: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return parameters for a functional call, and the leaves that get the gradients."""
    generator = torch.Generator().manual_seed(1)
    values = leaves = [torch.randn(p.shape, generator=generator).requires_grad_() for p in net.parameters()]
    if kind == "parameter":
        values = leaves = [nn.Parameter(v.detach()) for v in leaves]
    elif kind == "non_leaf":
        values = [(v * 0.5).tanh() for v in leaves]
    elif kind == "view":
        leaves = [torch.cat([v.detach().flatten() for v in leaves]).requires_grad_()]
        parts = leaves[0].split([p.numel() for p in net.parameters()])
        values = [part.reshape(p.shape) for part, p in zip(parts, net.parameters())]
    elif kind == "constant":
        values = [v.detach() for v in leaves]
    return dict(zip([n for n, _ in net.named_parameters()], values, strict=True)), leaves


@pytest.mark.parametrize("kind", ["leaf", "parameter", "non_leaf", "view", "constant"])
def test_functional_call(case: Case, kind: str):
    def program(net: nn.Module) -> list[Tensor | None]:
        values, leaves = other_parameters(net, kind)
        x = leaf(case.x)
        functional_call(net, values, (x.sigmoid(),)).square().sum().backward()
        assert all(p.grad is None for p in net.parameters())
        return [x.grad, *(v.grad for v in leaves)]

    case.holds(program)
    assert_same_step(case)


@pytest.mark.parametrize("kind", ["leaf", "non_leaf"])
def test_a_parameter_of_a_functional_call_changed_before_backward_is_an_error(case: Case, kind: str):
    values, _ = other_parameters(case.net, kind)
    y = functional_call(case.net, values, (case.x,))
    with torch.no_grad():
        for value in values.values():
            value.mul_(2)
    with pytest.raises(RuntimeError, match="in.?place|stay as they were"):
        y.square().sum().backward()


# ---- programs -------------------------------------------------------------------------------------------------------


def some_parameters_of_a_functional_call(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    name, parameter = next(iter(net.named_parameters()))
    other, x = torch.full_like(parameter, 0.3, requires_grad=True), leaf(x)
    functional_call(net, {name: other * 2}, (x.exp(),)).square().sum().backward()
    return [other.grad, x.grad]


def two_functional_calls_in_flight(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    (values, leaves), x = other_parameters(net, "non_leaf"), leaf(x)
    losses = [functional_call(net, values, (x,)).square().sum(), net(x.exp()).square().sum()]
    for loss in losses:
        loss.backward()
    return [x.grad, *(v.grad for v in leaves)]


def the_inner_loop_of_maml(net: nn.Module, x: Tensor) -> None:
    """Differentiate through steps of gradient descent, each a functional call with the result of the one before."""
    values = dict(net.named_parameters())
    for _ in range(2):
        loss = functional_call(net, values, (x,)).square().mean()
        grads = torch.autograd.grad(loss, [*values.values()], create_graph=True)
        values = {n: v - 0.1 * g for (n, v), g in zip(values.items(), grads, strict=True)}
    functional_call(net, values, (x,)).sin().sum().backward()


def a_result_of_vjp_is_differentiated(net: nn.Module, x: Tensor) -> list[Tensor]:
    back, v = vjp(net.requires_grad_(False), x)[1], leaf(x)
    again = grad(lambda u: back(u)[0].sin().sum())(x)
    return [*torch.autograd.grad(back(v)[0].sin().sum(), v), again, *vmap(back)(torch.stack([x, again]))]


def a_jacobian_is_differentiated(net: nn.Module, x: Tensor, chunk_size: int | None = None) -> tuple[Tensor, ...]:
    """By parameters that needed a gradient outside; splits and merges, which have none, run below all the same."""
    jacobian = jacrev(net, chunk_size=chunk_size)(x)
    return jacobian, *torch.autograd.grad(jacobian.sin().sum(), [*net.parameters()], allow_unused=True)


def an_ensemble(net: nn.Module, x: Tensor) -> list[Tensor]:
    nets = [net, copy.deepcopy(net)]
    with torch.no_grad():
        for p in nets[1].parameters():
            p.mul_(0.7)
    values, buffers = stack_module_state(nets)
    values = {n: leaf(v) for n, v in values.items()}
    y = vmap(lambda v, b, x: functional_call(net, (v, b), (x,)), in_dims=(0, 0, None))(values, buffers, x)
    y.square().sum().backward()
    return [y, *(v.grad for v in values.values())]


def backward_in_inference_mode(net: nn.Module, x: Tensor) -> Tensor:
    loss = net(x := leaf(x)).square().sum()
    with torch.inference_mode():
        loss.backward()
    return x.grad


def forward_mode(net: nn.Module, x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        return [*forward_ad.unpack_dual(net(forward_ad.make_dual(x, x.cos())))]


def forward_mode_over_backward(net: nn.Module, x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x := leaf(x), x.cos())
        (g,) = torch.autograd.grad(net(dual).square().sum(), x, create_graph=True)
        return [*forward_ad.unpack_dual(g)]


def backward_under_a_dual_level(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The forward is an ordinary one; its backward carries tangents."""
    y = net(x := leaf(x))
    with forward_ad.dual_level():
        v = forward_ad.make_dual(torch.ones_like(y), y.detach().cos())
        return [*forward_ad.unpack_dual(*torch.autograd.grad(y, x, v))]


def forward_mode_through_a_transform(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.requires_grad_(False)
    with forward_ad.dual_level():
        return [*forward_ad.unpack_dual(grad(partial(sum_of_sines, net))(forward_ad.make_dual(x, x.cos())))]


def batched_gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    y = net((x := leaf(x)).sigmoid())
    basis = torch.eye(y.numel()).reshape(-1, *y.shape)
    return [*torch.autograd.grad(y, [x, *net.parameters()], basis, is_grads_batched=True)]


def vmap_over_backward(net: nn.Module, x: Tensor) -> Tensor:
    y = net(x := leaf(x))
    return vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(torch.stack([y, y.cos()]).detach())


def jacobian_and_hessian(net: nn.Module, x: Tensor, vectorize: bool = False) -> list[Tensor]:
    curvature = hessian_by_autograd(lambda v: net(v).square().sum(), x, vectorize=vectorize)
    return [jacobian_by_autograd(net, x, vectorize=vectorize), curvature]


def third_derivative(net: nn.Module, x: Tensor) -> list[Tensor]:
    value, found = net(x := leaf(x)).sin().sum(), []
    for _ in range(3):
        found += torch.autograd.grad(value, x, create_graph=True)
        value = found[-1].square().sum()
    return found


def where_hooks_are_disabled(net: nn.Module, x: Tensor) -> list[Tensor]:
    with disable_saved_tensors_hooks("hooks are disabled here"):
        return train_step(net, x)


def backward_where_hooks_are_disabled(net: nn.Module, x: Tensor) -> Tensor:
    """Only a graph is walked there; that it is replayed is no affair of the caller's."""
    loss = net((x := leaf(x)).sigmoid()).square().sum()
    with disable_saved_tensors_hooks("hooks are disabled here"):
        loss.backward()
    return x.grad


def a_traced_transform(net: nn.Module, x: Tensor) -> Tensor:
    net.requires_grad_(False)
    return make_fx(grad(partial(sum_of_sines, net)))(x)(x.cos())


def a_traced_step(net: nn.Module, x: Tensor, tracing_mode: str = "real") -> Tensor:
    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net(x.sigmoid()).square().sum(), x)[0]

    return make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)(x.cos()).detach()


def a_scripted_trace(net: nn.Module, x: Tensor) -> list[Tensor]:
    return train_step(torch.jit.trace(net, x), x.cos())


def loss_of(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda values, x: functional_call(net, values, (x.sigmoid(),)).square().sum()


def values_of(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in net.named_parameters()}


PROGRAMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    program.__name__: program
    for program in (
        some_parameters_of_a_functional_call,
        two_functional_calls_in_flight,
        the_inner_loop_of_maml,
        a_result_of_vjp_is_differentiated,
        a_jacobian_is_differentiated,
        an_ensemble,
        backward_in_inference_mode,
        forward_mode,
        forward_mode_over_backward,
        backward_under_a_dual_level,
        forward_mode_through_a_transform,
        batched_gradients,
        vmap_over_backward,
        jacobian_and_hessian,
        third_derivative,
        where_hooks_are_disabled,
        backward_where_hooks_are_disabled,
        a_traced_transform,
        a_traced_step,
        a_scripted_trace,
    )
} | {
    "a_jacobian_in_chunks_is_differentiated": partial(a_jacobian_is_differentiated, chunk_size=5),
    "vectorized_jacobian_and_hessian": partial(jacobian_and_hessian, vectorize=True),
    "a_step_traced_with_fake_tensors": partial(a_traced_step, tracing_mode="fake"),
    "grad": lambda net, x: grad(loss_of(net))(values_of(net), x),
    "grad_of_input": lambda net, x: grad(loss_of(net), argnums=1)(values_of(net), x),
    "grad_of_module": lambda net, x: grad(lambda v: net(v).square().sum())(x),
    "grad_of_grad": lambda net, x: grad(lambda v: grad(loss_of(net), 1)(values_of(net), v).sin().sum())(x),
    "vjp": lambda net, x: vjp(net, x)[1](torch.ones_like(x)),
    "vmap": lambda net, x: vmap(net)(x.unsqueeze(1)),
    "per_sample_grads": lambda net, x: vmap(grad(loss_of(net)), (None, 0))(values_of(net), x.unsqueeze(1)),
    "jacrev": lambda net, x: jacrev(net)(x),
    "jacfwd": lambda net, x: jacfwd(net)(x),
    "hessian": lambda net, x: hessian(lambda v: net(v).square().sum())(x),
    "jvp": lambda net, x: jvp(net, (x,), (x.cos(),)),
    "hvp": lambda net, x: jvp(grad(lambda v: net(v).square().sum()), (x,), (x.cos(),)),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are checked, and traced shapes are tensors
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_what_it_does_with_a_plain_net(case: Case, name: str):
    case.holds(lambda net: PROGRAMS[name](net, case.x))
    for net in (case.net, case.plain):
        net.requires_grad_()
    assert_same_step(case, steps=1)  # and leaves nothing behind


@pytest.mark.parametrize("middle", [partial(nn.Dropout, 0.5), partial(nn.BatchNorm1d, 5)], ids=["dropout", "norm"])
def test_batched_gradients_of_subnets_that_draw_or_take_statistics(mode: str, middle: Callable[[], nn.Module]):
    case = make("stack", lambda *sizes: mlp(*sizes, middle()), mode)
    case.holds(lambda net: batched_gradients(net, case.x))


def test_dropout_inside_a_transform(mode: str):
    case = make("stack", lambda *sizes: mlp(*sizes, nn.Dropout(0.5)), mode)
    case.holds(lambda net: grad(partial(sum_of_sines, net.requires_grad_(False)))(case.x))


# ---- torch.func -----------------------------------------------------------------------------------------------------


def test_vjp_holds_one_activation(mode: str):
    """And the peak of its backward does not grow with depth."""
    held, peaks = [], []
    x = torch.randn(64, FEATURES)
    for depth in (6, 24):
        layers = [iz.AdditiveCoupling(mlp(HALF, HALF), swap=i % 2 == 1) for i in range(depth)]
        net = iz.InvertibleSequential(*layers, mode=mode).requires_grad_(False)
        with track_memory() as memory:
            y, back = vjp(net, x)
            held.append(memory.current)
            back(y)
            peaks.append(memory.peak)
    if mode == "invert":
        assert held == [x.nbytes] * 2
        assert peaks[1] == peaks[0]
    else:
        assert held[1] > 2 * held[0]


@SAVING
@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y.sin().sum()])
def test_a_second_derivative_by_autograd_inside_a_transform_is_refused(mode: str, loss: Callable[[Tensor], Tensor]):
    """Also where the gradient that backward starts with is a constant."""
    net = iz.InvertibleSequential(*[iz.AdditiveCoupling(mlp(HALF, HALF)) for _ in range(2)], mode=mode)
    net.requires_grad_(False)

    def penalty(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(loss(net(x)), x, create_graph=True)
        return g.square().sum()

    with pytest.raises(RuntimeError, match="a second one by autograd inside it"):
        grad(penalty)(torch.randn(4, FEATURES))


@pytest.mark.parametrize("direction", ["forward", "log_det", "inverse"])
@pytest.mark.parametrize("case", first_cases())
def test_gradients_of_every_layer_by_a_transform(case: iz.testing.Case, direction: str):
    """They are those that autograd finds in mode store, for inputs, side inputs and parameters."""
    layer, values, side = (make_it(dtype=torch.float64) for make_it in (case.layer, case.inputs, case.side_inputs))
    with torch.no_grad():
        outputs = tuple_of(layer(*values, **side))
    values = outputs if direction == "inverse" else values
    log_det = direction == "log_det" and has_log_det(layer, values, outputs)
    net = Entered(layer.inv if direction == "inverse" else layer, log_det)
    wanted = {n: v for n, v in {**dict(enumerate(values)), **side}.items() if v.is_floating_point()}

    def loss(parameters: dict[str, Tensor], given: dict[int | str, Tensor]) -> Tensor:
        torch.manual_seed(7)
        inputs = tuple([given.get(i, value) for i, value in enumerate(values)])
        outputs = functional_call(net, parameters, inputs, {name: given.get(name, x) for name, x in side.items()})
        return sum(y.sin().sum() for y in outputs if y.is_floating_point())  # type: ignore[return-value]

    parameters = {n: p.detach() for n, p in net.named_parameters()}
    found = grad(loss, argnums=(0, 1))(parameters, wanted)
    leaves = [{n: x.clone().requires_grad_() for n, x in group.items()} for group in (parameters, wanted)]
    wrt = [x for group in leaves for x in group.values()]
    with iz.mode(net, "store"):
        total = loss(*leaves)
    some = total.requires_grad  # integers have none
    expected = torch.autograd.grad(total, wrt, materialize_grads=True) if some else [torch.zeros_like(x) for x in wrt]
    assert_near([x for group in found for x in group.values()], expected, 1e-6)


class Entered(nn.Module):
    """A layer, with its log-determinant or without, as a module that can be called functionally."""

    def __init__(self, layer: iz.InvertibleModule, log_det: bool) -> None:
        super().__init__()
        self.layer, self.log_det = layer, log_det

    def forward(self, *values: Tensor, **side: Tensor) -> tuple[Tensor, ...]:
        if self.log_det:
            return flat(*self.layer.forward_and_log_det(*values, **side))
        return tuple_of(self.layer(*values, **side))


def test_a_transform_evaluates_as_often_as_autograd(mode: str):
    calls: list[Tensor] = []
    subnets = [Called(nn.Linear(HALF, HALF), lambda net, x: calls.append(x) or net(x)) for _ in range(5)]
    net = iz.InvertibleSequential(*map(iz.AdditiveCoupling, subnets), mode=mode).requires_grad_(False)
    by_transform = grad(lambda v: net(v).sum())
    counts = []
    for run in (by_transform, by_transform, lambda v: net(v.requires_grad_()).sum().backward()):
        calls.clear()
        run(torch.randn(4, FEATURES))
        counts.append(len(calls))
    assert counts[1] == counts[2] == (5 if mode == "store" else 10)


def test_without_gradients_below_nothing_is_recorded_there(mode: str):
    net, x = make("stack").net, torch.randn(4, FEATURES)
    net.mode = mode
    with torch.no_grad():
        g, aux = grad(lambda v: (net(v).sin().sum(), net(x)), has_aux=True)(x)
    v = x.clone().requires_grad_()
    assert_near([g], torch.autograd.grad(net(v).sin().sum(), v))
    assert not g.requires_grad
    assert not aux.requires_grad


@SAVING
@pytest.mark.parametrize("leaf", [True, False])
def test_a_closure_that_needs_a_gradient_outside_a_transform_is_refused(mode: str, leaf: bool):
    w = torch.rand(FEATURES, requires_grad=True)
    w = w if leaf else w.exp()
    inverse = None if mode == "recompute" else lambda y: y / w
    with pytest.raises(RuntimeError, match="to close over no tensor that needs a gradient outside of it"):
        grad(lambda v: iz.checkpoint(lambda t: t * w, v, inverse=inverse).sum())(torch.randn(4, FEATURES))


COMPILED: tuple[Callable[[iz.InvertibleSequential], Callable[[Tensor], Tensor]], ...] = (
    lambda net: torch.compile(net, backend="aot_eager"),
    lambda net: net.compile(backend="aot_eager") or net,
    lambda net: [layer.compile(backend="aot_eager") for layer in net] and net,
)


def test_compiled_nets_inside_a_transform(mode: str):
    """All in one test, for what the compiler keeps of one would be used in another."""
    x, results = torch.randn(4, FEATURES), []
    for make_compiled in (lambda net: net, *COMPILED, *COMPILED):
        torch.manual_seed(0)
        couplings = [iz.AdditiveCoupling(mlp(HALF, HALF), swap=i % 2 == 1) for i in range(2)]
        net = iz.InvertibleSequential(*couplings, iz.InvertibleLinear(FEATURES), mode=mode).requires_grad_(False)
        gradient = grad(partial(sum_of_sines, make_compiled(net)))
        results += [gradient(x), gradient(x)]
    for result in results:
        assert_near([result], results[:1])


@pytest.mark.parametrize("divide", [False, True], ids=["as it is", "used first without gradients"])
def test_a_closure_inside_a_transform(mode: str, divide: bool):
    x, w = torch.randn(4, FEATURES), torch.rand(FEATURES) + 0.5

    def loss(call: Callable[..., Tensor], v: Tensor, w: Tensor) -> Tensor:
        def scale() -> Tensor:
            with torch.no_grad():
                norm = w.norm()
            return w / norm if divide else w

        inverse = None if mode == "recompute" else lambda y: y / scale()
        return call(lambda t: t * scale(), v.sin(), inverse=inverse).sin().sum()

    found = grad(partial(loss, partial(iz.checkpoint, enabled=mode != "store")), argnums=(0, 1))(x, w)
    assert_near(found, grad(partial(loss, lambda f, v, inverse: f(v)), argnums=(0, 1))(x, w))


class Scaled(torch.autograd.Function):
    """`x * w`, as a function that torch.func cannot look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


class Scale(nn.Module):
    def __init__(self, *, trained: bool = True) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.rand(HALF)) if trained else None)
        self.register_buffer("shift", None if trained else torch.rand(HALF))

    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(x, self.shift if self.weight is None else self.weight)


@SAVING
def test_autograd_functions_for_which_torch_func_has_no_rule(mode: str):
    """With a tied parameter and a buffer, too, which a functional call gives another value."""
    scale, tied = Scale(), Scale()
    tied.weight = scale.weight
    subnet = nn.Sequential(scale, tied, nn.Tanh(), Scale(trained=False))
    net, x = iz.InvertibleSequential(*map(iz.AdditiveCoupling, (Scale(), subnet)), mode=mode), torch.randn(4, FEATURES)
    state = {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}
    found = grad(lambda s, v: functional_call(net, s, (v,)).sin().sum(), argnums=(0, 1))(state, x)
    wanted = [*net.parameters(), subnet[3].shift.requires_grad_(), x.requires_grad_()]
    assert_near([*found[0].values(), found[1]], torch.autograd.grad(net(x).sin().sum(), wanted))


def test_vmap_inside_subnets(mode: str):
    assert_same_step(make("stack", lambda *sizes: Called(mlp(*sizes), lambda net, x: vmap(net)(x)), mode))


@SAVING
def test_torch_func_inside_subnets_says_what_to_do(mode: str):
    net = iz.AdditiveCoupling(grad(lambda x: x.sin().sum()), mode=mode)
    with pytest.raises(RuntimeError, match="Use torch.autograd.grad in AdditiveCoupling"):
        net(torch.randn(3, 4, requires_grad=True))


def test_autocast_of_a_tied_block_inside_and_outside(mode: str):
    """Autocast caches the weight's cast where it is first used, outside the stack or in it. Backward has another."""
    case = make("stack", mode=mode)
    x = case.x.float()

    def program(net: nn.Module) -> Tensor:
        v = leaf(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(net(v).float())
            y = y + net[0].f(y.chunk(2, 1)[0]).float().mean()
        with torch.autocast("cpu", torch.float16):
            y.float().square().sum().backward()
        return v.grad

    Case(case.net.float(), case.plain.float(), x).holds(program, tolerance=1e-3)
