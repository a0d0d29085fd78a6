"""The command line of the benchmarks."""

import argparse

from . import depth, report, timing

__all__ = ["main"]


def main() -> None:
    """Run the chosen cases; a full run writes their JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help="depth, time (default: both)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few seconds, writes nothing")
    arguments = parser.parse_args()
    cases = arguments.cases or ["depth", "time"]
    if unknown := set(cases) - {"depth", "time"}:
        parser.error(f"Expected cases among depth and time; got {', '.join(sorted(unknown))}")
    if "depth" in cases:
        result = depth.run(depth.SMOKE if arguments.smoke else depth.FULL)
        report.show_depth(result)
        if not arguments.smoke:
            report.save("depth", result)
            report.draw()
    if "time" in cases:
        result = timing.run(timing.SMOKE if arguments.smoke else timing.FULL)
        report.show_timing(result)
        if not arguments.smoke:
            report.save("time", result)


if __name__ == "__main__":
    main()
