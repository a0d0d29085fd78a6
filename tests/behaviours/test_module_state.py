"""What modules keep besides parameters: buffers, mere attributes, generators, and hooks that change them."""

import contextlib
import gc
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import invzoo as iz
from invzoo.engine.surroundings import buffers
from invzoo.testing import track_memory
from tests.behaviours.helpers import Subnet, all_gradients, blocks, holds, some_loss
from tests.reference import FEATURES, HALF, PlainAdditive, assert_near, assert_same_run, mlp, run

grad = torch.autograd.grad


# ---- tensors that are mere attributes -------------------------------------------------------------------------------


class Styled(Subnet):
    """A subnet that looks at a tensor which others set."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.style = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.style)


def set_style(net: nn.Module, style: Tensor) -> None:
    for block in blocks(net, Styled):
        block.style = style


@holds(block=Styled)
def test_an_attribute_set_before_each_of_two_forwards(net, x):
    set_style(net, torch.tensor(0.5))
    first = net(x)
    set_style(net, torch.tensor(2.0))
    (some_loss(first) + some_loss(net(x))).backward()
    return [block.style for block in blocks(net, Styled)]


@holds(block=Styled)
def test_an_attribute_with_a_graph(net, x):
    """A hypernet: gradients reach what made the attribute."""
    made_of = torch.randn((), requires_grad=True)
    set_style(net, made_of.exp())
    return grad(some_loss(net(x)), [x, made_of])


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_an_attribute_changed_in_place_between_forward_and_backward(saving, x, warm):
    _, ours = saving.pair(Styled)
    for _ in range(2 * warm):
        some_loss(ours(x)).backward()
    loss = some_loss(ours(x))
    for block in blocks(ours, Styled):
        block.style.mul_(2)
    with pytest.raises(RuntimeError, match="got a change of 'style'"):
        loss.backward()


class Auxiliary(Subnet):
    """A subnet that leaves a part of the loss behind, as mixtures of experts do."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        self.auxiliary = h.square().mean()
        return h


@pytest.mark.parametrize("after_a_backward", [False, True])
@holds(block=Auxiliary)
def test_an_auxiliary_loss(net, x, after_a_backward):
    """What the forward left behind is there, not what a replay did."""
    loss = some_loss(net(x))
    if after_a_backward:
        loss.backward(retain_graph=True)
    return grad(loss + sum(b.auxiliary for b in blocks(net, Auxiliary)), [x, *net.parameters()])


class Logs(Subnet):
    """A subnet that leaves something in a list, in its replays too."""

    log = ()

    def forward(self, x: Tensor) -> Tensor:
        self.log = [*self.log, self.net[0].weight.norm()]
        return self.net(x)


def with_gradients(kind: type[nn.Module], depth: int, mode: str) -> nn.Module:
    """Return a stack whose gradients exist already, so that they count for nothing."""
    net = iz.InvertibleSequential(*[iz.AdditiveCoupling(kind(32, 32)) for _ in range(depth)], mode=mode)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    return net


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_what_is_left_in_a_list_holds_no_more_than_itself(mode):
    net, x = with_gradients(Logs, 8, mode), torch.randn(64, 64)
    net(x).sum().backward()
    with track_memory() as memory:
        net(x).sum().backward()
    assert memory.current == 8 * 2 * 8  # one number from each forward, and one from each replay


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_what_is_left_behind_holds_no_more_than_itself(mode):
    def held(depth: int) -> int:
        net, x = with_gradients(Auxiliary, depth, mode), torch.randn(64, 64)
        with track_memory() as memory:
            (net(x).sum() + sum(block.auxiliary for block in blocks(net, Auxiliary))).backward()
        return memory.current

    gc.collect()
    gc.disable()
    try:
        assert held(8) - held(4) == 4 * 8  # one number each
    finally:
        gc.enable()


# ---- buffers --------------------------------------------------------------------------------------------------------


