"""The interface of invtorch works: its basic example runs with only the import changed."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as inn
from invzoo import requires_grad


class InvertibleLinear(inn.InvertibleModule):
    def __init__(self, in_features, out_features, **options):
        super().__init__(invertible=True, checkpoint=True, seed=False, **options)
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def function(self, inputs, strict_forward=False):
        outputs = inputs @ self.weight.T + self.bias
        if strict_forward:
            requires_grad(outputs, any=(inputs, self.weight, self.bias))
        return outputs

    def inverse(self, outputs, saved=()):
        if 0 in saved:
            return None
        return (outputs - self.bias) @ self.weight.T.pinverse()


def test_basic_example():
    x = torch.randn(10, 3)
    was = x.clone()
    model = InvertibleLinear(3, 5, free_input=True)
    assert model.check_function(x)
    assert model.check_inverse(x)
    y = model(x)
    assert y.requires_grad
    assert x.untyped_storage().size() == 0
    y.backward(torch.randn_like(y))
    assert x.untyped_storage().size() != 0
    assert_close(x, was, rtol=1e-3, atol=1e-4)


def test_flags_are_views_of_the_mode_and_change_at_any_time():
    model, x = InvertibleLinear(3, 5), torch.randn(10, 3)
    assert (model.checkpoint, model.invertible, model.seed, model.mode) == (True, True, False, "invert")
    model.checkpoint = False
    assert (model.invertible, model.mode) == (True, "store")
    model.invertible = False
    assert model.mode == "store"
    model.checkpoint = True
    assert model.mode == "recompute"
    model.invertible = True
    assert model.mode == "invert"
    wanted = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    for checkpoint, invertible, seed in [(False, True, False), (True, False, True), (True, True, True)]:
        y = model(x)
        model.checkpoint, model.invertible, model.seed = checkpoint, invertible, seed
        got = torch.autograd.grad(y.square().sum(), [*model.parameters()])
        assert_close(got, wanted, rtol=1e-3, atol=1e-3)


class Swish(inn.InvertibleModule):
    """A function with an auxiliary output that its inverse needs and callers do not see."""

    def function(self, inputs, strict_forward=False):
        return inputs * torch.sigmoid(inputs), inputs.detach() - inputs.detach().round(), inputs.detach().round()

    def inverse(self, outputs, rest, whole, saved=()):
        return rest + whole

    def forward(self, inputs, strict_forward=False):
        return super().forward(inputs, strict_forward=strict_forward)[0]


def test_forward_can_hide_auxiliary_outputs():
    layer, x = Swish(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = layer(layer(x))
    assert isinstance(y, torch.Tensor)
    got = torch.autograd.grad(y.sum(), x)
    once = x * torch.sigmoid(x)
    assert_close(got, torch.autograd.grad((once * torch.sigmoid(once)).sum(), x))


def test_forward_takes_the_place_of_function_nowhere():
    class Sinh(inn.InvertibleModule):
        def forward(self, x):
            return x.sinh()

        def inverse(self, y):
            return y.asinh()

    lines = r"`def function\(self, x\): ...` in place of forward, and `def inverse\(self, y\): ...`"
    with pytest.raises(TypeError, match=f"Sinh: Expected class to define function, .*; got forward, .*{lines}"):
        Sinh()

    class Late(inn.InvertibleModule):
        pass

    with pytest.raises(NotImplementedError, match=r"Expected Late to define function"):
        Late(mode="store")(torch.ones(1))


def test_requires_grad():
    a, b, c = torch.zeros(1), torch.zeros(1, requires_grad=True), torch.zeros(1)
    assert not requires_grad(a)
    assert requires_grad(b)
    assert not requires_grad("b")
    assert requires_grad(any=(a, b))
    assert not requires_grad(all=(a, b))
    assert not requires_grad(any=(a, b), all=(a, b))
    assert requires_grad(c, any=(a, b))
    assert c.requires_grad
    assert not requires_grad(c, all=(a, b))
    assert not c.requires_grad


class Noisy(InvertibleLinear):
    def __init__(self):
        super().__init__(3, 3)
        self.calls = 0

    def function(self, inputs, strict_forward=False):
        self.calls += 1
        return super().function(inputs) * self.calls


class Loose(InvertibleLinear):
    def function(self, inputs, strict_forward=False):
        return (inputs @ self.weight.T).detach() if strict_forward else super().function(inputs)


class Writes(InvertibleLinear):
    def function(self, inputs, strict_forward=False):
        return inputs.mul_(2) @ self.weight.T


class Wrong(InvertibleLinear):
    def inverse(self, outputs, saved=()):
        return outputs


class WrongShape(InvertibleLinear):
    def inverse(self, outputs, saved=()):
        return outputs[:, :2]


class Sums(inn.InvertibleModule):
    """(a, b) -> (a, b + a^2); its inverse is told which of them need no computing."""

    def __init__(self, wrong=None):
        super().__init__()
        self.wrong, self.saved = wrong, []

    def function(self, a, b):
        return a, b + a.square()

    def inverse(self, a, c, saved=()):
        self.saved.append({*saved})
        if self.wrong in saved:
            return (c, None) if self.wrong else (None, c)
        return None if 0 in saved else a, None if 1 in saved else c - a.square()


@pytest.mark.parametrize(
    ("check", "layer", "finding"),
    [
        ("check_function", Loose(3, 3), "strict_forward to set requires_grad of output 0 to True"),
        ("check_function", Writes(3, 3), "input 0 to come back"),
        ("check_function", Noisy(), "output of a second run 0 to come back the same"),
        ("check_inverse", Wrong(3, 3), "input 0 to come back the same; got a relative"),
        ("check_inverse", WrongShape(3, 3), "of shape (4, 2)"),
        ("check_inverse", Sums(0), "Expected input (saved=0) 1 to come back the same"),
        ("check_inverse", Sums(1), "Expected input (saved=1) 0 to come back the same"),
    ],
)
def test_checks_say_what_fails(check, layer, finding):
    outcome = getattr(layer, check)(*[torch.randn(4, 3) for _ in range(1 + isinstance(layer, Sums))])
    assert not outcome
    assert finding in str(outcome)


def test_checks_say_that_nothing_fails():
    assert str(InvertibleLinear(3, 3).check_inverse(torch.randn(4, 3))) == "True"
    assert str(Sums().check_inverse(torch.randn(4, 3), torch.randn(4, 3))) == "True"


def test_saved_names_the_inputs_that_need_no_computing():
    layer = Sums()
    a, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(layer(a * 1, b * 1)[1].sum(), [a, b])
    assert layer.saved == [{0}]
    assert_close(got, (2 * a.detach(), torch.ones_like(b)))


def test_checks_change_nothing():
    layer, x = inn.ActNorm(3), torch.randn(4, 3)
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in layer.state_dict().items()}
    assert layer.check_function(x)
    assert layer.check_inverse(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(layer.state_dict(), state, rtol=0, atol=0)
