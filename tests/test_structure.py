"""Imports only go down, files declare what they offer, and the README's table names every layer."""

import ast
import pathlib
import subprocess
import sys

import pytest
import torch

import invzoo as iz

ROOT = pathlib.Path(iz.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ORDER = ["errors", "domains", "log_dets", "engine", "contract", "own_hooks", "module", "layers", "shapes"]
ORDER += ["containers", "blocks"]
ORDER += ["flows", "testing", "demo", "cli", "__main__"]


def level(parts):
    return ORDER.index(parts[0].removesuffix(".py"))


def imported(path):
    """Yield the parts below the package of every module that a file imports, those for type checkers aside."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = tuple((node.module or "").split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, *module, *(() if module else (alias.name,)))


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent != ROOT], ids=str)
def test_imports_only_go_down(path):
    own = path.relative_to(ROOT).parts
    for other in imported(path):
        if other:
            assert level(other) < level(own) or other[0] == own[0], f"{'/'.join(own)} imports {'.'.join(other)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_declares_what_it_offers(path):
    names = {
        target.id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert "__all__" in names or path.name == "__main__.py" or not ast.parse(path.read_text()).body[1:]
    assert len(path.read_text().splitlines()) < (300 if "layers" in path.parts else 500) + 50


def test_importing_leaves_the_compiler_alone():
    """It takes longer to import than all of this package; and a step does without it too."""
    code = """
import sys, invzoo as iz, invzoo.testing, torch
iz.InvertibleSequential(iz.AdditiveCoupling(torch.nn.Linear(2, 2)))(torch.randn(3, 4)).sum().backward()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0  # noqa: S603


def test_a_step_leaves_the_compiler_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "invzoo.engine.compile_time", None)
    iz.InvertibleSequential(iz.AdditiveCoupling(torch.nn.Linear(2, 2)))(torch.randn(3, 4)).sum().backward()


def test_numpy_is_not_needed():
    """torch does without it, and so does a step that replays random numbers."""
    code = """
import sys
sys.modules["numpy"] = None
import invzoo as iz, torch
from torch import nn
net = iz.InvertibleSequential(*(iz.AdditiveCoupling(nn.Sequential(nn.Linear(2, 2), nn.Dropout())) for _ in range(3)))
net(torch.randn(3, 4)).sum().backward()
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0  # noqa: S603


def test_the_readme_names_every_layer():
    table = (ROOT.parent / "README.md").read_text().split("## Layers")[1].split("##")[0]
    named = {row.split("`")[1] for row in table.splitlines() if row.startswith("| `")}
    layers = {
        name
        for name in iz.__all__
        if isinstance(value := getattr(iz, name), type) and issubclass(value, iz.InvertibleModule)
    }
    assert named == layers - {"InvertibleModule"}
