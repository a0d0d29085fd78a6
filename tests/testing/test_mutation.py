"""The command that plants faults says which no test notices."""

import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]

PACKAGE = '''
"""A package of one function, and a constant."""

LIMIT = 3


def clipped(x):
    if x > LIMIT:
        return LIMIT
    return x
'''
TESTS = """
from toy import LIMIT, clipped


def test_clipped():
    assert LIMIT == 3
    assert (clipped(2), clipped(4)) == (2, 3)
"""


@pytest.mark.slow
def test_what_no_test_notices_is_said(tmp_path: pathlib.Path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/__init__.py").write_text(PACKAGE)
    (tmp_path / "test_toy.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text("import gc\n\n\ndef pytest_collection_finish():\n    gc.freeze()\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    command = [sys.executable, "-m", "tests.mutation", "toy/__init__.py", "--processes", "1"]
    run = subprocess.run(  # noqa: S603 - this very file
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert run.stdout.count("not noticed by") == 1
    assert "- if x > LIMIT:\n  + if (x >= LIMIT):\n  not noticed by 1 of 1 tests" in run.stdout
    assert "toy/__init__.py 6 5 83.3% 5 83.3%" in " ".join(run.stdout.split())


def test_every_change_that_makes_no_difference_is_one_of_a_line_that_is_there():
    for fault in tomllib.loads((ROOT / "tests/mutation/equivalent.toml").read_text())["fault"]:
        assert fault["before"] in (ROOT / fault["file"]).read_text(), fault
