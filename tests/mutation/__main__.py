"""Plants changes in source files, one at a time, and says which no test notices.

A test notices a change if it fails, dies or takes too long with it. Of all tests those are run that come by the changed
lines. Some changes make no difference that anybody could see: ``equivalent.toml`` has them, and why.
"""

import argparse
import json
import os
import random
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from itertools import accumulate, takewhile
from pathlib import Path
from typing import NamedTuple

from .faults import Fault, faults_of
from .running import Reach, Session, forked, plant, plant_before_import, progress

KEY = ("file", "function", "before", "after")
EQUIVALENT = Path(__file__).with_name("equivalent.toml")


class Trial(NamedTuple):
    """A change, and the tests that are to notice it."""

    fault: Fault
    tests: list[str]
    of: int  # so many come by
    limit: float  # seconds
    slow: set[str]  # those of the tests that are left out by default
    waits: bool  # whether it is early enough to make it after the import


class Verdict(NamedTuple):
    """What became of a change."""

    fault: Fault
    test: str | None  # the one that noticed; "" if none did, None if the process died or took too long
    slow: bool  # whether that one is left out by default
    run: int  # so many tests were run at most
    of: int  # so many come by

    def __str__(self) -> str:
        noticed = "died or took too long" if self.test is None else f"noticed by {self.test}"
        said = noticed if self.test != "" else f"not noticed by {self.run} of {self.of} tests"
        fault = self.fault
        return f"{fault.path}:{fault.lines[0]} {fault.function}\n  - {fault.before}\n  + {fault.after}\n  {said}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m tests.mutation", description=__doc__)
    made.usage = "%(prog)s [options] FILE... [-- ARGUMENTS OF PYTEST]"
    made.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what to change, all of one package")
    made.add_argument("--function", default="", help="change only functions with this in their qualified names")
    made.add_argument("--sample", type=int, help="make so many changes, drawn at random; by default all")
    made.add_argument("--seed", type=int, default=0, help="of that draw")
    made.add_argument("--slow", action="store_true", help="try also the tests marked slow, for as long, last")
    made.add_argument("--seconds", type=float, default=60, help="run tests of so many seconds for one change")
    made.add_argument("--processes", type=int, default=os.cpu_count(), help="so many at a time")
    made.add_argument(
        "--again", type=Path, help="make only those changes that the verdicts in this file say none noticed"
    )
    made.add_argument("--json", type=Path, help="write all verdicts to this file, too")
    return made


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser().parse_args(sys.argv[1:split])
    options.pytest = [*sys.argv[split + 1 :], *(["-m", ""] if options.slow else [])]
    faults = [f for path in options.files for f in faults_of(path.resolve()) if options.function in f.function]
    if options.sample is not None:
        faults = random.Random(options.seed).sample(faults, min(options.sample, len(faults)))  # noqa: S311 - no secret
    if options.again:
        unnoticed = keys(entry for entry in json.loads(options.again.read_text()) if entry["test"] == "")
        faults = [f for f in faults if key(f) in unnoticed]
    known = keys(tomllib.loads(EQUIVALENT.read_text())["fault"])
    planted = [f for f in faults if key(f) not in known]
    for module in ("torch", "coverage"):  # once, before all forks; what is changed, in each
        import_module(module)
    [(_, answer)] = forked([(None, partial(among_imported, planted, options), float("inf"))], 1, quiet=False)
    if answer is None:
        raise SystemExit("Expected tests that can be collected; see above")
    verdicts, others, failing = answer
    verdicts += judged(others, partial(before_import, options.pytest), options.processes)
    print(  # noqa: T201 - a command
        *[v for v in verdicts if v.test == ""], table(verdicts, len(faults) - len(planted)), *failing, sep="\n"
    )
    if options.json:
        results = [{"test": v.test, "slow": v.slow, "run": v.run, "of": v.of} for v in verdicts]
        entries = [dict(zip(KEY, key(v.fault), strict=True)) | r for v, r in zip(verdicts, results, strict=True)]
        options.json.write_text(json.dumps(entries, indent=1))