class Waits(nn.Module):
    """Tensors that keep still until they are told to move, some of them in silence: their versions do not tell."""

    how = ""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net, self.norm, self.scale = mlp(*sizes), nn.BatchNorm1d(sizes[0]), torch.ones(sizes[0])
        self.scale.requires_grad_()
        self.norm.eval()
        self.register_buffer("count", torch.ones(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.how == "in place":
            self.count += 1
        elif self.how == "data":
            self.count.data.lerp_(x.detach().mean(0), 0.5)
        elif self.how == "numpy":
            self.count.numpy()[:] += 1
        elif self.how == "attribute":
            self.scale.data.mul_(2)
        elif self.how == "kernel":
            x = F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
        elif self.how == "unfrozen":
            norm.train()
        return self.net(norm(x) * self.count * self.scale)


@pytest.mark.parametrize("how", ["in place", "data", "numpy", "attribute", "kernel", "unfrozen"])
def test_a_tensor_that_moves_from_the_third_step_on(subject, x, how):
    plain, ours = subject.pair(Waits)
    for step in range(5):
        for block in blocks(plain, Waits) + blocks(ours, Waits):
            block.how = how if step in {2, 4} else ""
        assert_same_run(
            lambda net: grad(some_loss(net(x)), [x, *(p for n, p in net.named_parameters() if "norm" not in n)]),
            plain,
            ours,
        )


NORM = nn.BatchNorm1d(HALF).eval().requires_grad_(False)
MOVERS = {
    "coupling": lambda mode: iz.AdditiveCoupling(moves_norm, split=(HALF, HALF), mode=mode),
    "checkpoint": lambda mode: lambda x: iz.checkpoint(moves_norm, x[:, :HALF].clone(), enabled=mode != "store"),
    "activation": lambda mode: iz.MaskedAutoregressive(FEATURES, (HALF,), activation=moves_norm, mode=mode),
}


def moves_norm(h: Tensor) -> Tensor:
    """A function of the user's over a layer of torch's, which it begins to move."""
    if NORM.moves:
        NORM.running_mean.data.add_(h.detach().mean(0))
    return NORM(h).tanh()


@pytest.mark.parametrize("mode", ["recompute", "invert"])
@pytest.mark.parametrize("kind", MOVERS)
def test_a_function_that_begins_to_move_a_buffer_of_torch_s_own_layer(kind, mode, data):
    def program(mode):
        torch.manual_seed(0)
        layer, results = MOVERS[kind](mode), []
        NORM.double().reset_running_stats()
        for NORM.moves in (False, True, True):
            x = data.clone().requires_grad_()
            results += [*grad(some_loss(layer(x)), x), NORM.running_mean.clone()]
        return results

    assert_near(program(mode), program("store"))


def test_a_buffer_on_an_accelerator_that_begins_to_move_in_silence_is_refused_once(saving, x, monkeypatch):
    """To look at it in forward would wait for the device; the replay looks, and from then on there are copies."""
    monkeypatch.setattr(buffers, "waits_to_be_read", lambda _: True)
    monkeypatch.setattr(buffers, "read_later", lambda flag: lambda: bool(flag))
    plain, ours = saving.pair(Waits)

    def step(net, how):
        for block in blocks(net, Waits):
            block.how = how
        return run(lambda net: all_gradients(net, x), net)

    for how in ("", "", "data", "data", ""):
        expected = step(plain, how)
        if how and not blocks(ours, Waits)[0].how:
            with pytest.raises(RuntimeError, match="a change of 'count' through .data or the like"):
                step(ours, how)
            ours.load_state_dict(plain.state_dict())
            for _ in range(len(blocks(ours, Waits))):  # each block is refused once
                with contextlib.suppress(RuntimeError):
                    step(ours, how)
                ours.load_state_dict(plain.state_dict())
        else:
            assert_near(step(ours, how), expected)


def test_observers_on_an_accelerator_may_begin_to_move(monkeypatch):
    monkeypatch.setattr(buffers, "waits_to_be_read", lambda _: True)
    monkeypatch.setattr(buffers, "read_later", lambda flag: lambda: bool(flag))
    observer = torch.ao.quantization.FusedMovingAvgObsFakeQuantize().float()
    observer.disable_observer()
    net, x = iz.AdditiveCoupling(nn.Sequential(nn.Linear(2, 2), observer)).float(), torch.randn(3, 4).float()
    for step in range(4):
        if step == 2:
            observer.enable_observer()
        some_loss(net(x)).backward()


def test_buffers_that_keep_still_are_not_copied():
    """Masks and tables may be larger than all else."""

    class Masked(nn.Linear):
        """Whoever wrote it may move its mask on any call, so that each looks."""

    def peak(kind: type[nn.Module], depth: int) -> int:
        net = iz.InvertibleSequential(*[iz.AdditiveCoupling(kind(2, 2)) for _ in range(depth)]).eval()
        for layer in net:
            layer.f.register_buffer("mask", torch.full((10_000,), torch.nan))
        x = torch.randn(3, 4)
        for _ in range(2):
            net(x).sum().backward()
        with track_memory() as memory:
            net(x).sum().backward()
        return memory.peak

    assert peak(nn.Linear, 4) < 10_000
    assert peak(nn.BatchNorm1d, 4) < 10_000
    assert peak(Masked, 8) - peak(Masked, 4) < 10_000


# ---- hooks ----------------------------------------------------------------------------------------------------------


def drop_weights(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    module.dropped = F.dropout(module.scale, 0.5)


class Dropped(Subnet):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(sizes[0]))
        self.register_forward_pre_hook(drop_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.dropped)


def evaluated(*sizes: int) -> nn.Module:
    net = nn.Sequential(nn.Dropout(), mlp(*sizes))
    net.register_forward_pre_hook(lambda m, i: m.eval() and None)
    net.register_forward_hook(lambda m, i, o: m.train() and None)
    return net


@pytest.mark.parametrize("block", [Dropped, evaluated])
@holds
def test_hooks_that_set_what_the_function_computes_with(net, x, block):
    first, second = net(x), net(x.detach() * 2)
    (some_loss(first) + some_loss(second)).backward()


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_a_module_added_between_forward_and_backward(saving, x, warm):
    _, ours = saving.pair()
    for _ in range(2 * warm):
        some_loss(ours(x)).backward()
    loss = some_loss(ours(x))
    next(m for m in blocks(ours, nn.Sequential) if isinstance(m[0], nn.Linear)).append(nn.Tanh())
    with pytest.raises(RuntimeError, match="got an addition of '3'"):
        loss.backward()


class MakesModules(nn.Module):
    """Makes what is in it when it first sees data, besides what it has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(HALF, HALF)

    def forward(self, x):
        if not hasattr(self, "later"):
            self.later = nn.Linear(HALF, x.shape[1])
        return self.later(self.first(x).tanh())


class StartsFromData(MakesModules):
    """Scales what it returns so that the first batch has a deviation of 1."""

    def __init__(self):
        super().__init__()
        self.scale, self.started = nn.Parameter(torch.ones(HALF)), False

    def forward(self, x):
        h = self.first(x)
        if not self.started:
            with torch.no_grad():
                self.scale.copy_(1 / h.std(0))
            self.started = True
        return h * self.scale


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            MakesModules,
            "got an addition of 'later'. .* makes its modules in its first forward once under torch.no_grad()",
        ),
        (StartsFromData, "got a change of 'scale'. .* depends on data run it once under torch.no_grad.*iz.ActNorm"),
    ],
)
@pytest.mark.parametrize("mode", iz.Mode)
def test_modules_that_are_complete_after_a_first_look(make, message, mode):
    layer, x = iz.AdditiveCoupling(make(), mode=mode), torch.randn(5, FEATURES)
    if mode != "store":
        with pytest.raises(RuntimeError, match=message):
            layer(x).sum().backward()
    layer = iz.AdditiveCoupling(make(), mode=mode)
    with torch.no_grad():
        layer(x)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


class Nameless:
    """No module, but it has one."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.BatchNorm1d(HALF), nn.Linear(HALF, HALF))

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)

    def method(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("mode", ["recompute", "invert"])
@pytest.mark.parametrize("name", ["__call__", "method", "itself"])
def test_modules_behind_plain_objects(mode, name):
    plain, ours = Nameless(), Nameless()
    ours.net.load_state_dict(plain.net.state_dict())
    f = ours if name == "itself" else getattr(ours, name)
    layer, x = iz.AdditiveCoupling(f, mode=mode), torch.randn(5, FEATURES)
    layer.add_module("net", ours.net)
    some_loss(layer(x)).backward()
    some_loss(PlainAdditive(plain.net)(x)).backward()
    assert_near(dict(ours.net.named_buffers()), dict(plain.net.named_buffers()))


def traced(net: nn.Module) -> nn.Module:
    return torch.jit.trace(net, torch.randn(5, net[0].in_features))


@pytest.mark.parametrize("how", [torch.jit.script, traced])
def test_scripts_as_subnets(subject, x, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        subject.holds(lambda net: all_gradients(net, x), lambda *sizes: how(mlp(*sizes)))


def test_an_output_that_is_held_is_not_rebuilt(x):
    """Nobody needs the layers behind it, so they may change."""
    f, g = iz.AdditiveCoupling(mlp(HALF, HALF)), iz.InvertibleLinear(FEATURES)
    y = f(x)
    z = g(y.detach())
    for p in g.parameters():
        p.detach().add_(1)
    assert_near(grad(some_loss(y), x), grad(some_loss(f(x)), x))
    del z


class Hollow(nn.Linear):
    """Has an attribute whose memory comes and goes, as those of FSDP1's modules."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.view = torch.ones(2)
        self.view.untyped_storage().resize_(0)
        self.gathers = False

    def forward(self, x: Tensor) -> Tensor:
        self.view.untyped_storage().resize_(8 * self.gathers)
        self.gathers = not self.gathers
        return super().forward(x)


@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_buffers_without_memory_are_not_read(mode):
    f, x = nn.Linear(2, 2), torch.randn(3, 4, requires_grad=True)
    f.register_buffer("table", torch.ones(2))
    f.table.untyped_storage().resize_(0)
    net = iz.AdditiveCoupling(f, mode=mode)
    x1, x2 = x.chunk(2, 1)
    assert_near(grad(some_loss(net(x)), x), grad(some_loss(torch.cat((x1 + f(x2), x2), 1)), x))


class Gathered(nn.Linear):
    """Has memory for its weight while it runs and when its gradient comes by, as FSDP1's have."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.sin())
        if self.training:  # in the forward
            weight = self.weight.detach().clone()
            self.weight.untyped_storage().resize_(0)
            y.register_hook(lambda _: self.gather(weight))
        return y

    def gather(self, weight: Tensor) -> None:
        self.weight.untyped_storage().resize_(weight.nbytes)
        with torch.autograd._unsafe_preserve_version_counter(self.weight):
            self.weight.detach().copy_(weight)


def test_saved_weights_without_memory_are_not_read(x):
    f = Gathered(FEATURES, FEATURES)
    expected = grad(some_loss(f.eval()(x)), x)
    loss = some_loss(iz.checkpoint(f.train(), x))
    f.training = False
    assert_near(grad(loss, x), expected)


@holds(block=Hollow)
def test_attributes_without_memory_are_not_read(net, x):
    for _ in range(3):
        some_loss(net(x)).backward()
