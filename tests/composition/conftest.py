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


@pytest.fixture(params=[*BUILDERS])
def case(request: pytest.FixtureRequest, mode: str, float64: None, seeded: None) -> Iterator[Case]:
    made = make(request.param)
    with iz.mode(made.net, mode):
        yield made
