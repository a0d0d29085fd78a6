"""Every property of every layer, on every case of the catalogue."""

import pytest

import invzoo as iz

CASES = {case.name: case for case in iz.testing.cases()}
CHECKS = [
    pytest.param(case, assertion, id=f"{case.name}-{assertion.__name__.removeprefix('assert_')}")
    for case in CASES.values()
    for assertion in iz.testing.ASSERTIONS
]


@pytest.mark.parametrize(("case", "assertion"), CHECKS)
def test_layer(case, assertion):
    if assertion.__name__ in case.allowances.get("without", {}):
        assert case.allowances["without"][assertion.__name__]  # the reason
        return
    case.assertions()[assertion.__name__]()
