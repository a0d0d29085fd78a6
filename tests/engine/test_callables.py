"""What can be read off a callable: the modules behind it, the side inputs that it takes, and who trains them."""

import functools
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.engine.signatures import SideNames, modules_of

NORM = nn.BatchNorm1d(2, affine=False)


def through_a_global(x):
    return NORM(x)


def through_another(x):
    return through_a_global(x) + 0


def inside_a_comprehension(x):
    return sum(NORM(x) for _ in range(1))


def made(how, norm):
    """Wrap a module in a function."""

    def by_position(x, norm=norm):
        return norm(x)

    def by_name(x, *, norm=norm):
        return norm(x)

    def enclosed(x):
        return by_name(x)

    def unused(x):
        return later(x) if how == "never" else norm(x)

    if how == "never":
        later = None
    return {
        "a default": by_position,
        "a default by name": by_name,
        "a function around one": enclosed,
        "a lambda": lambda x: norm(x),
        "a cell that is empty": unused,
        "a partial": functools.partial(by_name, norm=norm),
        "itself": norm,
        "a list": lambda x, norms=[norm]: norms[0](x),
        "a tuple": lambda x, norms=(norm,): norms[0](x),
        "a dict": lambda x, norms={"norm": norm}: norms["norm"](x),
        "a bound method": norm.forward,
    }[how]


WAYS = ["a default", "a default by name", "a function around one", "a lambda", "a cell that is empty", "a partial"]
GLOBALS = {
    "a global": through_a_global,
    "a global of a function beside it": through_another,
    "a global inside": inside_a_comprehension,
}


@pytest.mark.parametrize("how", [*WAYS, "itself", "a list", "a tuple", "a dict", "a bound method", *GLOBALS])
@pytest.mark.parametrize("mode", ["recompute", "invert"])
@pytest.mark.parametrize("kind", ["coupling", "conditioner", "checkpoint"])
def test_statistics_behind_functions_move_once(how, mode, kind):
    NORM.reset_running_stats()
    norm = NORM if how in GLOBALS else nn.BatchNorm1d(2, affine=False)
    f = GLOBALS.get(how) or made(how, norm)
    x = torch.randn(5, 2, requires_grad=True)
    if kind == "coupling":
        y = iz.AdditiveCoupling(f, mode=mode)(torch.cat((x, x), 1))
    elif kind == "conditioner":
        y = iz.ConditionalAffine(f, mode=mode)(x[:, :1], context=x)
    else:
        y = iz.checkpoint(f, x)
    mean = norm.running_mean.clone()
    y.square().sum().backward()
    assert norm.num_batches_tracked == 1
    assert_close(norm.running_mean, mean, rtol=0, atol=0)


def test_each_module_is_found_once():
    net = nn.Linear(2, 2)
    assert modules_of(lambda x: net(net(x)), net, None, torch.sin, [net]) == [net]
    assert modules_of(net) == [net]
    assert {*modules_of(net, other := nn.Linear(2, 2))} == {net, other}
    assert modules_of(None, torch.sin) == []


# ---- who trains them ------------------------------------------------------------------------------------------------


def linear():
    return nn.Linear(2, 2)


class Held(nn.Module):
    """A net that holds both a coupling and the module behind its function."""

    def __init__(self, inner=lambda net: lambda h: net(h)):
        super().__init__()
        self.net = linear()
        self.layer = iz.InvertibleSequential(iz.AdditiveCoupling(inner(self.net)), iz.Swap())

    def forward(self, x):
        return self.layer(x)


class Itself(nn.Module):
    """A net whose own method is the function."""

    def __init__(self, how):
        super().__init__()
        self.net = linear()
        self.layer = iz.AdditiveCoupling(self.run if how == "method" else lambda h: self.run(h))

    def run(self, x):
        return self.net(x)


class Callable:
    def __init__(self):
        self.net = linear()

    def __call__(self, x):
        return self.net(x)


def closing(net):
    return lambda h: net(h)


ADVICE = r"Pass the module itself, or register it: `layer.add_module\('net', net\)`"


