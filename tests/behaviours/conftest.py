"""Every behaviour is tested on each form of net, in each mode."""

import pytest
import torch
from torch import Tensor

from tests.reference import FEATURES, SUBJECTS, Subject, params


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=params(SUBJECTS))
def subject(request) -> Subject:
    return request.param


@pytest.fixture(params=params([subject for subject in SUBJECTS if subject.mode != "store"]))
def saving(request) -> Subject:
    """The subjects that free something."""
    return request.param


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, FEATURES, requires_grad=True)


@pytest.fixture
def data() -> Tensor:
    return torch.randn(5, FEATURES)
