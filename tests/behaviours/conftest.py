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


SAVING = [Subject(form, mode) for form in FORMS for mode in MODES[1:]]
STORING = [Subject(form, "store") for form in ("stack", "streams")]  # there is little to go wrong


def name(subject: Subject) -> str:
    return f"{subject.form}-{subject.mode}"


@pytest.fixture(params=STORING + SAVING, ids=name)
def subject(request) -> Subject:
    return request.param


@pytest.fixture(params=SAVING, ids=name)
def saving(request) -> Subject:
    """The subjects that free something."""
    return request.param


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, FEATURES, requires_grad=True)


@pytest.fixture
def data() -> Tensor:
    return torch.randn(5, FEATURES)
