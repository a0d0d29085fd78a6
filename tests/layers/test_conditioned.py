"""What layers with a conditioner have in common: how often they evaluate it."""

import pytest
import torch

import invzoo as iz
from invzoo.layers.conditioned import Conditioned


def conditioned(case):
    layer = case.layer()
    return isinstance(layer, Conditioned) and layer.conditioner is not None


CASES = [pytest.param(case, id=case.name) for case in iz.testing.cases() if conditioned(case)]


def count_evaluations(net):
    calls, forward = [], net.forward

    def counted(context):
        calls.append(1)
        return forward(context)

    net.forward = counted
    return calls


def test_there_are_some():
    assert len({type(case.values[0].layer()) for case in CASES}) > 8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["forward", "forward_and_log_det"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "invert"])
def test_a_replay_evaluates_the_conditioner_once(case, method, swapped, mode):
    layer, inputs, side = case.layer(), case.inputs(), case.side_inputs()
    if swapped:
        inputs = [layer(*inputs, **side).detach()]
    calls, x = count_evaluations(layer.conditioner), [t.requires_grad_() for t in inputs]
    with iz.mode(layer, mode):
        y = getattr(layer.inv if swapped else layer, method)(*x, **side)
        assert len(calls) == 1
        sum(t.sum() for t in (y if isinstance(y, tuple) else (y,))).backward()
    assert len(calls) == 2


@pytest.mark.parametrize("case", CASES[:1])
def test_the_log_det_of_an_inverse_gets_the_condition(case):
    layer, inputs, side = case.layer(), case.inputs(), case.side_inputs()
    y = layer(*inputs, **side)
    torch.testing.assert_close(layer.inv.log_det(y, **side), -layer.log_det(*inputs, **side))
