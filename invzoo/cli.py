"""The command line: ``invzoo demo``, ``invzoo zoo`` and ``invzoo check``, or ``python -m invzoo demo``.

It exits with 0 for success, 1 for a failure, 2 for a usage error and 130 where it was interrupted.
"""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import invzoo as iz

from . import testing
from .domains import of_each
from .engine import Mode
from .module import InvertibleModule
from .testing.catalogue import tables

__all__ = ["main"]

Row = tuple[str, ...]

_PICTURES = (".png", ".pdf", ".svg")
_DEMO_NEEDS = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: after ``--help`` and ``--version``, and with code 2 for a usage error.
    """
    arguments = vars(_parser().parse_args(argv))
    command, run = arguments.pop("command"), arguments.pop("run")
    try:
        return run(**arguments) or 0
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)
    except _UsageError as error:
        return _fail(command, str(error), 2)
    except (RuntimeError, OSError) as error:
        return _fail(command, "\n".join([str(error), *getattr(error, "__notes__", ())]))


class _UsageError(Exception):
    """What is wrong with the arguments, where it shows only when they are used."""


def _fail(command: str, message: str, code: int = 1) -> int:
    print(f"invzoo {command}: error: {message}", file=sys.stderr)
    return code


def _demo(*, mode: list[str], **arguments: Any) -> None:
    try:
        from . import demo  # noqa: PLC0415 - its dependencies are an extra that other commands do without
    except ModuleNotFoundError as error:
        if error.name not in _DEMO_NEEDS:
            raise
        raise RuntimeError(f"the demo needs {_DEMO_NEEDS[error.name]}; pip install invzoo[demo]") from error
    demo.run(modes=[m for m in Mode if m in mode or "all" in mode], **arguments)


def _zoo(*, markdown: bool) -> None:
    if markdown:
        print(tables())
        return
    rows = [
        (e.name, e.map, e.log_det, e.cost, "yes" if e.conditioned else "no", e.domain, e.keeps)
        for e in testing.CATALOGUE
    ]
    _print_table(("layer", "map", "log-det", "inverse", "context", "domain", "kept in mode invert"), rows)


def _print_table(head: Row, rows: Sequence[Row]) -> None:
    """Print a table with rich if it is installed, and else in columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    try:
        from rich import box, console, table, text  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        for row in (head, *rows):
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        return
    printed = table.Table(*head, box=box.SIMPLE_HEAD)
    printed.columns[0].no_wrap = True
    for row in rows:
        printed.add_row(*map(text.Text, row))
    printer = console.Console()
    if not printer.is_terminal:  # a file is as wide as the table
        printer = console.Console(width=sum(width + 4 for width in widths))
    printer.print(printed)


def _check(
    *,
    factory: str,
    shape: list[testing.Shape],
    side: list[tuple[str, testing.Shape]],
    dtype: torch.dtype,
    seed: int,
    without: list[tuple[str, str]],
) -> int:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = _build(factory).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    domains = of_each(layer.domain, len(shape))
    if len(domains) != len(shape):
        raise _UsageError(f"argument --shape: expected {len(domains)} of them, as the layer's domain; got {len(shape)}")
    inputs = [testing.draw_from(d, s, generator).to(dtype) for d, s in zip(domains, shape, strict=True)]
    sides = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in side}
    try:
        assertions = testing.assertions_of(layer, *inputs, without=dict(without), **sides)
    except ValueError as error:
        raise _UsageError(f"argument --without: {error}") from None
    failures = [name for name, run in assertions.items() if not _passes(name, run)]
    for name, reason in without:
        print(f"left out  {name}: {reason}")
    print(f"{len(assertions) - len(failures)} of {len(assertions)} assertions hold for {type(layer).__name__}")
    return 1 if failures else 0


