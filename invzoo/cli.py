"""The command line: ``invzoo demo``, or ``python -m invzoo demo``.

It exits with 0 for success, 1 for a failure, 2 for a usage error and 130 where it was interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .engine import Mode

__all__ = ["main"]

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
        run(**arguments)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)
    except (RuntimeError, OSError) as error:
        return _fail(command, "\n".join([str(error), *getattr(error, "__notes__", ())]))
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="invzoo", description="Invertible PyTorch modules that free their activations."
    )
    parser.add_argument("--version", action="version", version=f"invzoo {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_demo(commands)
    return parser


def _version() -> str:
    try:
        return version("invzoo")
    except PackageNotFoundError:
        return "from source, not installed"


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
    add("--mode", nargs="+", choices=[*Mode, "all"], default=["all"], help="modes to train in (default: all)")
    add("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    add("--epochs", type=_positive, default=8, help="passes over the training images (default: %(default)s)")
    add("--batch-size", type=_positive, default=48, help="images per step (default: %(default)s)")
    add("--seed", type=_seed, default=0, help="of the weights and the order of the images (default: %(default)s)")
    add("--picture", type=_picture, default="invzoo-demo.png", help="file to draw in (default: %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer; got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1; got {text!r}")
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
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(_PICTURES)}; got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such directory: {path.parent}")
    return path
