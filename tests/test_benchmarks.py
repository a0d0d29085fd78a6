"""The benchmarks' report: what it says of a number, and of what took part."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import contestants, report, tables, targets

MACHINE = {"cpu": "C", "cores": 2, "threads": 2, "python": "3", "torch": "2", "date": "1999-12-31"}
TARGET = targets.Target("step", "time", 1.0, lambda result: result["value"], reason="why")


@pytest.mark.parametrize(
    ("limit", "value", "row"),
    [
        (1.0, 1.003, ["step", "<= 1", "**1.003**", "why"]),
        (1.0, 1.00001, ["step", "<= 1", "**1**", "why"]),
        (1.0, 1.0, ["step", "<= 1", "1", ""]),
        (4096, 13010.3, ["step", "<= 4096", "**13,010**", "why"]),
        (None, 1.3099, ["step", "-", "1.31", ""]),
        (1.0, None, ["step", "<= 1", "not measured", ""]),
    ],
)
def test_a_target_is_judged_by_the_number_that_was_measured(limit, value, row):
    assert targets._row(replace(TARGET, limit=limit), {"value": value}) == row


def test_a_target_without_results():
    assert targets._row(TARGET, None) == ["step", "<= 1", "not measured", ""]


@pytest.mark.parametrize(
    ("result", "threads"),
    [
        ({"rows": [{}]}, "2 threads"),
        ({"rows": [{"threads": 1}]}, "1 thread"),
        ({"rows": [{"threads": 2}, {"threads": 1}]}, "1 and 2 threads"),
        ({"rows": [{}], "times": [{"threads": 1}]}, "1 thread"),
        ({"deep": {"threads": 1}}, "1 thread"),
    ],
)
def test_where_says_the_threads_that_were_used(result, threads):
    assert report._where({"machine": MACHINE, **result}) == f"*C, 2 cores, {threads}, torch 2, Python 3, 1999-12-31.*"


def test_where_says_the_commit():
    where = report._where({"machine": MACHINE | {"commit": "abc1234"}, "rows": []})
    assert where == "*C, 2 cores, 2 threads, torch 2, Python 3, commit abc1234, 1999-12-31.*"


def test_no_commit_outside_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() is None
    monkeypatch.setenv("PATH", "")
    assert report.commit() is None


def test_peaks_of_small_tensors_are_not_shown():
    row = {"workload": "linear", "peak": 2**20}
    assert [tables.grown(row), tables.grown(row | {"workload": "overhead"})] == ["1.0", "-"]


def test_a_peer_that_cannot_be_imported_is_left_out_with_its_reason(capsys, monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise AttributeError('torch has no attribute six')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not contestants.installed("broken_peer")
    assert not contestants.installed("missing_peer")
    assert contestants.installed("json")
    assert capsys.readouterr().out.splitlines() == [
        "broken_peer is left out: AttributeError: torch has no attribute six",
        "missing_peer is left out: ModuleNotFoundError: No module named 'missing_peer'",
    ]


def test_what_does_not_draw_needs_no_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import benchmarks.__main__"
    root = Path(report.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0  # noqa: S603