def _build(spec: str) -> InvertibleModule:
    """Import ``module:name``, which is a layer or makes one."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())  # as for `python -m`, so that a user's own modules are found
    try:
        made = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        layer = made() if callable(made) and not isinstance(made, InvertibleModule) else made
    except Exception as error:
        raise _UsageError(f"argument module:name: cannot build {spec!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(layer, InvertibleModule):
        raise _UsageError(f"argument module:name: expected an InvertibleModule, or what makes one; got {layer!r}")
    return layer


def _passes(name: str, run: Callable[[], None]) -> bool:
    try:
        run()
    except AssertionError as error:
        print(f"FAILED    {name}: {' '.join(str(error).split())}")
        return False
    print(f"ok        {name}")
    return True


def _parser() -> argparse.ArgumentParser:
    version = getattr(iz, "__version__", "from source, not installed")
    parser = argparse.ArgumentParser(
        prog="invzoo", description="Invertible PyTorch modules that free their activations."
    )
    parser.add_argument("--version", action="version", version=f"invzoo {version}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_demo(commands)
    _add_zoo(commands)
    _add_check(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="train a deep reversible net in every mode and compare memory, time and accuracy",
        description="Train a deep reversible convolutional classifier on scikit-learn's digits in the modes store, "
        "recompute and invert, side by side from the same seed. Compare their gradients, memory, time and accuracy, "
        "and draw memory against depth. Exits with 1 if gradients differ between modes.",
    )
    demo.set_defaults(run=_demo)
    add = demo.add_argument
    add("--depth", type=_positive, default=100, help="couplings in the net (default: %(default)s)")
    add("--mode", nargs="+", choices=[*map(str, Mode), "all"], default=["all"], help="modes to train in (default: all)")
    add("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    add("--epochs", type=_positive, default=8, help="passes over the training images (default: %(default)s)")
    add("--batch-size", type=_positive, default=48, help="images per step (default: %(default)s)")
    add("--seed", type=_seed, default=0, help="of the weights and the order of the images (default: %(default)s)")
    add("--picture", type=_picture, default="invzoo-demo.png", help="file to draw in (default: %(default)s)")


def _add_zoo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    zoo = commands.add_parser(
        "zoo",
        help="list the layers: map, log-determinant, cost of the inverse, context, domain, and what stays in memory",
        description="List every layer of the library: its map, its log-determinant (none, if it is no bijection), the "
        "cost of its inverse in runs of the forward, whether it takes a context, the values that it takes, and what "
        "each call keeps in mode invert.",
    )
    zoo.add_argument("--markdown", action="store_true", help="print the tables of the README, family by family")
    zoo.set_defaults(run=_zoo)


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    check = commands.add_parser(
        "check",
        help="check a layer of yours: inverse, log-determinant, gradients, modes, memory, dtypes and more",
        description="Build a layer, draw inputs in its domain, and make the assertions of "
        "invzoo.testing.assert_invertible, one line for each. Exits with 1 if one fails.",
    )
    check.set_defaults(run=_check)
    add = check.add_argument
    add("factory", type=_factory, metavar="module:name", help="a layer, or a class or function that makes one")
    what = "of an input, with the batch (at least 2): 4,8,16,16; once for each input"
    add("--shape", type=_batch, action="append", required=True, help=what)
    what = "name and shape of a side input: context=4,8; once for each"
    add("--side", type=_side, action="append", default=[], metavar="NAME=SHAPE", help=what)
    add("--dtype", type=_dtype, default="float64", help="of weights and inputs (default: %(default)s)")
    add("--seed", type=_seed, default=0, help="of the weights and the inputs (default: %(default)s)")
    what = "leave an assertion out, and say why: assert_memory='it caches its weights'; once for each"
    add("--without", type=_reason, action="append", default=[], metavar="ASSERTION=REASON", help=what)


def _expect(condition: bool, what: str, text: str) -> None:
    if not condition:
        raise argparse.ArgumentTypeError(f"expected {what}; got {text!r}")


def _factory(text: str) -> str:
    module, _, name = text.partition(":")
    _expect(bool(module and name), "package.module:name", text)
    return text


def _shape(text: str) -> testing.Shape:
    sizes = text.split(",")
    _expect(all(size.isdecimal() and int(size) > 0 for size in sizes), "sizes such as 4,8,16,16", text)
    return tuple(map(int, sizes))


def _batch(text: str) -> testing.Shape:
    shape = _shape(text)
    _expect(shape[0] > 1, "a batch of at least 2", text)  # one sample cannot show that samples depend on each other
    return shape


def _side(text: str) -> tuple[str, testing.Shape]:
    name, _, sizes = text.partition("=")
    _expect(name.isidentifier(), "a name and a shape such as context=4,8", text)
    return name, _shape(sizes)


def _dtype(text: str) -> torch.dtype:
    dtypes = {"float64": torch.float64, "float32": torch.float32}
    _expect(text in dtypes, f"one of {', '.join(dtypes)}", text)
    return dtypes[text]


def _reason(text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    _expect(bool(reason.strip()), "an assertion and the reason to leave it out", text)
    return name, reason.strip()


def _positive(text: str) -> int:
    _expect(text.isdecimal() and int(text) > 0, "a positive integer", text)
    return int(text)


def _seed(text: str) -> int:
    _expect(text.isdecimal() and int(text) < 2**63, "an integer from 0 to 2**63 - 1", text)
    return int(text)


def _device(text: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    counts = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a device such as {' or '.join(counts)}; got {text!r}") from None
    if (device.index or 0) >= counts.get(device.type, 0):
        here = ", ".join(f"{name}:{i}" if n > 1 else name for name, n in counts.items() for i in range(n))
        raise argparse.ArgumentTypeError(f"device {text!r} is not available; this machine has {here}")
    return device


def _picture(text: str) -> Path:
    path = Path(text)
    _expect(path.suffix.lower() in _PICTURES, f"a name that ends in {', '.join(_PICTURES)}", text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such directory: {path.parent}")
    return path
