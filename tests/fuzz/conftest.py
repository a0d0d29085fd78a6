"""Options of the fuzz test: `pytest tests/fuzz -n 8 --fuzz-examples 10000 --fuzz-shards 8 --fuzz-seed 1`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-examples", type=int, default=100, help="how many random programs to compare, in all shards")
    group.addoption("--fuzz-shards", type=int, default=1, help="in how many tests, for pytest-xdist to share out")
    group.addoption("--fuzz-seed", type=int, default=None, help="where to start; by default always at the same place")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shard" in metafunc.fixturenames:
        metafunc.parametrize("shard", range(metafunc.config.getoption("--fuzz-shards", 1)))
