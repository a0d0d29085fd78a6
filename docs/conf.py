"""How Sphinx builds these pages, and what they take from the catalogue of layers.

``.. layers:: couplings`` makes a table of the layers of that family, a file of ``invzoo/testing/catalogue/``, and then
the reference of each; ``.. layers::`` alone makes the table of all. A public name of the library that no page documents
is a warning, and the build lets none pass.
"""

from importlib import import_module, metadata

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import invzoo as iz

__all__ = ["setup"]

project = "InvZoo"
author = "The InvZoo authors"
release = metadata.version("invzoo")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
default_role = "literal"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["invzoo.css"]
html_copy_source = False

autodoc_inherit_docstrings = False  # a method of a layer without a docstring does what its base class says
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Reference", "References")]

# Every reference must lead somewhere. Those that lead out of the library are no links here, since their targets are
# lists that a build without a network cannot read; and annotations name a few types that are not public.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!invzoo\b)[\w.]*"),
    (r"py:.*", r"invzoo\.(layers|engine)\b[\w.]*"),
]

HEAD = ("layer", "map", "log-determinant", "inverse", "context", "domain", "kept in mode ``invert``")


class Layers(SphinxDirective):
    """The catalogue's table of a family, and the reference of its layers; or the table of all."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        families = [import_module(f"invzoo.testing.catalogue.{name}") for name in self.arguments]
        entries = [entry for family in families for entry in getattr(family, family.__all__[0])]
        table = [".. list-table::", "   :header-rows: 1", "   :class: layers", "", *_row(HEAD)]
        table += [line for entry in entries or iz.testing.CATALOGUE for line in _row(_cells(entry))]
        reference = [f"\n.. autoclass:: invzoo.{entry.name}\n   :members:" for entry in entries]
        return self.parse_text_to_nodes("\n".join([*table, *reference]))


def _cells(entry: iz.testing.Entry) -> tuple[str, ...]:
    context = "yes" if entry.conditioned else "no"
    layer, map_, log_det = f":class:`~invzoo.{entry.name}`", f"``{entry.map}``", f"``{entry.log_det}``"
    return layer, map_, log_det, entry.cost, context, entry.domain, entry.keeps


def _row(cells: tuple[str, ...]) -> list[str]:
    first, *others = cells
    return [f"   * - {first}", *(f"     - {cell}" for cell in others)]


def _check_names(_app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that no page documents."""
    documented = env.get_domain("py").objects
    public = [f"invzoo.{name}" for name in iz.__all__] + [f"invzoo.testing.{name}" for name in iz.testing.__all__]
    for name in public:
        if name not in documented:
            logging.getLogger(__name__).warning("Expected every public name to be documented; got none for %s", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add what the catalogue says."""
    app.add_directive("layers", Layers)
    app.connect("env-check-consistency", _check_names)
    return {"parallel_read_safe": True}
