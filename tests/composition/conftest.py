"""Every kind of net in every mode, in float64."""

from collections.abc import Iterator

import pytest
import torch

import invzoo as iz
from tests.composition.cases import BUILDERS, MODES, Case, make

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


# Every form and every mode once; the whole matrix is slow.
USUAL = {("layer", "store"), ("sequential", "recompute"), ("invertible_sequential", "invert"), ("streams", "invert")}
PAIRS = [
    pytest.param((name, mode), id=f"{name}-{mode}", marks=() if (name, mode) in USUAL else pytest.mark.slow)
    for name in BUILDERS
    for mode in MODES
]


@pytest.fixture(params=PAIRS)
def case(request: pytest.FixtureRequest, float64: None, seeded: None) -> Iterator[Case]:
    name, mode = request.param
    made = make(name)
    with iz.mode(made.net, mode):
        yield made
