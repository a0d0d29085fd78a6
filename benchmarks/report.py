"""From results to JSON files, tables and the picture."""

import datetime as dt
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

__all__ = ["draw", "save", "show_depth", "show_timing"]

HERE = Path(__file__).parent


def machine() -> dict[str, Any]:
    """Describe the machine that the numbers are from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def save(case: str, result: dict[str, Any]) -> None:
    """Write `results/<case>.json`."""
    path = HERE / "results" / f"{case}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


def show_depth(result: dict[str, Any]) -> None:
    """Print bytes held after forward and at the peak of backward, in activations."""
    depths = sorted({row["depth"] for row in result["rows"]})
    for key, title in (("held", "held after forward"), ("peak", "peak in backward")):
        table = Table("", *map(str, depths), title=f"{title}, in activations, against depth")
        for name in _names(result):
            sizes = [row[key] / result["activation"] for row in result["rows"] if row["contestant"] == name]
            table.add_row(name, *(f"{size:.2f}" for size in sizes))
        Console().print(table)


def show_timing(result: dict[str, Any]) -> None:
    """Print the medians of the times, the quartiles of the ratios, and the error of outputs and gradients."""
    table = Table("workload", "contestant", "ms a step", "ratio to plain (quartiles)", "error")
    for row in result["rows"]:
        low, median, high = row["ratio to plain"]
        milliseconds = f"{1000 * row['seconds'][1]:.1f}"
        ratio = f"{median:.2f} ({low:.2f}, {high:.2f})"
        table.add_row(row["workload"], row["contestant"], milliseconds, ratio, f"{row['error']:.0e}")
    Console().print(table)


def draw() -> None:
    """Draw `memory.svg` from `results/depth.json`."""
    result = json.loads((HERE / "results" / "depth.json").read_text())
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


def _names(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["contestant"] for row in result["rows"]))
