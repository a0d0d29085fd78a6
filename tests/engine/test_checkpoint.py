"""`checkpoint`: the engine for plain callables."""

import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.testing.memory import track_memory


@pytest.fixture
def x():
    return torch.rand(64, 32, dtype=torch.float64, requires_grad=True)


def test_gradients_with_and_without_an_inverse(x):
    wanted = torch.autograd.grad(x.exp().square().sum(), x)
    for inverse in (torch.log, None):
        assert_close(torch.autograd.grad(iz.checkpoint(torch.exp, x, inverse=inverse).square().sum(), x), wanted)


def test_a_chain_holds_its_last_output_alone(x):
    def function(v):
        return (v / 2).sinh() * 2

    with track_memory() as memory:
        y = x
        for _ in range(10):
            y = iz.checkpoint(function, y, inverse=lambda v: (v / 2).asinh() * 2)
        assert memory.current == y.untyped_storage().nbytes()
    plain = x
    for _ in range(10):
        plain = function(plain)
    assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(plain.sum(), x))


def test_several_tensors_side_inputs_and_other_values(x):
    def function(a, b, label, *, scale):
        return a, b * scale + a.square(), label

    def inverse(a, c, label, *, scale):
        return a, (c - a.square()) / scale, label

    scale = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    a, b, label = iz.checkpoint(function, x * 1, x + 1, "label", inverse=inverse, scale=scale)
    assert label == "label"
    got = torch.autograd.grad((a + b.square()).sum(), [x, scale])
    a, b, label = function(x * 1, x + 1, "label", scale=scale)
    assert_close(got, torch.autograd.grad((a + b.square()).sum(), [x, scale]))


def test_callables_are_not_held(x):
    def inverse(y):
        return y.log()

    iz.checkpoint(torch.exp, x, inverse=inverse).sum().backward()
    held = weakref.ref(inverse)
    del inverse
    assert held() is None


def test_disabled_it_is_the_function(x):
    y = iz.checkpoint(torch.exp, x, inverse=torch.log, enabled=False)
    assert y.grad_fn._saved_result is not None
    assert_close(y, x.exp())


def test_a_wrong_inverse_is_an_error_on_the_first_step(x):
    y = iz.checkpoint(torch.exp, x, inverse=torch.sqrt)
    with pytest.raises(RuntimeError, match="Expected exp to be replayed within a relative error"):
        y.sum().backward()
    iz.checkpoint(torch.exp, x, inverse=torch.sqrt, check="never").sum().backward()


def test_bad_check(x):
    with pytest.raises(ValueError, match="Expected check to be one of 'first', 'always', 'never'; got 'once'"):
        iz.checkpoint(torch.exp, x, check="once")


def test_free_input(x):
    held = x.detach() * 1
    was = held.clone()
    weight = torch.ones(32, dtype=torch.float64, requires_grad=True)
    y = iz.checkpoint(lambda v: v * weight, held, inverse=lambda v: v / weight, free_input=True)
    with pytest.raises(RuntimeError, match="freed"):
        held + 1
    y.sum().backward()
    assert_close(held, was)


class Saved(nn.Module):
    """Counts how often it is called behind all that autograd saves."""

    calls = 0

    def forward(self, x):
        Saved.calls += 1
        return x + 1


@pytest.mark.parametrize(("check", "calls"), [("first", 1), ("never", 1), ("always", 2)])
def test_a_replay_stops_when_all_is_saved_on_the_first_call_too(check, calls):
    Saved.calls = 0
    iz.checkpoint(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), Saved()), torch.ones(3, 2), check=check).sum().backward()
    assert calls == Saved.calls


def test_a_first_call_that_saves_other_values_the_second_time():
    numbers = iter([1.0, 2.0])
    y = iz.checkpoint(lambda x: (x * next(numbers)).exp() + 1, torch.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="for saved tensor 0. Its inverse is wrong, or it is not deterministic"):
        y.sum().backward()
