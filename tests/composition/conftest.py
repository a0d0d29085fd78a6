"""Every kind of net in every mode, in float64."""

from collections.abc import Iterator

import pytest
import torch

from tests.reference import MODES, SUBJECTS, Case, make, params

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=params(SUBJECTS))
def case(request: pytest.FixtureRequest, float64: None, seeded: None) -> Case:
    return make(request.param.form, mode=request.param.mode)
