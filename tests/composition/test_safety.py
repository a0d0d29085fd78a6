"""Weights travel as tensors alone, a hostile file runs no code, and the package calls neither programs nor machines.

That every layer's state is loaded strictly and with ``weights_only=True`` into the same values is part of
`iz.testing.assert_portable`, which `tests/testing/test_catalogue.py` runs on every case.
"""

import ast
import io
import os
import pathlib
import pickle
import socket

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from invzoo.engine import tuple_of

CASES = {case.name: case for case in iz.testing.cases()}
ROOT = pathlib.Path(iz.__file__).parent


# ---- files ----------------------------------------------------------------------------------------------------------


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_a_checkpoint_of_a_training_is_tensors_alone_and_loaded_with_weights_only():
    """Behind a step of every layer, so that what a step leaves behind is in it too."""
    net = nn.ModuleList(case.layer() for case in CASES.values())
    for layer, case in zip(net, CASES.values(), strict=True):
        for y in tuple_of(layer(*case.inputs(), **case.side_inputs())):
            if y.requires_grad:
                y.sum().backward(retain_graph=True)
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.step()
    assert all(type(value) in (Tensor, nn.Parameter) for value in net.state_dict().values())
    checkpoint = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    loaded = torch.load(saved(checkpoint), weights_only=True)
    net.load_state_dict(loaded["net"], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["alone", "among weights", "by pickle"])
def test_a_hostile_file_is_refused(tmp_path: pathlib.Path, place: str):
    planted = Hostile(tmp_path / "ran")
    layer = iz.InvertibleLinear(4)
    if place == "by pickle":
        file = io.BytesIO(pickle.dumps(planted, protocol=2))
    else:
        file = saved(planted if place == "alone" else {**layer.state_dict(), "weight": planted})
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        layer.load_state_dict(torch.load(file, weights_only=True))
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_the_hostile_file_would_have_run(tmp_path: pathlib.Path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_whole_module_is_code_and_refused_by_default():
    """State dicts are the way to exchange weights; torch asks for ``weights_only=False`` to load a pickled module."""
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(saved(iz.AdditiveCoupling(nn.Linear(2, 2))))


# ---- the package ----------------------------------------------------------------------------------------------------

# Modules that reach other programs, other machines, or code in files.
FORBIDDEN_MODULES = frozenset(
    """aiohttp asyncio cffi cloudpickle code ctypes dill ftplib http httpx huggingface_hub joblib marshal
    multiprocessing pty requests runpy shelve smtplib socket ssl subprocess telnetlib torch.hub
    torch.utils.cpp_extension torch.utils.model_zoo urllib xmlrpc""".split()  # noqa: SIM905 - a list of words
)
FORBIDDEN_CALLS = frozenset(
    """eval exec compile __import__ import_module importlib.import_module os.system os.popen os.startfile pickle.load
    pickle.loads pickle.Unpickler torch.jit.load torch.export.load torch.ops.load_library torch.classes.load_library
    numpy.load np.load""".split()  # noqa: SIM905 - as above
)
FORBIDDEN_PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn", "os.fork", "torch.hub.")

ALLOWED = {
    ("testing/modules.py", "pickle.loads"),  # what it has dumped itself in the same line
    ("cli.py", "importlib.import_module"),  # the user's own module, named on the command line as for `python -m`
}


def findings(source: str) -> list[str]:
    """List what a file must not do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module, *(f"{node.module}.{name}" for name in names)]
                found += [name for name in names if name in FORBIDDEN_CALLS - {"importlib.import_module"}]
            parts = [".".join(name.split(".")[:n]) for name in names for n in (1, 2, 3)]
            found += [f"import {name}" for name in dict.fromkeys(parts) if name in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if name == "torch.load":
                if not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords):
                    found.append("torch.load without weights_only=True")
            elif name in FORBIDDEN_CALLS or name.startswith(FORBIDDEN_PREFIXES):
                found += [] if name.endswith("import_module") and literal else [name]
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_runs_nothing_and_calls_nobody(path: pathlib.Path):
    file = path.relative_to(ROOT).as_posix()
    assert [what for what in findings(path.read_text()) if (file, what) not in ALLOWED] == []


def test_what_is_allowed_is_there():
    for file, what in ALLOWED:
        assert what in findings((ROOT / file).read_text())


PLANTED = (
    *("eval('1')", "exec('1')", "compile('1', '', 'eval')", "__import__('os')", "importlib.import_module(name)"),
    *("def f(s):\n    exec(s)", "import os\nos.system('ls')", "import os\nos.execv('a', [])"),
    *("import pickle\npickle.load(f)", "from pickle import loads", "import pickle\npickle.Unpickler(f)"),
    *("import subprocess", "from subprocess import run", "import urllib.request", "def f():\n    import socket"),
    *("from http import client", "import requests as r", "from torch import hub", "import torch.utils.cpp_extension"),
    *("torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)"),
)


@pytest.mark.parametrize("planted", PLANTED)
def test_the_search_finds(planted: str):
    assert findings(planted)


def test_the_search_leaves_alone():
    assert not findings("net.eval()\nre.compile('a')\ntorch.compile(f)\nimport_module('.testing', __name__)\n")
    assert not findings("torch.load(f, weights_only=True)\nfrom . import socket\nimport os.path\n")


def test_no_step_opens_a_socket_or_runs_a_command(monkeypatch: pytest.MonkeyPatch):
    """The search reads names; this one is told by the interpreter."""

    def refuse(*args, **kwargs):
        raise AssertionError("somebody called for help")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(os, "system", refuse)
    for name in ("AffineCoupling", "InvertibleLinear"):
        case = next(case for case in CASES.values() if case.name.startswith(name))
        sum(y.sum() for y in tuple_of(case.layer()(*case.inputs()))).backward()
