"""What a call holds, refuses and leaves as it was, seen from outside."""

import functools
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp
from torch.testing import assert_close

import invzoo as iz
from invzoo.engine.eager import kept as kept_module
from invzoo.testing.memory import track_memory

SAVING = pytest.mark.parametrize("mode", ["recompute", "invert"])


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exp(x: Tensor, **options: object) -> Tensor:
    return iz.checkpoint(torch.exp, x, inverse=torch.log, **options)


def double(x: Tensor) -> Tensor:
    """A call that saves nothing."""
    return iz.checkpoint(lambda v: 2 * v, x, inverse=lambda v: v / 2)


# ---- what it refuses ------------------------------------------------------------------------------------------------


def test_a_wrong_inverse_behind_a_stream_that_is_passed_on():
    """The call before it saves nothing; the coupling between needs what comes out there."""
    moving, passed = torch.randn(5, 3, requires_grad=True), double(torch.randn(5, 3, requires_grad=True))
    a, passed = iz.AdditiveCoupling(nn.Linear(3, 3))(moving, passed)

    def triple(x: Tensor) -> Tensor:
        return 3 * x

    c = iz.checkpoint(triple, passed, inverse=lambda v: v / 2)
    del passed
    with pytest.raises(RuntimeError, match="Expected triple to be replayed within a relative error"):
        (a.sum() + c.sum()).backward()


RETURNED = {
    "another shape": (lambda y: y[:1], r"tensor of shape \(3,\) for input 0; got shape \(1,\)"),
    "no tensor": (lambda _: "x", r"tensor of shape \(3,\) for input 0; got str"),
    "another number of values": (lambda y: (y, y), "1 values; got 2"),
}


@pytest.mark.parametrize("returned", RETURNED)
def test_an_inverse_that_returns_something_else(returned: str):
    inverse, message = RETURNED[returned]
    y = iz.checkpoint(torch.exp, torch.ones(3, requires_grad=True), inverse=inverse)
    with pytest.raises(RuntimeError, match=f"Expected the inverse of exp to return (a )?{message}"):
        y.sum().backward()


class Shifted(iz.InvertibleModule):
    """Its inverse is wrong by a constant."""

    def function(self, x: Tensor) -> Tensor:
        return x.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y.log() + 0.1


@pytest.mark.parametrize(("check", "mode"), [("never", "invert"), ("first", "recompute")])
def test_an_inverse_is_compared_when_it_is_to_be(check: str, mode: str):
    """Though calls before were not, or those before recomputed, and their outputs were compared."""
    layer, x = Shifted(check=check, mode=mode), torch.randn(3, requires_grad=True)
    layer(x).sum().backward()
    layer.check, layer.mode = "first", "invert"
    with pytest.raises(RuntimeError, match="Expected Shifted to be replayed .* for input 0. Its inverse is wrong"):
        layer(x).sum().backward()


def test_a_held_output_is_nearer_than_the_one_that_a_backward_rebuilt():
    """What half precision would excuse is refused where nothing was rounded."""
    x = torch.rand(3, requires_grad=True)
    y = iz.checkpoint(torch.exp, x, inverse=lambda v: v.log() + 1e-3, check="always")
    z = iz.checkpoint(lambda v: v.bfloat16().exp(), y, inverse=lambda v: v.log().double())
    torch.autograd.grad(z.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="Expected exp to be replayed within"):
        torch.autograd.grad(y.sum(), x)


def test_an_input_that_was_stepped_is_rebuilt():
    x = torch.rand(3, requires_grad=True)
    wanted = 2 * x.detach().clone()
    loss = iz.checkpoint(torch.square, x, inverse=torch.sqrt).sum()
    x.detach().add_(1)
    assert_close(torch.autograd.grad(loss, x)[0], wanted)


def test_a_function_that_is_not_deterministic_is_told_which_output():
    noise = iter(range(1, 9))
    y = iz.checkpoint(lambda v: v.exp() * next(noise), torch.randn(3, requires_grad=True), check="always")
    with pytest.raises(RuntimeError, match="for output 0. Its inverse is wrong, or it is not deterministic"):
        y.sum().backward()


# ---- whose values it takes ------------------------------------------------------------------------------------------

