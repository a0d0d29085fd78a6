"""The command line of the benchmarks."""

import argparse

import torch

from . import accelerator, compiled, depth, flows, peaks, precision, report, scale, timing
from .tables import TABLES

__all__ = ["main"]

CASES = {
    "time": timing.run,
    "overhead": timing.run_overhead,
    "peaks": peaks.run,
    "depth": depth.run,
    "flows": flows.run,
    "scale": scale.run,
    "compile": compiled.run,
    "precision": precision.run,
    "accelerator": accelerator.run,
}


def main() -> None:
    """Run the chosen cases; a full run writes their JSON, the tables and the picture."""
    description = "Measure what memory and time invertible stacks take, by InvZoo and by everybody else; write tables."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    choices = ", ".join(CASES)
    parser.add_argument(
        "cases", nargs="*", metavar="case", help=f"{choices} (default: all that can run here), or report: tables alone"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, about a minute, writes nothing")
    arguments = parser.parse_args()
    here = [case for case in CASES if arguments.smoke or case != "accelerator" or accelerator.available()]
    cases = arguments.cases or here
    if unknown := set(cases) - {*CASES, "report"}:
        parser.error(f"Expected cases among {choices} and report; got {', '.join(sorted(unknown))}")
    if arguments.smoke:
        torch.set_num_threads(1)
    for case in [case for case in cases if case != "report"]:
        result = CASES[case](smoke=arguments.smoke)
        print(TABLES[case](result), end="\n\n", flush=True)
        if not arguments.smoke:
            report.save(case, result)
    if not arguments.smoke:
        report.write(picture=not {"depth", "report"}.isdisjoint(cases))


if __name__ == "__main__":
    main()
