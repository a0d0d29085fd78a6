"""The catalogue, `__all__` and the README's table name the same layers and say the same of them."""

import pathlib

import pytest

import invzoo as iz
from invzoo.module import Composite
from invzoo.testing import CATALOGUE
from invzoo.testing.catalogue import tables

ENTRIES = [pytest.param(entry, id=entry.name) for entry in CATALOGUE]


def public_layers():
    values = (getattr(iz, name) for name in iz.__all__)
    return {value for value in values if isinstance(value, type) and issubclass(value, iz.InvertibleModule)}


def test_every_layer_has_an_entry():
    assert {entry.layer for entry in CATALOGUE} == public_layers() - {iz.InvertibleModule}


def test_the_readme_has_the_tables_of_the_catalogue():
    readme = (pathlib.Path(iz.__file__).parent.parent / "README.md").read_text()
    assert tables() in readme, "write them anew: invzoo zoo --markdown"


def test_every_class_has_one_entry():
    assert len({entry.layer for entry in CATALOGUE}) == len(CATALOGUE)


def test_names_of_cases_differ():
    names = [case.name for case in iz.testing.cases()]
    assert len(set(names)) == len(names) > len(CATALOGUE)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_layer_is_tested(entry):
    assert entry.cases
    for case in entry.cases:
        assert any(type(module) is entry.layer for module in case.layer().modules())
        assert case.layer().mode in {"invert", None}


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_kept_and_costs_is_true_of_the_class(entry):
    layers = [case.layer() for case in entry.cases]
    keeps_input = {layer.saturating or layer.slow_inverse for layer in layers if not isinstance(layer, Composite)}
    if keeps_input:
        assert ("its input" in entry.keeps) == any(keeps_input), entry.keeps
    assert not entry.map.isspace()
    assert entry.cost


@pytest.mark.parametrize("entry", ENTRIES)
def test_log_det_is_none_for_what_has_none(entry):
    for case in entry.cases:
        layer, inputs, side = case.layer(), case.inputs(), case.side_inputs()
        if layer.volume_preserving:
            continue
        try:
            layer.forward_and_log_det(*inputs, **side)
        except TypeError:
            assert "none" in entry.log_det or "wide" in case.id, case
        else:
            assert entry.log_det != "none", case


def test_every_assertion_that_is_left_out_has_a_reason():
    for case in iz.testing.cases():
        for name, reason in case.allowances.get("without", {}).items():
            assert name in {assertion.__name__ for assertion in iz.testing.ASSERTIONS}
            assert len(reason.split()) > 2, f"{case}: {reason}"