CHANGES = {
    "values": lambda h: h.mul_(2),
    "data": lambda h: setattr(h, "data", torch.zeros_like(h)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_held_output_that_was_changed_is_rebuilt(change: str):
    """A plain net saves neither what a coupling moves nor what is doubled."""
    layer, x = iz.AdditiveCoupling(nn.Linear(2, 2), check="never"), torch.randn(4, 4, requires_grad=True)
    wanted = torch.autograd.grad(2 * layer(x).sum(), [x, *layer.parameters()])
    h = layer(x)
    y = double(h)
    CHANGES[change](h)
    assert_close(torch.autograd.grad(y.sum(), [x, *layer.parameters()]), wanted)


def test_an_inverse_runs_without_gradients_in_every_backward():
    seen, x = [], torch.rand(3, requires_grad=True)

    def inverse(y: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return y.log()

    torch.autograd.grad(iz.checkpoint(torch.exp, x, inverse=inverse).sum(), x, create_graph=True)
    assert seen == [False]


@pytest.mark.parametrize(
    ("shape", "stride", "alike"),
    [
        ((3, 4), (1, 3), True),
        ((2, 2, 3), (7, 4, 1), True),  # with gaps
        ((3, 1, 4), (1, 0, 3), True),
        ((4, 3), (2, 1), False),  # rows that overlap
        ((2, 3), (2, 1), False),
    ],
)
def test_a_rebuilt_input_lies_in_memory_as_it_did(shape: tuple[int, ...], stride: tuple[int, ...], alike: bool):
    strides, source = [], torch.rand(20, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        strides.append(x.stride())
        return x.contiguous().exp()

    x = source.as_strided(shape, stride)
    y = iz.checkpoint(function, x, inverse=torch.log)
    assert_close(torch.autograd.grad(y.sum(), source), torch.autograd.grad(x.exp().sum(), source))
    assert (strides[0] == strides[1]) == alike


def test_a_conjugate_is_another_tensor():
    x = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    wanted = torch.autograd.grad(x.exp().conj().exp().abs().sum(), x)
    assert_close(torch.autograd.grad(exp(exp(x, check="never").conj(), check="never").abs().sum(), x), wanted)


def test_complex_values_are_freed():
    x = torch.rand(LARGE, dtype=torch.complex128, requires_grad=True)
    with track_memory() as memory:
        y = exp(exp(exp(x)))
        assert memory.current < 2 * y.nbytes


def test_a_negative_is_another_tensor():
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.complex(x, x.exp())
        return y.imag, y.conj().imag  # the same numbers in memory

    x = torch.randn(3, requires_grad=True)
    y, z = iz.checkpoint(function, x, inverse=lambda _, z: (-z).log())
    assert_close(torch.autograd.grad((y - z).sum(), x), torch.autograd.grad(2 * x.exp().sum(), x))


@dataclass
class Options:
    scale: float = 2.0


@SAVING
@pytest.mark.parametrize("options", [Options, Options(3.0)], ids=["class", "instance"])
def test_side_inputs_without_tensors(mode: str, options: Any):
    def inverse(y: Tensor, options: Any) -> Tensor:
        return y.log() / options.scale

    x = torch.randn(3, requires_grad=True)
    way_back = inverse if mode == "invert" else None
    y = iz.checkpoint(lambda v, options: (v * options.scale).exp(), x, inverse=way_back, options=options)
    assert_close(torch.autograd.grad(y.sum(), x)[0], options.scale * (options.scale * x).exp())


@SAVING
def test_side_inputs_inside_a_transform(mode: str):
    def scaled(x: Tensor, *, scale: Tensor) -> Tensor:
        return x * scale

    def loss(x: Tensor, scale: Tensor) -> Tensor:
        return iz.checkpoint(scaled, x, inverse=way_back, scale=scale).exp().sum()

    way_back = (lambda y, scale: y / scale) if mode == "invert" else None
    x, scale = torch.randn(3), torch.rand(3) + 1
    assert_close(grad(loss, argnums=(0, 1))(x, scale), grad(lambda x, s: (x * s).exp().sum(), argnums=(0, 1))(x, scale))


def test_gradients_of_a_transform_are_differentiated_outside():
    for x, scale in ((torch.rand(3, requires_grad=True), 2.0), (torch.rand(3), torch.tensor(2.0, requires_grad=True))):
        results = []
        for run in (iz.checkpoint, lambda f, v, scale, **_: f(v, scale)):

            def loss(v: Tensor, run: Any = run, scale: Any = scale) -> Tensor:
                return run(lambda v, scale: (v * scale).exp(), v, scale=scale, inverse=lambda y, scale: y.log() / scale)

            g = grad(lambda v: loss(v).square().sum())(x)
            results.append(torch.autograd.grad(g.sum(), x if x.requires_grad else scale))
        assert_close(*results)


def test_a_pullback_is_differentiated_though_an_input_is_not_used():
    x, v = torch.rand(3), torch.rand(3, requires_grad=True)
    _, pull = vjp(lambda a: iz.checkpoint(lambda a, b: a.exp(), a, 2 * a), x)
    assert_close(torch.autograd.grad(pull(v)[0].square().sum(), v)[0], 2 * v * (2 * x).exp())


class Stop(torch.autograd.Function):
    """The identity, through which no gradient comes back."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def test_no_gradient_comes_back_to_a_call_inside_a_transform():
    x = torch.randn(3)
    assert_close(grad(lambda v: (Stop.apply(exp(v)) + 2 * v).sum())(x), torch.full_like(x, 2))


@SAVING
def test_a_functional_call_of_a_layer_without_a_bias(mode: str):
    layer, x = iz.AdditiveCoupling(nn.Linear(2, 2, bias=False)), torch.randn(3, 4)
    weight, found = layer.f.weight.detach().requires_grad_(), []
    for value in ("store", mode):
        with iz.mode(layer, value):
            y = functional_call(layer, {"f.weight": weight.exp()}, (x,))
            found += torch.autograd.grad(y.square().sum(), weight)
    assert_close(*found)


def test_a_container_hands_side_inputs_on_where_a_log_det_is_asked_for():
    layer = iz.AffineCoupling(lambda x, *, scale: torch.cat((x * scale, x), 1))
    (x, scale), net = (torch.randn(3, 4), torch.randn(3, 1)), iz.InvertibleSequential(layer)
    assert_close(net.forward_and_log_det(x, scale=scale), layer.forward_and_log_det(x, scale=scale))


def test_a_subnet_with_any_side_inputs_takes_those_without_names_of_their_own():
    x = torch.randn(3, 4)
    y = iz.AdditiveCoupling(lambda x, **side: x * side["scale"])(x, scale=2.0)
    assert_close(y, torch.cat((x[:, :2] + 2 * x[:, 2:], x[:, 2:]), 1))


# ---- what it holds --------------------------------------------------------------------------------------------------

LARGE = 10_000


def test_what_a_backward_rebuilds_on_its_way_is_dropped():
    """A later call rebuilds two activations for the sake of one of them."""
    x = torch.randn(LARGE, requires_grad=True)
    with track_memory() as memory:
        a, b = exp(x), exp(x)
        c, d = iz.checkpoint(lambda a, b: (a + b.sin(), 2 * b), a, b, inverse=lambda c, d: (c - (d / 2).sin(), d / 2))
        loss = a.sum()
        del a, b
        before = memory.current
        torch.autograd.grad(loss, x)
        assert memory.current <= before
        del c, d


def test_what_a_part_of_a_kept_graph_rebuilds_is_dropped():
    x, weight = torch.randn(LARGE, requires_grad=True), torch.rand(LARGE, requires_grad=True)
    with track_memory() as memory:
        loss = iz.checkpoint(lambda v: v * weight, exp(x), inverse=lambda v: v / weight).sum()
        before = memory.current
        torch.autograd.grad(loss, weight, retain_graph=True)
        assert memory.current <= before


def test_what_a_look_at_the_graph_rebuilds_is_dropped():
    x = torch.randn(LARGE, requires_grad=True)
    with track_memory() as memory:
        y = exp(exp(x))
        before = memory.current
        assert_close(y.grad_fn.next_functions[0][0]._saved_result, x.exp())
        assert memory.current <= before


def test_side_inputs_are_held_without_their_graphs():
    z, x = torch.randn(LARGE, requires_grad=True), torch.randn(3, requires_grad=True)
    with track_memory() as memory:
        h = exp(x)
        scale = z.exp().mean()
        y = iz.checkpoint(lambda v, scale: v * scale, h, inverse=lambda v, scale: v / scale, scale=scale)
        del y, scale
        assert memory.current < LARGE


def test_branches_that_nobody_uses_are_not_captured():
    def function(x: Tensor, dropped: int) -> Tensor:
        for _ in range(dropped):
            x.sin().exp().sum()
        return x.exp()

    x, peaks = torch.randn(LARGE, requires_grad=True), []
    for dropped in (1, 8):
        y = iz.checkpoint(lambda v, n=dropped: function(v, n), x, inverse=torch.log, check="never").sum()
        with track_memory() as memory:
            y.backward()
            peaks.append(memory.peak)
    assert peaks[1] <= peaks[0]


def test_a_rebuilt_stream_does_not_hold_the_larger_tensor_that_it_was_cut_from():
    """Cut by columns it is copied; cut by rows it is as it was, and could be moved back in place."""
    couplings = [iz.AdditiveCoupling(nn.Linear(4, 4), swap=i % 2 == 1, check="never") for i in range(4)]
    peaks = []
    for dim in (1, 0):

        def merge(a: Tensor, b: Tensor, dim: int = dim) -> Tensor:
            return iz.checkpoint(lambda *s: torch.cat(s, dim), a, b, inverse=lambda y: y.chunk(2, dim), check="never")

        streams = tuple(torch.randn(LARGE // 4, 4, requires_grad=True) for _ in range(2))
        with track_memory() as memory:
            for coupling in couplings:
                streams = coupling(*streams)
            loss, streams = merge(*streams).sum(), ()
            memory.reset_peak()
            loss.backward()
            peaks.append(memory.peak)
    assert peaks[1] <= peaks[0]


# ---- what it leaves as it was ---------------------------------------------------------------------------------------


def test_memory_that_other_processes_see_is_left_as_it_was():
    layer, streams = iz.AdditiveCoupling(nn.Linear(2, 2), check="never"), [torch.randn(3, 2), torch.randn(3, 2)]
    y = layer(*streams)[0]
    file = y.share_memory_().untyped_storage()._share_filename_cpu_()
    elsewhere = torch.empty(0).set_(torch.UntypedStorage._new_shared_filename_cpu(*file), 0, y.shape)
    was, loss = elsewhere.clone(), y.sum()
    del y
    loss.backward()
    assert_close(elsewhere, was, rtol=0, atol=0)


@pytest.mark.parametrize("partial", [False, True])
def test_hooks_of_torch_run_in_replays(partial: bool):
    def hook(*_: object) -> None:
        runs.append(1)

    hook.__module__, runs, layer = "torch.hooks", [], iz.AdditiveCoupling(nn.Linear(2, 2))
    layer.f.register_forward_hook(functools.partial(hook, 0) if partial else hook)
    y = layer(torch.randn(3, 4))
    assert len(runs) == 1
    y.sum().backward()
    assert len(runs) == 2


def test_an_exception_in_a_container_leaves_its_place():
    def explode(_: Tensor) -> Tensor:
        raise ValueError("fuse")

    layer, x = iz.AdditiveCoupling(explode), torch.randn(3, 4)
    for net, notes in ((iz.InvertibleSequential(layer), 1), (layer, 0)):
        with pytest.raises(ValueError, match="fuse") as caught:
            net(x)
        assert caught.value.__notes__.count("in layer 0 (AdditiveCoupling)") == notes
    iz.InvertibleLinear(4, free_input=True)(x)
    assert x.untyped_storage().size() == 0  # nobody around it is in charge of that


def test_an_exception_in_a_backward_below_a_transform_leaves_kept_graphs_as_they_were():
    def explode(_: Tensor) -> Tensor:
        raise ValueError("fuse")

    def function(x: Tensor) -> Tensor:
        y = x.exp()
        y.register_hook(explode)
        return 2 * y

    with pytest.raises(ValueError, match="fuse"):
        grad(lambda v: iz.checkpoint(function, v).sum())(torch.randn(3))
    x = torch.randn(LARGE, requires_grad=True)
    with track_memory() as memory:
        y = exp(exp(x)).sum()
        before = memory.current
        torch.autograd.grad(y, x, retain_graph=True)
        assert memory.current <= before


@SAVING
def test_hooks_are_the_user_s_own_after_a_step(mode: str):
    layer = iz.AdditiveCoupling(nn.Linear(2, 2), mode=mode)
    hooks = [lambda *_: None, lambda *_: None]
    layer.f.register_forward_hook(hooks[0])
    layer.f.register_forward_pre_hook(hooks[1])
    for _ in range(2):
        layer(torch.randn(3, 4)).sum().backward()
        assert [*layer.f._forward_hooks.values(), *layer.f._forward_pre_hooks.values()] == hooks


@SAVING
def test_a_parameter_that_was_none_is_none_in_a_replay(mode: str):
    layer = iz.AdditiveCoupling(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh()), mode=mode)
    x = torch.randn(3, 4, requires_grad=True)
    wanted, loss = torch.autograd.grad(layer(x).square().sum(), x), layer(x).square().sum()
    layer.f[0].bias = bias = nn.Parameter(torch.ones(2))
    assert_close(torch.autograd.grad(loss, x), wanted)
    assert layer.f[0].bias is bias


# ---- autocast, which leaves float64 alone ---------------------------------------------------------------------------


class Residual(iz.InvertibleModule):
    """Evaluates its net in the inverse, without gradients, and then in the function."""

    def __init__(self, net: nn.Module, **options: object) -> None:
        super().__init__(**options)
        self.net = net

    def function(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y + self.net(x)

    def inverse(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y - self.net(x)


@pytest.mark.parametrize("around", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
def test_autocast_around_a_half_of_a_step(mode: str, around: str):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    x = torch.randn(2, 5, 3, dtype=torch.float32)

    def step(function) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "forward"):
            loss = function(*x)[1].float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "backward"):
            return [*torch.autograd.grad(loss, [*net.parameters()])]

    layer = Residual(net, mode=mode)
    wanted = step(layer.function)
    for _ in range(2):
        assert_close(step(layer), wanted, rtol=1e-5, atol=1e-6)


@SAVING
def test_a_replay_inside_autocast_leaves_no_casts_behind(mode: str):
    layer = iz.AdditiveCoupling(nn.Linear(2, 2).float(), mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(torch.randn(3, 4, dtype=torch.float32)).sum()
    with torch.autocast("cpu", torch.bfloat16), track_memory() as memory:
        torch.autograd.grad(loss, [*layer.parameters()])
        assert memory.current == 0


def test_another_thread_may_be_importing_what_a_replay_looks_for(monkeypatch):
    for name in ("torch.distributed.tensor", "torch._subclasses.fake_tensor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    layer = iz.AdditiveCoupling(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    layer(torch.randn(3, 4)).sum().backward()
    functional_call(layer, {name: 2 * p for name, p in layer.named_parameters()}, torch.randn(3, 4)).sum().backward()


class Delegating(nn.Module):
    """Its flag is another module's, as that of what `torch.compile` returns is."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout())

    @property
    def training(self):
        return self.inner.training if "inner" in self.__dict__.get("_modules", {}) else True

    @training.setter
    def training(self, value):
        for module in self._modules.values() if "_modules" in self.__dict__ else ():
            module.training = value

    def forward(self, x):
        return self.inner(x)


def test_a_module_whose_flag_is_another_modules():
    layer = iz.AdditiveCoupling(Delegating())
    y = layer(torch.randn(3, 4, requires_grad=True))
    layer.eval()
    y.sum().backward()
    assert not layer.f.training


class Halves(iz.InvertibleModule):
    def move(self, x):
        return x.bfloat16().exp().float()

    def undo(self, y):
        return y.log()


def test_an_error_is_allowed_that_comes_of_a_dtype_inside():
    Halves()(torch.randn(64, 4, requires_grad=True) * 1).sum().backward()


def test_a_hook_that_removed_itself_stays_away_after_an_error_in_a_replay(monkeypatch):
    layer = iz.AffineCoupling(nn.Sequential(nn.Tanh(), nn.Linear(2, 4)))

    def hook(module, args, output):
        handle.remove()
        return 2 * output

    handle = layer.f[1].register_forward_hook(hook)
    y = layer(torch.randn(3, 4, requires_grad=True))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Tanh, "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
    assert not layer.f[1]._forward_hooks


def test_another_thread_may_end_a_backward_through_a_kept_graph(monkeypatch):
    """As on several devices: torch calls back where the last node ran."""
    ends = []
    monkeypatch.setattr(kept_module, "at_end_of_backward", ends.append)
    layer, x = iz.AdditiveCoupling(nn.Sequential(nn.Linear(2, 2), nn.Tanh())), torch.randn(3, 4, requires_grad=True)
    with track_memory() as memory:
        y = layer(x * 1)
        held = memory.current
        torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert memory.current > held
        with ThreadPoolExecutor() as pool:
            pool.submit(ends.pop()).result()
        assert memory.current == held


class Signed(iz.InvertibleModule):
    def function(self, x):
        y = x.square()
        y.signs = x.sign()
        return y

    def inverse(self, y):
        return y.sqrt() * y.signs


def test_what_a_function_set_on_its_output_is_there_for_the_inverse_while_the_caller_holds_that():
    x = torch.randn(3, 4, requires_grad=True)
    y = Signed()(x * 1)
    z = iz.InvertibleLeakyReLU()(y)  # it consumes y, and is not asked
    y.sum().backward()
    assert_close(x.grad, 2 * x.detach())
    assert z.requires_grad
