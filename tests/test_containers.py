"""`InvertibleSequential` is `nn.Sequential` that can go back, and splits and merges a stack of couplings once."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import invzoo as iz


def coupling(swap=False):
    return iz.AdditiveCoupling(nn.Linear(3, 3).double(), swap=swap)


@pytest.fixture
def net():
    return iz.InvertibleSequential(coupling(), iz.Swap(), coupling(), iz.Reverse(), iz.InvertibleLeakyReLU())


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64, requires_grad=True)


def test_interface_of_sequential(net, x):
    assert net.inv.inv is net
    assert len(net) == 5
    assert isinstance(net, nn.Sequential)
    assert isinstance(net[1], iz.Swap)
    assert isinstance(net[:2], iz.InvertibleSequential)
    assert_close(net[2:](net[:2](x)), net(x))
    net.append(iz.Identity()).insert(0, iz.Identity())
    assert len(net) == 7
    del net[0]
    assert [name for name, _ in net.named_children()] == [str(i) for i in range(6)]
    named = iz.InvertibleSequential(OrderedDict(first=coupling(), second=iz.Swap()))
    assert isinstance(named.second, iz.Swap)
    assert [*named.state_dict()] == ["first.f.weight", "first.f.bias"]


def test_state_dict_is_that_of_sequential(net):
    plain = nn.Sequential(*net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    net.load_state_dict(plain.state_dict())


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_stack_splits_once_and_merges_once(x):
    net = iz.InvertibleSequential(*(layer for _ in range(8) for layer in (coupling(), iz.Swap())))
    with Count() as count:
        net(x)
    assert count.names.count("cat") == 1
    assert count.names.count("split") + count.names.count("split_with_sizes") == 1


def test_an_odd_swap_is_right_though_it_cannot_run_on_streams():
    net = iz.InvertibleSequential(
        iz.AdditiveCoupling(nn.Linear(3, 4).double()), iz.Swap(), iz.AdditiveCoupling(nn.Linear(3, 4).double())
    )
    x = torch.randn(2, 7, dtype=torch.float64)
    assert_close(net(x), net[2](net[1](net[0](x))))


def test_other_splits_do_not_share_streams(x):
    net = iz.InvertibleSequential(
        coupling(), iz.AdditiveCoupling(nn.Linear(3, 3).double(), split="interleave"), coupling()
    )
    assert_close(net(x), net[2](net[1](net[0](x))))
    assert_close(net.inverse(net(x)), x)


def test_two_streams_go_in_and_come_out():
    net, (a, b) = iz.InvertibleSequential(coupling(), coupling(True)), torch.randn(2, 4, 3, dtype=torch.float64)
    y = net(a, b)
    assert_close(torch.cat(y, 1), net(torch.cat((a, b), 1)))
    assert_close(net.inverse(*y), (a, b))


def test_a_hooked_layer_sees_one_tensor(net, x):
    seen = []
    net[2].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.shape)))
    y = net(x)
    y.sum().backward()
    assert seen == [(x.shape, x.shape)]


def test_modes_are_those_of_the_layers(net):
    assert net.mode == "invert"
    net.mode = "store"
    assert all(layer.mode == "store" for layer in net)
    net[0].mode = "recompute"
    assert net.mode is None
    with iz.mode(net, "invert"):
        assert net.mode == "invert"
    assert (net[0].mode, net[1].mode) == ("recompute", "store")
    assert iz.InvertibleSequential(coupling(), mode="recompute")[0].mode == "recompute"


class Conditional(nn.Linear):
    def forward(self, x, context):
        return super().forward(x) * context


def test_side_inputs_go_to_the_layers_that_take_them(x):
    net = iz.InvertibleSequential(iz.AdditiveCoupling(Conditional(3, 3).double()), iz.Reverse(), coupling())
    context = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    y = net(x, context=context)
    assert_close(net.inverse(y, context=context), x)
    x1, x2 = x.chunk(2, 1)
    h = torch.cat((x1 + net[0].f(x2, context), x2), 1).flip(1)
    plain = torch.cat((h[:, :3] + net[2].f(h[:, 3:]), h[:, 3:]), 1)
    assert_close(torch.autograd.grad(y.sum(), context), torch.autograd.grad(plain.sum(), context))
    with pytest.raises(TypeError, match=r"InvertibleSequential: Expected side inputs among .*; got \['mask'\]"):
        net(x, mask=context)


def test_errors_say_where(x):
    net = iz.InvertibleSequential(
        iz.Reverse(), coupling(), iz.InvertibleSequential(iz.AdditiveCoupling(nn.Linear(3, 2)))
    )
    with pytest.raises(
        ValueError, match=r"(?s)to return a Tensor .*in layer 0 \(AdditiveCoupling\) of layer 2 \("
    ) as info:
        net.float()(x.float())
    assert len(info.value.__notes__) == 1


# ---- edits ----------------------------------------------------------------------------------------------------------


def names_and_layers(net):
    return [*net.named_children()]


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (lambda net, a, b: net + net, [0, 1, 0, 1]),
        (lambda net, a, b: net + iz.InvertibleSequential(a), [0, 1, "a"]),
        (lambda net, a, b: net + nn.Sequential(a), [0, 1, "a"]),
        (lambda net, a, b: net * 2, [0, 1, 0, 1]),
        (lambda net, a, b: 2 * net, [0, 1, 0, 1]),
        (lambda net, a, b: net.__iadd__(net), [0, 1, 0, 1]),
        (lambda net, a, b: net.__iadd__(nn.Sequential(a, b)), [0, 1, "a", "b"]),
        (lambda net, a, b: net.__imul__(2), [0, 1, 0, 1]),
        (lambda net, a, b: net.append(a), [0, 1, "a"]),
        (lambda net, a, b: net.extend([a, b]), [0, 1, "a", "b"]),
        (lambda net, a, b: net.extend(net), [0, 1, 0, 1]),
        (lambda net, a, b: net.insert(1, a), [0, "a", 1]),
        (lambda net, a, b: net.insert(-1, a), [0, "a", 1]),
        (lambda net, a, b: net[1:], [1]),
        (lambda net, a, b: net[::-1], [1, 0]),
        (lambda net, a, b: net.pop(slice(1)), [0]),
        (lambda net, a, b: net.__setitem__(1, a) or net, [0, "a"]),
        (lambda net, a, b: net.__delitem__(0) or net, [1]),
        (lambda net, a, b: setattr(net, "0", a) or net, ["a", 1]),
        (lambda net, a, b: setattr(net, "2", a) or net, [0, 1, "a"]),
        (lambda net, a, b: net.register_module("2", a) or net, [0, 1, "a"]),
        (lambda net, a, b: net.set_submodule("1", a) or net, [0, "a"]),
    ],
)
def test_what_edits_make_goes_both_ways(edit, wanted, x):
    net, a, b = iz.InvertibleSequential(coupling(), iz.Swap()), coupling(True), iz.Reverse()
    known = {0: net[0], 1: net[1], "a": a, "b": b}
    edited = edit(net, a, b)
    assert type(edited) is iz.InvertibleSequential
    assert [*edited] == [known[key] for key in wanted]
    assert_close(edited.inverse(edited(x)), x)


@pytest.mark.parametrize(
    "edit",
    [
        lambda net, plain: net.extend((plain, iz.Swap())),
        lambda net, plain: net.__iadd__(nn.Sequential(iz.Swap(), plain)),
        lambda net, plain: net.append(plain),
        lambda net, plain: net.extend([iz.Swap(), plain]),
        lambda net, plain: net.insert(0, plain),
        lambda net, plain: net.__setitem__(0, plain),
        lambda net, plain: net.__setitem__(0, None),
        lambda net, plain: setattr(net, "0", plain),
        lambda net, plain: setattr(net, "0", 3),
        lambda net, plain: setattr(net, "other", plain),
        lambda net, plain: net.add_module("2", plain),
        lambda net, plain: net.add_module("2", None),
        lambda net, plain: net.register_module("2", plain),
        lambda net, plain: net.set_submodule("0", plain),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda *layers: iz.InvertibleSequential(*layers),
        lambda *layers: iz.Parallel(*layers).layers,
        lambda *layers: iz.MultiScale(*layers).stages,
    ],
    ids=["sequential", "parallel", "multi-scale"],
)
def test_edits_that_could_not_be_inverted_change_nothing(make, edit):
    net = make(iz.Swap(), iz.Reverse())
    before = names_and_layers(net)
    with pytest.raises(TypeError, match=r"Expected layer \w+ to be an InvertibleModule; got (ReLU|NoneType|int)"):
        edit(net, nn.ReLU())
    assert names_and_layers(net) == before


def test_a_layer_that_is_given_twice_runs_twice(x):
    layer, (first, second) = iz.InvertibleLeakyReLU(), x.chunk(2, 1)
    assert_close(iz.Parallel(layer, layer)(first, second), (layer(first), layer(second)))
    assert_close(iz.MultiScale(layer, layer)(x), (layer(second), layer(layer(first))))


def test_a_plain_layer_is_refused():
    with pytest.raises(TypeError, match="Inverse: Expected layer to be an InvertibleModule; got ReLU"):
        iz.Inverse(nn.ReLU())
    with pytest.raises(TypeError, match="Expected layer 1 to be an InvertibleModule; got Linear"):
        iz.InvertibleSequential(iz.Reverse(), nn.Linear(3, 3))
    with pytest.raises(TypeError, match="InvertibleSequential: Expected layer 1 to be an InvertibleModule; got ReLU"):
        iz.InvertibleSequential(iz.Swap()) + nn.Sequential(nn.ReLU())
    assert type(nn.Sequential(nn.ReLU()) + iz.InvertibleSequential(iz.Swap())) is nn.Sequential


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda net: net.__add__([iz.Swap()]), ValueError),
        (lambda net: net.__iadd__([iz.Swap()]), ValueError),
        (lambda net: net * 2.0, TypeError),
        (lambda net: net * 0, ValueError),
        (lambda net: net.__imul__(0), ValueError),
        (lambda net: net.insert(5, iz.Swap()), IndexError),
        (lambda net: net.__setitem__(2, iz.Swap()), IndexError),
        (lambda net: net.pop(2), IndexError),
        (lambda net: net.extend(3), TypeError),
    ],
)
def test_what_sequential_refuses_is_refused(edit, error):
    net = iz.InvertibleSequential(iz.Swap(), iz.Reverse())
    before = names_and_layers(net)
    for other in (net, nn.Sequential(*net)):
        with pytest.raises(error):
            edit(other)
    assert names_and_layers(net) == before


# ---- modes ----------------------------------------------------------------------------------------------------------


class OneWay(iz.InvertibleModule):
    def function(self, x):
        return x.relu()


def modes(net):
    return [str(layer.mode) for layer in net]


@pytest.fixture
def mixed():
    net = nn.Sequential(coupling(), OneWay(mode="recompute"), coupling())
    net[2].mode = "store"
    return net


MIXED = ["invert", "recompute", "store"]


def test_a_mode_acts_at_once(mixed, x):
    iz.mode(mixed, "store")
    assert modes(mixed) == ["store"] * 3
    iz.mode(mixed, "invert")  # what has no inverse is recomputed
    assert modes(mixed) == ["invert", "recompute", "invert"]
    got = torch.autograd.grad(mixed(x * 1).sum(), x)
    iz.mode(mixed, "store")
    assert_close(got, torch.autograd.grad(mixed(x * 1).sum(), x))


def test_a_mode_for_a_while_is_put_back(mixed):
    with iz.mode(mixed, "store") as nothing:
        assert nothing is None
        with iz.mode(mixed, "invert"):
            assert modes(mixed) == ["invert", "recompute", "invert"]
        assert modes(mixed) == ["store"] * 3
        mixed[0].mode = "recompute"
    assert modes(mixed) == MIXED
    with pytest.raises(ZeroDivisionError), iz.mode(mixed, "store"), iz.mode(mixed[0], "recompute"):
        1 / 0  # noqa: B018
    assert modes(mixed) == MIXED
    again = iz.mode(mixed, "store")
    for _ in range(2):
        with again:
            assert modes(mixed) == ["store"] * 3
        assert modes(mixed) == MIXED


def test_store_remembers_what_it_took_the_place_of():
    layer = iz.Identity(mode="recompute")
    for mode in ("recompute", "invert"):
        layer.mode = mode
        with iz.mode(layer, "store"):
            layer.checkpoint = True
            assert layer.mode == mode
        layer.mode = "store"
        layer.checkpoint = True
        assert layer.mode == mode


def test_an_inverse_shares_its_layer_s_mode(mixed):
    net = nn.ModuleList([mixed[0].inv, mixed[0], OneWay(mode="store").inv])
    with iz.mode(net, "recompute"):
        assert modes(net) == ["recompute"] * 3
    assert modes(net) == ["invert", "invert", "store"]


@pytest.mark.parametrize(
    ("make", "mode", "message"),
    [
        (lambda net: net, "forget", "Expected mode to be one of 'store', 'recompute', 'invert'; got 'forget'"),
        (lambda net: net, None, "Expected mode to be one of .*; got None"),
        (
            lambda net: nn.Sequential(nn.ReLU()),
            "store",
            "iz.mode: Expected module to be .* or hold one; got Sequential",
        ),
        (lambda net: 3, "store", "iz.mode: Expected module to be an InvertibleModule or hold one; got int"),
        (lambda net: nn.Linear(3, 3), "invert", "iz.mode: Expected module to be an InvertibleModule .*; got Linear"),
    ],
)
def test_a_mode_that_cannot_be_set_changes_nothing(mixed, make, mode, message):
    with pytest.raises(ValueError, match=message):
        iz.mode(make(mixed), mode)
    assert modes(mixed) == MIXED


def test_a_domain_of_whole_events_does_not_go_along_with_entries():
    class Simplex(iz.InvertibleTanh):
        domain = codomain = constraints.simplex

    net = iz.InvertibleSequential(iz.Reverse(), Simplex(), iz.Reverse())
    assert (net.domain, net.codomain) == (constraints.real, constraints.real)
    assert net[1:].domain is constraints.simplex


def test_the_layer_without_an_inverse_is_named(x):
    net = iz.InvertibleSequential(iz.Reverse(), OneWay())
    with pytest.raises(TypeError, match=r"(?s)Expected a layer with an inverse for mode 'invert'; got OneWay.*layer 1"):
        net(x)
    net.mode = "recompute"
    assert_close(torch.autograd.grad(net(x).sum(), x)[0], (x.flip(1) > 0).double().flip(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "forget"}, "Expected mode to be one of .*; got 'forget'"),
        ({"check": "twice"}, "Expected check to be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        iz.Identity(**options)
    with pytest.raises(ValueError, match=message):
        iz.InvertibleSequential(iz.Identity(), **options)
