"""Every behaviour is tested on each form of net, in each mode."""

import pytest
import torch
from torch import Tensor

from tests.reference import FEATURES, FORMS, MODES, Subject


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[Subject(form, mode) for form in FORMS for mode in MODES], ids=lambda s: f"{s.form}-{s.mode}")
def subject(request) -> Subject:
    return request.param


@pytest.fixture(params=[Subject(form, mode) for form in FORMS for mode in MODES[1:]], ids=lambda s: f"{s.form}-{s.mode}")
def saving(request) -> Subject:
    """The subjects that free something."""
    return request.param


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, FEATURES, requires_grad=True)


@pytest.fixture
def data() -> Tensor:
    return torch.randn(5, FEATURES)
