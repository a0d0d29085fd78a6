"""Tests in forked processes: what each of them runs, and which notices a fault."""

import ast
import contextlib
import ctypes
import gc
import hashlib
import importlib.machinery
import json
import multiprocessing as mp
import os
import resource
import signal
import sqlite3
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from multiprocessing.connection import wait
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from .faults import Fault

__all__ = ["Reach", "Session", "forked", "plant", "plant_before_import", "progress"]

MEMORY = 16 << 30  # bytes that a process may ask for, since a fault may ask for ever


def progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def forked(
    jobs: Iterable[tuple[Any, Callable[[], Any], float]], processes: int, *, quiet: bool = True
) -> Iterator[tuple[Any, Any]]:
    """Run jobs, given by a key, a function and a limit in seconds, each in a process forked now; yield key and result.

    The result of a job that dies, or takes longer, is None.
    """
    jobs, running = iter(jobs), {}
    while True:
        while len(running) < processes and (job := next(jobs, None)) is not None:
            key, function, limit = job
            ours, theirs = mp.Pipe(duplex=False)
            process = mp.get_context("fork").Process(target=_run, args=(function, theirs, quiet))
            process.start()
            theirs.close()
            running[ours] = key, process, time.monotonic() + limit
        if not running:
            return
        ready = wait(running, timeout=1)
        late = [pipe for pipe, (_, _, end) in running.items() if time.monotonic() > end and pipe not in ready]
        for pipe in [*ready, *late]:
            key, process, _ = running.pop(pipe)
            try:
                result = pipe.recv() if pipe in ready else None
            except EOFError:  # it died
                result = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.join()
            yield key, result


def _run(function: Callable[[], Any], pipe: Any, quiet: bool) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with who started it (Linux)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    if quiet:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
    pipe.send(function())
    os._exit(0)  # nobody waits for what is left


def plant(fault: Fault) -> None:
    """Give the functions of a module that is imported the code that they have with a fault."""
    codes: dict[tuple[str, int], CodeType | None] = {}
    todo = [compile(fault.source, str(fault.path), "exec", dont_inherit=True)]
    while todo:
        code = todo.pop()
        key = code.co_qualname, code.co_firstlineno
        codes[key] = None if key in codes else code  # two lambdas on one line: whoever makes them has the new ones
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    gc.unfreeze()  # what is frozen is not among its objects
    for f in gc.get_objects():
        if type(f) is FunctionType and f.__code__.co_filename == str(fault.path):
            code = codes.get((f.__code__.co_qualname, f.__code__.co_firstlineno))
            if code is not None and code.co_freevars == f.__code__.co_freevars:
                f.__code__ = code


