"""Tables of the results, in Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["TABLES", "summary"]

Result = dict[str, Any]


def markdown(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Lay out a table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def names(rows: Iterable[Result]) -> list[str]:
    """Return the contestants in their order."""
    return list(dict.fromkeys(row["contestant"] for row in rows))


def pivot(rows: list[Result], column: str, cell: Callable[[Result], object]) -> str:
    """Lay out contestants against the values of a column; where there is no row there is a dash."""
    values = list(dict.fromkeys(row[column] for row in rows))
    cells = {(row["contestant"], row[column]): cell(row) for row in rows}
    return markdown(["", *values], ([n, *(cells.get((n, v), "-") for v in values)] for n in names(rows)))


def ratio(row: Result) -> str:
    """Format a median and its quartiles."""
    low, median, high = row["ratio"]
    return f"{median:.2f} ({low:.2f}, {high:.2f})"


def mib(size: float | None) -> str:
    """Format bytes in MiB."""
    return "-" if size is None else f"{size / 2**20:.1f}"


def milliseconds(row: Result) -> str:
    """Format a median time."""
    return f"{1000 * row['seconds'][1]:.4g}"


def time(result: Result, title: str = "Time of a step") -> str:
    """Show medians of times, and medians and quartiles of ratios."""
    rows = result["rows"]
    error = max(row["error"] for row in rows)
    return (
        f"## {title}\n\nRatio to plain in the same round, median and quartiles:\n\n{pivot(rows, 'workload', ratio)}\n\n"
        f"Milliseconds, median:\n\n{pivot(rows, 'workload', milliseconds)}\n\n"
        f"Outputs and gradients agree with plain PyTorch's in float64, with a relative error of {error:.0e} at most."
    )


def overhead(result: Result) -> str:
    """Show the same for the machinery."""
    return time(result, "Overhead: 64 couplings of width 32, batch 8")


def peaks(result: Result) -> str:
    """Show peaks over the start of a step."""
    rows = result["rows"]
    resident = pivot(rows, "workload", lambda row: mib(row["resident"]))
    tensors = pivot(rows, "workload", lambda row: mib(row["peak"]))
    return (
        f"## Peak of a step over its start\n\nResident set of a fresh process, MiB:\n\n{resident}\n\n"
        f"Tensors alone, counted exactly, MiB (kernels and allocators take no part):\n\n{tensors}"
    )


def slope(rows: list[Result], key: str) -> float | None:
    """Return bytes per added coupling, between the second depth and the last."""
    first, last = rows[min(1, len(rows) - 2)], rows[-1]
    if first[key] is None or last[key] is None:
        return None
    return (last[key] - first[key]) / (last["depth"] - first["depth"])


def depth(result: Result) -> str:
    """Show what is held after forward and at the peak, against depth."""
    rows, unit = result["rows"], result["activation"]
    held, peak = (pivot(rows, "depth", lambda row, key=key: f"{row[key] / unit:.2f}") for key in ("held", "peak"))
    slopes = []
    for name in names(rows):
        own = [row for row in rows if row["contestant"] == name]
        values = (slope(own, key) for key in ("held", "peak", "process"))
        slopes.append([name, *("-" if value is None else f"{value:,.0f}" for value in values)])
    header = ["", "tensors held", "tensors at the peak", "all that the process holds"]
    return (
        "## Memory against the number of couplings\n\nA coupling has one subnet here: `AdditiveCoupling(f, g)` is two."
        f"\n\nHeld after forward, in activations of {unit:,} bytes:\n\n{held}\n\nAt the peak, likewise:\n\n{peak}\n\n"
        "Bytes per added coupling of one subnet; the process also holds graphs, random states and Python's objects:"
        f"\n\n{markdown(header, slopes)}"
    )


def flows(result: Result) -> str:
    """Show the flow libraries."""
    sizes, parts = result["sizes"], []
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        times = [[r["contestant"], milliseconds(r), ratio(r)] for r in result["times"] if r["kind"] == kind]
        parts.append(
            f"### {kind}\n\nHeld after the log-likelihood, MiB, against depth:\n\n"
            f"{pivot(rows, 'depth', lambda row: mib(row['held']))}\n\nAt the peak, MiB:\n\n"
            f"{pivot(rows, 'depth', lambda row: mib(row['peak']))}\n\nTime of a step at the largest depth:\n\n"
            f"{markdown(['', 'ms', 'ratio to invzoo store'], times)}"
        )
    text = (
        f"{sizes['features']} features, batch {sizes['batch']}, subnets with two hidden layers of {sizes['hidden']}. "
        "*glow*: norm, learned matrix, affine coupling. *spline*: permutation, coupling by rational quadratic splines "
        f"of {sizes['bins']} bins. Layers and sizes are equal; weights are not, and each library bounds its scales and "
        "parametrises its matrix in its own way. FrEIA 0.2 has no spline."
    )
    return "\n\n".join([f"## Normalizing flows\n\n{text}", *parts])


def scale(result: Result) -> str:
    """Show the deep stack and the large transformer."""
    deep, large = result["deep"], result["transformer"]
    losses = ", ".join(f"{loss:.3f}" for loss in deep["losses"])
    seconds = sorted(deep["seconds"])[len(deep["seconds"]) // 2]
    rows = [row | {"size": f"{row['blocks']} blocks, {row['tokens']:,} tokens"} for row in large["rows"]]
    gib = pivot(rows, "size", lambda row: f"{row['peak'] / 2**30:.2f}")
    held, peak = (f"{deep[key] / deep['activation']:.1f}" for key in ("held", "peak"))
    return (
        f"## Scale\n\n{deep['depth']:,} couplings with {deep['parameters'] / 1e6:.1f} million parameters, trained with "
        f"Adam: loss {losses}; {seconds:.1f} s a step; {held} activations held after forward, {peak} at the peak.\n\n"
        f"A reversible transformer of width {large['width']:,} with {large['parameters'] / 1e9:.2f} billion "
        "parameters in bfloat16, one sample, under `FakeTensorMode`: GiB at the peak, parameters and gradients aside:"
        f"\n\n{gib}"
    )


def grown(row: Result) -> str:
    """Format a peak, but not that of small tensors, which reuse the pages of the steps before."""
    return "-" if row["workload"] == "overhead" else mib(row["peak"])


def compiled(result: Result) -> str:
    """Show what the compiler makes of the stack."""
    header = ["", "step / plain", "step, ms", "first step, s", "held after forward, MiB", "peak of a step, MiB"]
    columns = (ratio, milliseconds, lambda r: f"{r['first']:.3g}", lambda r: mib(r["held"]), grown)
    parts = []
    for name in dict.fromkeys(row["workload"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["workload"] == name]
        cells = ([row["contestant"], *(column(row) for column in columns)] for row in rows)
        parts.append(f"### {name}, {rows[0]['depth']} couplings\n\n{markdown(header, cells)}")
    error = max(row["error"] for row in result["rows"])
    text = (
        "Stacks under `torch.compile(fullgraph=True)`. What is held is all that the process allocates and keeps, the "
        "peak that of its resident set over its start (not of the small tensors of *overhead*, which reuse pages); a "
        "compiled backward holds the gradients of all weights until it is done. *overhead* is timed with one thread. "
        f"Outputs and gradients agree with plain PyTorch's, in float32, with a relative error of {error:.0e} at most."
    )
    return "\n\n".join([f"## Under the compiler\n\n{text}", *parts])


def precision(result: Result) -> str:
    """Show the errors of half precision."""
    errors = ("output", "input", "gradient", "gradient in store")
    rows = ([row["kind"], row["precision"], *(f"{row[name]:.1e}" for name in errors)] for row in result["rows"])
    return (
        f"## Precision\n\nRelative error against float64 after {result['setting']['depth']} couplings: of the output, "
        "of the input rebuilt from it, and of the weights' gradients in the modes invert and store. With bfloat16 "
        f"subnets the weights themselves are rounded first.\n\n{markdown(['', '', *errors], rows)}"
    )


def accelerator(result: Result) -> str:
    """Show times and peaks on an accelerator."""
    rows = [row | {"workload": f"{row['workload']}, {row['dtype']}"} for row in result["rows"]]
    done, failed = [row for row in rows if "failed" not in row], [row for row in rows if "failed" in row]
    error = max(row["error"] for row in done)
    failures = [f"{row['contestant']} fails on *{row['workload']}*: {row['failed']}" for row in failed]
    parts = (
        f"## On an accelerator: {result['device']}",
        "Time as a ratio to plain in the same round, median and quartiles (bfloat16 by autocast, inputs in float32):",
        pivot(done, "workload", ratio),
        "Milliseconds, median:",
        pivot(done, "workload", milliseconds),
        "Peak of the memory in use over its start, as the allocator counts it, MiB:",
        pivot(done, "workload", lambda row: mib(row["peak"])),
        f"Outputs and gradients agree with plain PyTorch's in float64, with a relative error of {error:.0e} at most.",
        *failures,
    )
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[Result], str]] = {
    "time": time,
    "overhead": overhead,
    "peaks": peaks,
    "depth": depth,
    "flows": flows,
    "scale": scale,
    "compile": compiled,
    "precision": precision,
    "accelerator": accelerator,
}


def summary(times: Result, memory: Result) -> str:
    """Show time and peak side by side, for the README."""
    cells = {(row["contestant"], row["workload"]): mib(row["resident"]) for row in memory["rows"]}
    rows = [row | {"workload": f"{row['workload']}"} for row in times["rows"]]
    text = pivot(rows, "workload", lambda r: f"{r['ratio'][1]:.2f}, {cells.get((r['contestant'], r['workload']), '-')}")
    return (
        f"Time of a step as a ratio to plain PyTorch's, and peak of the resident set over its start in MiB:\n\n{text}"
    )
