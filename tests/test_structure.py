"""Imports only go down, files declare what they offer, and the README's table names every layer."""

import ast
import pathlib
import subprocess
import sys

import pytest

import invzoo as iz

ROOT = pathlib.Path(iz.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ORDER = [
    "errors",
    "dtypes",
    "domains",
    "log_dets",
    "engine",
    "compiling",
    "options",
    "invtorch",
    "own_hooks",
    "protocol",
    "module",
]
ORDER += ["layers", "shapes", "containers", "blocks", "flows", "testing", "demo", "cli", "__main__"]
GROUND = ["_torch", "eagerly", "uncompiled", "nested", "policy", "operation", "signatures", "fingerprint", "state"]


def level(parts):
    return ORDER.index(parts[0].removesuffix(".py"))


def imported(path):
    """Yield the parts below the package of every module that a file imports, those for type checkers among them."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = tuple((node.module or "").split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, *module, *(() if module else (alias.name,)))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not [name for name in names if name.startswith(f"{ROOT.name}.")], (
                f"{path} imports a file by its name"
            )


def below(parts, edges):
    """Return all that a module imports, what that imports, and so on."""
    found, todo = set(), [parts]
    while todo:
        new = edges.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def test_no_file_and_no_family_imports_itself_by_others():
    files = {path.relative_to(ROOT).with_suffix("").parts: {*imported(path)} for path in FILES}
    families = {}
    for own, others in files.items():
        if own[0] == "layers" and len(own) == 3:
            families.setdefault(own[1], set()).update(o[1] for o in others if o[0] == "layers" and len(o) == 3)
    families = {family: others - {family} for family, others in families.items()}
    for edges in (files, families):
        assert [own for own in edges if own in below(own, edges)] == []


def test_the_engines_ground_imports_nothing_above_it_and_its_wings_not_each_other():
    for path in (ROOT / "engine").rglob("*.py"):
        own = path.relative_to(ROOT).with_suffix("").parts
        others = {other for other in imported(path) if other[:1] == ("engine",)}
        if own[1] in GROUND:
            assert all(other[1] in GROUND for other in others), own
        if own[1] == "surroundings":
            assert all(other[1] in (*GROUND, "surroundings") for other in others), own
        if own[1] in ("eager", "compiled"):
            assert ("engine", "dispatch") not in others, own
        for wing, other_wing in (("eager", "compiled"), ("compiled", "eager")):
            assert own[1] != wing or not [other for other in others if other[1] == other_wing], own


def test_layers_come_to_the_engine_by_its_door():
    assert [
        (path.name, o) for path in (ROOT / "layers").rglob("*.py") for o in imported(path) if o[0] == "engine" and o[1:]
    ] == []


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
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    assert [c.name for c in classes if c.end_lineno - c.lineno >= 200] == []


COMPILER = """
import sys, invzoo as iz, invzoo.testing, torch
iz.InvertibleSequential(iz.AdditiveCoupling(torch.nn.Linear(2, 2)))(torch.randn(3, 4)).sum().backward()
sys.exit("torch._dynamo" in sys.modules)
"""
NUMPY = """
import sys
sys.modules["numpy"] = None
import invzoo as iz, torch
from torch import nn
net = iz.InvertibleSequential(*(iz.AdditiveCoupling(nn.Sequential(nn.Linear(2, 2), nn.Dropout())) for _ in range(3)))
net(torch.randn(3, 4)).sum().backward()
"""


@pytest.mark.parametrize("code", [COMPILER, NUMPY], ids=["compiler", "numpy"])
def test_a_step_does_without(code):
    """To import the compiler takes longer than all of this package; torch does without numpy, replays of noise too."""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0  # noqa: S603