def among_imported(faults: list[Fault], options: argparse.Namespace) -> tuple[list[Verdict], list[Trial], list[str]]:
    """Judge changes of functions, in modules that are imported; return trials of the others, and what always fails."""

    def judge(session: Session) -> tuple[list[Verdict], list[Trial], list[str]]:
        reach = Reach(package_of(options.files[0].resolve()), Path(".mutation"))
        reach.learn(session, options.processes)
        trials = []
        for fault in faults:
            come_by, waits = reach.tests(fault), fault.can_wait and bool(reach.comes_by(fault))
            tests = []
            for is_slow in (False, True):  # each have their seconds
                group = [test for test in come_by if (test in reach.slow) == is_slow]
                times = accumulate(reach.seconds[test] for test in group)
                tests += group[: len([*takewhile(lambda s: s < options.seconds, times)]) or 1]
            limit = 60 + 10 * sum(reach.seconds[test] for test in tests)
            trials.append(Trial(fault, tests, len(come_by), limit, reach.slow.intersection(tests), waits))

        def notice(trial: Trial) -> str:
            plant(trial.fault)
            return session.first_that_fails(trial.tests)

        verdicts = judged([t for t in trials if t.waits], notice, options.processes)
        noticing = {v.test for v in verdicts if v.test}
        [(_, wrong)] = forked([(None, lambda: session.all_that_fail(noticing), float("inf"))], 1)
        always = [f"fails without a change, too: {test}" for test in [*reach.failing, *wrong]]
        return verdicts, [t for t in trials if not t.waits], always

    return Session(options.pytest, judge).result


def before_import(selection: list[str], trial: Trial) -> str:
    """Judge what an import runs, with a change of it."""
    plant_before_import(trial.fault)
    files = {test.split("::")[0] for test in trial.tests}
    return Session([*files, *selection], lambda session: session.first_that_fails(trial.tests)).result


def judged(trials: list[Trial], notice: Callable[[Trial], str], processes: int) -> list[Verdict]:
    jobs = [(trial, partial(notice, trial), trial.limit) for trial in trials]
    verdicts = []
    for trial, test in forked(jobs, processes):
        verdicts.append(Verdict(trial.fault, test, test in trial.slow, len(trial.tests), trial.of))
        progress(f"{len(verdicts)}/{len(jobs)} changes tried: {verdicts[-1]}")
    return verdicts


def table(verdicts: list[Verdict], equivalent: int) -> str:
    """Count by file: all, those noticed by the default selection of tests, by all of them, and not."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for v in verdicts:
        for row in (short(v.fault.path), "all"):
            counts[row] = [
                a + b for a, b in zip(counts[row], (1, v.test != "" and not v.slow, v.test != ""), strict=True)
            ]
    lines = [f"{'changes':>40} {'noticed by default':>20} {'by all':>14}"]
    for row, (n, default, slow) in sorted(counts.items(), key=lambda item: (item[0] == "all", item)):
        lines.append(f"{row:32} {n:7} {default:12} {default / n:7.1%} {slow:6} {slow / n:7.1%}")
    return "\n".join([*lines, f"left out as equivalent: {equivalent}"])


def key(fault: Fault) -> tuple[str, ...]:
    """Return what tells a change from others, whatever lines come and go above it."""
    return short(fault.path), fault.function, fault.before, fault.after


def keys(entries: Iterable[dict[str, str]]) -> set[tuple[str, ...]]:
    return {tuple(entry[name] for name in KEY) for entry in entries}


def package_of(path: Path) -> Path:
    """Return the outermost package that a file is in."""
    return [*takewhile(lambda folder: (folder / "__init__.py").exists(), path.parents)][-1]


def short(path: Path) -> str:
    return str(path.relative_to(package_of(path).parent))


if __name__ == "__main__":
    main()
