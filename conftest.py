"""What every test and every doctest starts from: seeded, with the names that the examples in docstrings use."""

import gc
import os

# Tests run in one process per core (`pytest -n auto`), where threads would only get in each other's way. Torch reads
# this as it is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

import invzoo as iz
from tests.tools.needs import MISSING

__all__ = [
    "names_for_doctests",
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_report_header",
    "pytest_terminal_summary",
    "seeded",
]

settings.register_profile("usual", deadline=None, max_examples=25)
settings.register_profile("gate", deadline=None, max_examples=100, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=2000)
settings.load_profile("usual")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(True)  # a compiler that ran before turned it off


@pytest.fixture(autouse=True)
def names_for_doctests(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, nn=torch.nn, iz=iz)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-examples", type=int, default=100, help="how many random programs to compare, in all shards")
    group.addoption("--fuzz-shards", type=int, default=1, help="in how many tests, for pytest-xdist to share out")
    group.addoption("--fuzz-seed", type=int, default=None, help="where to start; by default always at the same place")


def pytest_collection_finish() -> None:
    """Spare the garbage collector the thousands of tests that are there; some of them call it."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    missing = {f"tests/tools/{file}": ", ".join(tools) for file, tools in MISSING.items()}
    if not torch.cuda.is_available():
        missing["tests/composition/test_cuda.py"] = "a CUDA device"
    return [f"not collected: {file}, for want of {what}" for file, what in missing.items()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in pytest_report_header():  # a quiet run has no header
        terminalreporter.write_line(line, yellow=True)