def plant_before_import(fault: Fault) -> None:
    """Let a module be imported with a fault."""
    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader: Any, name: str) -> Any:
        if loader.path == str(fault.path):
            return compile(fault.source, loader.path, "exec", dont_inherit=True)
        return plain(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code


class Session:
    """Collects tests, as pytest does with these arguments, and hands over to a function instead of running them."""

    def __init__(self, args: list[str], then: Callable[["Session"], Any]):
        self.then = then
        plain = ["--capture=sys", "-p", "no:cacheprovider", "--hypothesis-profile=ci"]
        if code := pytest.main([*args, *plain], plugins=[self]):
            progress(f"Expected tests that can be collected; got exit code {code!r} of pytest {' '.join(args)}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session, self.items = session, {item.nodeid: item for item in session.items}
        self.result = self.then(self)
        return True

    def fails(self, item: pytest.Item, then: pytest.Item | None = None) -> bool:
        before = self.session.testsfailed
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=then)
        return self.session.testsfailed > before

    def first_that_fails(self, tests: list[str]) -> str:
        """Run tests until one fails; return its name, or an empty one."""
        items = [self.items[test] for test in tests]
        return next((item.nodeid for item, then in pairwise([*items, None]) if self.fails(item, then)), "")

    def all_that_fail(self, tests: Iterable[str]) -> list[str]:
        return [test for test in tests if self.fails(self.items[test])]


@dataclass
class Reach:
    """Which tests run which lines of a package, learned from running them once."""

    package: Path
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)  # that each test takes
    slow: set[str] = field(default_factory=set)
    failing: list[str] = field(default_factory=list)  # without any fault
    files: list[Path] = field(default_factory=list)
    _runs: dict[Path, dict[str, int]] = field(default_factory=dict)

    def learn(self, session: Session, processes: int) -> None:
        """Run those tests that were not run yet with these sources."""
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(self.package.rglob("*.py"))))
        by_file = defaultdict(list)
        for item in session.items.values():
            by_file[item.path].append(item)
        self.folder.mkdir(exist_ok=True)
        jobs = []
        for path, items in by_file.items():
            key = digest.copy()
            key.update(path.read_bytes() + "".join(item.nodeid for item in items).encode())
            self.files.append(target := self.folder / key.hexdigest()[:24])
            if not target.with_suffix(".json").exists():
                jobs.append((path, lambda items=items, target=target: self._trace(session, items, target), 3600))
        for done, (path, _) in enumerate(forked(jobs, processes), 1):
            progress(f"{done}/{len(jobs)} test files traced: {path.name}")
        for file in self.files:
            if file.with_suffix(".json").exists():
                for test, (seconds, fails) in json.loads(file.with_suffix(".json").read_text()).items():
                    self.failing.append(test) if fails else self.seconds.setdefault(test, seconds)
        marks = {name: {mark.name for mark in item.iter_markers()} for name, item in session.items.items()}
        self.slow = {name for name, found in marks.items() if "slow" in found and "usual" not in found}

    def _trace(self, session: Session, items: list[pytest.Item], target: Path) -> None:
        import coverage  # noqa: PLC0415 - only who traces needs it

        tracer = coverage.Coverage(str(target), include=[f"{self.package}/*"], config_file=False, messages=False)
        outcomes = {}
        tracer.start()
        for item, then in pairwise([*items, None]):
            tracer.switch_context(item.nodeid)
            start = time.perf_counter()
            fails = session.fails(item, then)
            outcomes[item.nodeid] = time.perf_counter() - start, fails
        tracer.stop()
        tracer.save()
        target.with_suffix(".json").write_text(json.dumps(outcomes))

    def tests(self, fault: Fault) -> list[str]:
        """Return the tests that come by, or those of the whole file for what an import runs.

        Where none does, an import may have run these lines before all tests, or the compiler reads them and runs none:
        then those of files that this one imports, the rarest first, take turns with those of the whole file.
        """
        runs = self.runs(fault.path)
        found = self.comes_by(fault) if fault.can_wait else [*runs]
        if found:
            return self.in_order(found, fault.path)
        imported = sorted(_imports_of(fault.path), key=lambda path: len(self.runs(path)))
        near = [test for path in imported for test in self.in_order(self.runs(path), path)]
        return _in_turns([*dict.fromkeys(near)], self.in_order(runs, fault.path))

    def comes_by(self, fault: Fault) -> list[str]:
        return [test for test, lines in self.runs(fault.path).items() if lines & _bits(fault.lines)]

    def runs(self, path: Path) -> dict[str, int]:
        """Return the tests that run a file's functions, and their lines there, as the bits of a number."""
        if path not in self._runs:
            query = (
                "select context, numbits from line_bits "
                "join file on file_id = file.id join context on context_id = context.id where path = ?"
            )
            inside, found = _lines_in_functions(path), {}
            for file in filter(Path.exists, self.files):
                with sqlite3.connect(file) as base:
                    found |= {
                        test: int.from_bytes(bits, "little") & inside for test, bits in base.execute(query, [str(path)])
                    }
            self._runs[path] = {test: lines for test, lines in found.items() if lines and test in self.seconds}
        return self._runs[path]

    def in_order(self, tests: Iterable[str], path: Path) -> list[str]:
        """Sort tests: those of the default selection first, and of each function not all parameters at once.

        Among these take turns: the fastest, and the one that runs lines of the file that the fewest others run.
        """
        fastest = sorted(tests, key=self.seconds.__getitem__)
        seen: dict[str, int] = defaultdict(int)
        turns = {}
        for test in fastest:
            turns[test] = seen[function := test.split("[")[0]]
            seen[function] += 1
        fastest.sort(key=lambda test: (test in self.slow, self.seconds[test] * (1 + turns[test])))
        rarity = self._rarity(path)
        rarest = sorted(fastest, key=lambda test: (test in self.slow, -rarity[test] / (1 + turns[test])))
        return _in_turns(fastest, rarest)

    def _rarity(self, path: Path) -> dict[str, float]:
        """Add up, for each test, its share in each line of a file that it runs."""
        alike = Counter(self.runs(path).values())
        lines = {bits: [n for n in range(bits.bit_length()) if bits >> n & 1] for bits in alike}
        counts: Counter[int] = Counter()
        for bits, times in alike.items():
            counts.update(dict.fromkeys(lines[bits], times))
        rarity = {bits: sum(1 / counts[n] for n in lines[bits]) for bits in alike}
        return {test: rarity[bits] for test, bits in self.runs(path).items()}


def _in_turns(*lists: list[str]) -> list[str]:
    """Take one of each list, then another one, each once."""
    return [*dict.fromkeys(test for row in zip_longest(*lists) for test in row if test is not None)]


def _bits(lines: Iterable[int]) -> int:
    return sum(1 << n for n in {*lines})


def _lines_in_functions(path: Path) -> int:
    """Return the lines that no import runs by itself."""
    functions = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return _bits(n for f in functions for n in range(f.body[0].lineno, f.end_lineno + 1))


def _imports_of(path: Path) -> list[Path]:
    """List the files of its package that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found += [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
    return [file for file in dict.fromkeys(found) if file.exists()]
