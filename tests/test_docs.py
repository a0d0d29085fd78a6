"""The documentation names every public name, cites tests that exist, and its examples run; no Sphinx is needed."""

import ast
import doctest
import pathlib
import re

import pytest
import torch
from torch import nn

import invzoo as iz

ROOT = pathlib.Path(iz.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.rst") if "_build" not in path.parts)
PAGE = [pytest.param(page, id=str(page.relative_to(DOCS))) for page in PAGES]
FAMILIES = {name.lower() for name in vars(iz.testing.catalogue) if name.isupper()} - {"catalogue", "families"}


def documented() -> list[str]:
    """Return the names that pages document, those of layers aside."""
    directive = r"^\.\. (?:autoclass|autofunction|automodule|py:data):: (\S+)"
    return [name for page in PAGES for name in re.findall(directive, page.read_text(), re.MULTILINE)]


def test_every_public_name_is_documented_once():
    layers = {entry.name for entry in iz.testing.CATALOGUE}
    public = {f"invzoo.{name}" for name in iz.__all__ if name not in layers}
    public |= {f"invzoo.testing.{name}" for name in iz.testing.__all__}
    names = documented()
    assert public <= {*names}
    assert len(names) == len({*names})


def test_every_family_of_layers_has_its_page():
    pages = {page.stem: page.read_text() for page in PAGES if page.parent.name == "layers"}
    index = pages.pop("index")
    assert {*pages} == FAMILIES
    for name, text in pages.items():
        assert re.findall(r"^\.\. layers:: (\w+)$", text, re.MULTILINE) == [name]
    assert re.search(r"^\.\. layers::$", index, re.MULTILINE)


@pytest.mark.parametrize("page", PAGE)
def test_every_test_that_a_page_cites_exists(page: pathlib.Path):
    for path, name in re.findall(r"``(tests/\S+?\.py)(?:::(\w+))?``", page.read_text()):
        tree = ast.parse((ROOT / path).read_text())
        assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, path


@pytest.mark.parametrize("page", PAGE)
def test_examples_run(page: pathlib.Path):
    found = doctest.testfile(str(page), module_relative=False, globs={"iz": iz, "torch": torch, "nn": nn})
    assert found.failed == 0
