"""Shards of the fuzz test: `pytest tests/fuzz -n 8 --fuzz-examples 10000 --fuzz-shards 8 --fuzz-seed 1`."""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shard" in metafunc.fixturenames:
        metafunc.parametrize("shard", range(metafunc.config.getoption("--fuzz-shards", 1)))
