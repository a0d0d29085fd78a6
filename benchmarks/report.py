"""From results to JSON files, to RESULTS.md, and to the README's figures."""

import datetime as dt
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import tables, targets

__all__ = ["save", "write"]

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def machine() -> dict[str, Any]:
    """Describe the machine and the code that the numbers are from; `threads` is what torch takes if nobody asks."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def commit() -> str | None:
    """Return the commit of the code, None outside of git."""
    command = ("git", "rev-parse", "--short", "HEAD")
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


def save(case: str, result: dict[str, Any]) -> None:
    """Write `results/<case>.json`."""
    path = HERE / "results" / f"{case}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


def write(*, picture: bool) -> None:
    """Make RESULTS.md, the README's figures and, if asked, the picture from the JSON files that are there."""
    results = {path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")}
    parts = ["# What is measured, and what came out\n\nMade by `python -m benchmarks report` from `results/*.json`."]
    parts += [f"## Targets\n\n{targets.table(results)}"]
    parts += [
        f"{tables.TABLES[case](results[case])}\n\n{_where(results[case])}" for case in tables.TABLES if case in results
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n")
    if {"time", "peaks"} <= results.keys():
        figures = f"{tables.summary(results['time'], results['peaks'])}\n\n{_where(results['time'])}"
        marks = r"(<!-- figures -->\n).*?(<!-- end of figures -->)"
        README.write_text(re.sub(marks, lambda m: m[1] + figures + "\n" + m[2], README.read_text(), flags=re.DOTALL))
    if picture and "depth" in results:
        draw(results["depth"])


def draw(result: dict[str, Any]) -> None:
    """Draw `memory.svg`: peak memory against depth."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - what does not draw does without

    with plt.rc_context({"svg.hashsalt": "invzoo", "font.size": 11}):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        styles = {"plain": "C7", "torch checkpoint": "C0", "invzoo invert": "C3"}
        for name, color in styles.items():
            rows = [row for row in result["rows"] if row["contestant"] == name]
            depths, sizes = [row["depth"] for row in rows], [row["peak"] / result["activation"] for row in rows]
            axes.plot(depths, sizes, "o-", color=color, linewidth=2)
            end = {"xy": (depths[-1], sizes[-1]), "xytext": (8, 0), "textcoords": "offset points"}
            axes.annotate(f"{name}, {sizes[-1]:,.1f}", **end, color=color, va="center", annotation_clip=False)
        axes.set(xscale="log", yscale="log", xlabel="couplings", ylabel="peak in backward, activations")
        axes.set_xticks(depths, map("{:,}".format, depths))
        axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(HERE / "memory.svg", metadata={"Date": None})
        plt.close(figure)


def _where(result: dict[str, Any]) -> str:
    m, rows = result["machine"], [*result.get("rows", ()), *result.get("times", ()), result.get("deep", {})]
    used = sorted({row["threads"] for row in rows if "threads" in row}) or [m["threads"]]
    threads = f"{' and '.join(map(str, used))} thread{'s' * (used[-1] > 1)}"
    code = [f"commit {m['commit']}"] if m.get("commit") else []
    machine = f"{m['cpu']}, {m['cores']} cores", threads, f"torch {m['torch']}", f"Python {m['python']}"
    return f"*{', '.join([*machine, *code, m['date']])}.*"