@pytest.mark.parametrize(
    "make",
    [
        lambda: iz.AdditiveCoupling(closing(linear())),
        lambda: iz.AdditiveCoupling(linear(), closing(linear())),
        lambda: iz.AdditiveCoupling(linear().forward, mode="store"),
        lambda: iz.AdditiveCoupling(functools.partial(closing(linear()))),
        lambda: iz.AdditiveCoupling(Callable()),
        lambda: iz.AdditiveCoupling(closing(linear())).inv,
        lambda: iz.InvertibleSequential(iz.Swap(), iz.AdditiveCoupling(closing(linear()))),
        lambda: iz.InvertibleResidual(closing(nn.Linear(4, 4))),
        lambda: iz.ElementwiseAffine(4, conditioner=closing(nn.Linear(4, 8))),
    ],
)
@pytest.mark.parametrize("call", ["forward", "forward_and_log_det"])
def test_modules_that_nobody_trains_are_named_once(make, call):
    layer, x = make(), torch.randn(3, 4)
    side = {"context": torch.randn(3, 4)} if isinstance(layer, iz.ElementwiseAffine) else {}
    with torch.no_grad():
        getattr(layer, call)(x, **side)
    with pytest.warns(UserWarning, match=f"Expected the modules behind .*; got Linear, which .*{ADVICE}") as caught:
        getattr(layer, call)(x, **side)
    assert [warning.filename for warning in caught] == [__file__]
    getattr(layer, call)(x, **side)
    getattr(layer, call)(x, **side)


def registered():
    layer = iz.AdditiveCoupling(closing(net := linear()))
    layer.add_module("net", net)
    return layer


def optimized():
    layer = iz.AdditiveCoupling(closing(net := linear()))
    layer.optimizer = torch.optim.SGD(net.parameters(), 0.1)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: iz.AdditiveCoupling(linear()),
        lambda: iz.AdditiveCoupling(torch.sin),
        lambda: iz.AdditiveCoupling(lambda h: h.tanh()),
        lambda: iz.AdditiveCoupling(closing(nn.Tanh())),
        lambda: iz.AdditiveCoupling(closing(linear().requires_grad_(False))),
        registered,
        optimized,
        Held,
        lambda: Held(lambda net: net.forward),
        lambda: nn.Sequential(nn.Identity(), Held()),
        lambda: Itself("method").layer,
        lambda: Itself("lambda").layer,
    ],
)
def test_modules_that_somebody_holds_are_no_matter(make):
    make()(torch.randn(3, 4, requires_grad=True)).sum().backward()


def test_the_container_may_hold_them():
    net = iz.InvertibleSequential(iz.AdditiveCoupling(closing(f := linear())), iz.AdditiveCoupling(f))
    net.forward_and_log_det(torch.randn(3, 4))[0].sum().backward()
    net[1:](torch.randn(3, 4)).sum().backward()


def test_a_module_unfrozen_later_is_named_then():
    f = linear().requires_grad_(False)
    layer, x = iz.AdditiveCoupling(closing(f)), torch.randn(3, 4)
    layer(x)
    f.requires_grad_(True)
    with pytest.warns(UserWarning, match="got Linear"):
        layer(x)


def test_threads_see_their_own_callers():
    said = []

    def run():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Held()(torch.randn(3, 4))
            said.extend(caught)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not said


def test_looking_for_them_holds_nothing():
    class Loop(nn.Module):
        def run(self, layer):
            x = torch.randn(3, 4)
            with pytest.warns(UserWarning, match="got Linear"):
                layer(x)
            held = weakref.ref(x)
            del x
            return held()

    assert Loop().run(iz.AdditiveCoupling(closing(linear()))) is None


# ---- side inputs ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def forward(this, x, context, /, scale=1, *, mask=None):  # noqa: N805 - any name will do
        return x


@pytest.mark.parametrize(
    ("function", "names", "any_", "inputs"),
    [
        (Net(), {"scale", "mask"}, False, 3),
        (Net().forward, {"scale", "mask"}, False, 3),
        (nn.Sequential(), set(), False, 1),
        (nn.Linear(1, 1), set(), False, 1),
        (lambda x: x, set(), False, 1),
        (lambda x, context=None: x, {"context"}, False, 2),
        (lambda *x, context=None, **side: x, {"context"}, True, float("inf")),
        (lambda *, context: context, {"context"}, False, 0),
        (lambda: 0, set(), False, 0),
        (functools.partial(lambda x, a, b: x, b=1), {"a", "b"}, False, 2),
        (torch.sin, set(), True, float("inf")),
    ],
)
def test_what_is_first_by_position_is_no_side_input(function, names, any_, inputs):
    assert SideNames.of(function) == (names, any_, inputs)
    assert SideNames.of(function) == (names, any_, inputs)  # and is known the second time
