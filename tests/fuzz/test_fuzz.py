"""Random nets under random training programs: every number is that of the plain maths.

A failing case prints as an expression; append it to `FOUND` to keep it.
"""

import pytest
from hypothesis import HealthCheck, given, reject, seed, settings

from tests.fuzz.programs import Unfit, check
from tests.fuzz.specs import Case, Forward, Iteration, Leaf, Net, Step, cases

FOUND = [
    # BatchNorm writes its statistics without moving their version counters.
    Case(
        Net((Leaf("additive", f="linear", g="batchnorm", split="interleave"),), features=5),
        (Iteration((Forward(),), (Step("backward", retain=True), Step("backward"))),),
    ),
]


@pytest.mark.parametrize("case", FOUND, ids=range(len(FOUND)))
def test_cases_that_went_wrong_once(case: Case) -> None:
    check(case)


def test_random_programs(shard: int, request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    start, shards = option("--fuzz-seed", None), option("--fuzz-shards", 1)
    fixed = start is None and shards == 1

    @settings(
        max_examples=-(-option("--fuzz-examples", 100) // shards),
        deadline=None,
        derandomize=fixed,
        database=None,
        print_blob=not fixed,
        suppress_health_check=[*HealthCheck],
    )
    @given(cases())
    def compare(case: Case) -> None:
        try:
            check(case)
        except Unfit:
            reject()
        except Exception as error:
            error.add_note(f"check({case!r})")
            raise

    compare = compare if fixed else seed((start or 0) * 1000 + shard)(compare)
    compare()
