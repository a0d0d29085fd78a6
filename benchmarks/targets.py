"""What was to be reached, what is reached, and why not where it is not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .contestants import PEERS
from .tables import markdown, names, slope

__all__ = ["table"]

Results = dict[str, dict[str, Any]]
OURS = "invzoo invert"
COMPILED = f"{OURS}, compiled"


@dataclass(frozen=True)
class Target:
    """A figure that is to be at most `limit`, or is shown alone; `case` says whose results it is read from."""

    title: str
    case: str
    limit: float | None
    value: Callable[[dict[str, Any]], float | None]
    reason: str = "open"  # shown if it is missed
    unit: str = ""


def to_plain(*workloads: str, name: str = OURS) -> Callable[[dict[str, Any]], float]:
    """Return the largest median ratio to plain over some workloads."""
    return lambda result: max(_ratio(result, w, name) for w in workloads)


def to(*others: str, name: str = OURS) -> Callable[[dict[str, Any]], float | None]:
    """Return the largest quotient, over workloads, of our median ratio and the least of others'."""

    def value(result: dict[str, Any]) -> float | None:
        present = [n for n in others if n in names(result["rows"])]
        workloads = {row["workload"] for row in result["rows"]}
        quotients = [_ratio(result, w, name) / min(_ratio(result, w, n) for n in present) for w in workloads if present]
        return max(quotients, default=None)

    return value


def resident(workload: str) -> Callable[[dict[str, Any]], float | None]:
    """Return our peak of the resident set, in MiB."""

    def value(result: dict[str, Any]) -> float | None:
        size = next(r["resident"] for r in result["rows"] if (r["workload"], r["contestant"]) == (workload, OURS))
        return size if size is None else size / 2**20

    return value


def per_layer(key: str) -> Callable[[dict[str, Any]], float | None]:
    """Return our bytes per added coupling."""
    return lambda result: slope([row for row in result["rows"] if row["contestant"] == OURS], key)


def against_libraries(result: dict[str, Any]) -> float | None:
    """Return the largest quotient, over the kinds of flows, of our held bytes and the best library's."""
    quotients = []
    for kind in {row["kind"] for row in result["rows"]}:
        rows = [row for row in result["rows"] if row["kind"] == kind]
        held = {row["contestant"]: row["held"] for row in rows if row["depth"] == rows[-1]["depth"]}
        quotients += [held[OURS] / size for name, size in held.items() if not name.startswith("invzoo")]
    return max(quotients, default=None)


def _ratio(result: dict[str, Any], workload: str, name: str) -> float:
    return next(r["ratio"][1] for r in result["rows"] if (r["workload"], r["contestant"]) == (workload, name))


MATMULS = (
    "A subnet of two equal matmuls (or convolutions) costs plain PyTorch 6 of them a step, checkpoint 7, as it stops "
    "before the last, and any reversible net 8, as the inverse needs the subnet's value: {}, where they take the time."
)
TO_PLAIN, TO_CHECKPOINT = MATMULS.format("8/6 = 1.33"), MATMULS.format("8/7 = 1.14")
CROSSINGS = (
    "Bound by Python: each tensor that autograd saves crosses from C++ to Python and back, and each call looks up what "
    "a replay must find again. The compiler takes both away."
)
CHECKS = "The forward makes the real graph, and each call keeps and compares what a replay must find, in Python."
OBJECTS = (
    "About half of it is the autograd graph, which plain PyTorch has as well (what its process holds beyond tensors), "
    "the rest are Python's objects: handles of what autograd saves, and what a replay must find again."
)

TARGETS = (
    Target("linear and transformer, step / plain", "time", 1.15, to_plain("linear", "transformer"), TO_PLAIN),
    Target("convolutional, step / plain", "time", 1.08, to_plain("conv"), TO_PLAIN),
    Target("each case, step / torch checkpoint", "time", 0.97, to("torch checkpoint"), TO_CHECKPOINT),
    Target("each case, step / fastest reversible peer", "time", 1.0, to(*PEERS), CHECKS),
    Target("linear, peak over start", "peaks", 45, resident("linear"), unit=" MiB"),
    Target("convolutional, peak over start", "peaks", 72, resident("conv"), unit=" MiB"),
    Target("overhead, step / plain", "overhead", 1.7, to_plain("overhead"), CROSSINGS),
    Target("overhead, step / fastest reversible peer", "overhead", 1.0, to(*PEERS), CROSSINGS),
    Target("overhead, compiled step / plain", "compile", 1.7, to_plain("overhead", name=COMPILED)),
    Target("each case, compiled step / compiled plain", "compile", None, to("plain, compiled", name=COMPILED)),
    Target("tensors held per added coupling of one subnet", "depth", 0, per_layer("held"), unit=" bytes"),
    Target("tensors at the peak, likewise", "depth", 0, per_layer("peak"), unit=" bytes"),
    Target("all that the process holds, likewise", "depth", 4096, per_layer("process"), OBJECTS, " bytes"),
    Target("flows at depth 32, held / best library", "flows", 1 / 20, against_libraries),
)


def table(results: Results) -> str:
    """Lay out targets, what is reached, and reasons."""
    return markdown(
        ["", "target", "reached", "why not"], [_row(target, results.get(target.case)) for target in TARGETS]
    )


def _row(target: Target, result: dict[str, Any] | None) -> list[str]:
    value = None if result is None else target.value(result)
    limit = "-" if target.limit is None else f"<= {target.limit:.4g}{target.unit}"
    if value is None:
        return [target.title, limit, "not measured", ""]
    reached = f"{value:,.0f}{target.unit}" if value >= 100 else f"{value:.4g}{target.unit}"
    if target.limit is None or value <= target.limit:
        return [target.title, limit, reached, ""]
    return [target.title, limit, f"**{reached}**", target.reason]
