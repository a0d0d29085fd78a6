"""Random stacks of the catalogue's layers, random inputs inside domains; and what happens without hypothesis."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import constraints

import invzoo as iz
from invzoo import testing
from invzoo.testing import strategies
from invzoo.testing.inputs import bounds, draw_from, elementwise, in_words

QUICK = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
DOMAINS = [
    constraints.real,
    constraints.unit_interval,
    constraints.interval(-2.0, 3.0),
    constraints.positive,
    constraints.greater_than(2.0),
    constraints.less_than(-1.0),
    constraints.nonnegative,
    constraints.independent(constraints.positive, 1),
]


@pytest.mark.parametrize("shape", [(4,), (4, 2, 4)], ids=str)
@QUICK
@given(data=st.data())
def test_random_stacks_keep_every_contract(shape, data):
    stack = data.draw(strategies.stacks(depth=st.integers(1, 5), shape=shape))
    (x,) = data.draw(strategies.inputs(stack, shape, batch=2, largest=3.0))
    x = x + 0.01 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))  # off every kink
    testing.assert_round_trip(stack, x, round_trip_tolerance=1e-6)
    testing.assert_modes_agree(stack, x, modes_tolerance=1e-5)
    testing.assert_log_det(stack, x, log_det_tolerance=1e-5, largest=3.0)


def test_stacks_are_made_of_many_layers():
    for shape in ((4,), (4, 2, 4)):
        kinds = {case.name.split("[")[0] for case in strategies.stackable(shape)}
        assert len(kinds) > 5, kinds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("domain", DOMAINS, ids=str)
@QUICK
@given(data=st.data())
def test_elements_lie_in_the_domain(domain, dtype, data):
    x = data.draw(strategies.elements(domain, dtype, 10.0))
    domain = elementwise(domain)
    assert domain.check(torch.tensor([x], dtype=dtype)).all()
    assert torch.tensor(x, dtype=dtype).item() == x or dtype == torch.bfloat16


@pytest.mark.parametrize("domain", DOMAINS, ids=str)
def test_draws_lie_in_the_domain_away_from_its_ends(domain):
    x = draw_from(domain, (1000,), torch.Generator().manual_seed(0))
    assert domain.check(x).all()
    low, high = bounds(domain)
    assert low is None or (x - low).min() > 1e-3
    assert high is None or (high - x).min() > 1e-3
    assert x.std() > 0.1


def test_domains_in_words():
    words = ["real", "[0, 1]", "[-2, 3]", "> 0", "> 2", "< -1", ">= 0", "> 0"]
    assert [in_words(domain) for domain in DOMAINS] == words
    assert in_words(constraints.integer_interval(0, 7)) == "integers in [0, 7]"
    assert in_words(constraints.simplex) == "Simplex()"


def test_a_domain_without_bounds_is_refused():
    with pytest.raises(TypeError, match="bounds: Expected a domain of real numbers between bounds; got Simplex"):
        draw_from(constraints.simplex, (2,), torch.Generator())


INTEGERS = testing.Case(iz.Identity, (2,), draw=lambda shape, g: torch.randint(0, 9, shape, generator=g))
COUPLING = iz.AdditiveCoupling(nn.Linear(2, 2))


@QUICK
@given(data=st.data())
def test_inputs(data):
    logit = testing.Case(iz.InvertibleLogit, (2,))
    (x,) = data.draw(strategies.inputs(logit, batch=st.integers(0, 3), dtype=torch.float32))
    assert x.dtype == torch.float32
    assert x.shape[1:] == (2,)
    assert ((x >= 0) & (x <= 1)).all()
    (x,) = data.draw(strategies.inputs(INTEGERS))  # a draw of the case is used
    assert torch.equal(x, x.round())
    streams = data.draw(strategies.inputs(COUPLING, (2,), (2,), batch=1))
    assert [tuple(x.shape) for x in streams] == [(1, 2), (1, 2)]


BLOCKED = """
import sys
sys.modules["hypothesis"] = sys.modules["pytest"] = None
import invzoo as iz
iz.testing.assert_invertible(iz.Reverse(), __import__("torch").randn(2, 3))
try:
    iz.testing.strategies
except ImportError as error:
    print(error)
try:
    iz.testing.nonsense
except AttributeError as error:
    print(error)
"""


def test_only_the_strategies_need_hypothesis():
    run = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)  # noqa: S603
    assert run.stdout.splitlines() == [
        "invzoo.testing.strategies needs hypothesis; pip install hypothesis",
        "module 'invzoo.testing' has no attribute 'nonsense'",
    ]
