"""The command line: what it prints, draws and exits with."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import nn

import invzoo as iz
from invzoo import demo
from invzoo.cli import main
from invzoo.layers.maps.affine import Shift
from invzoo.testing.catalogue import tables

TINY = ["demo", "--depth", "4", "--epochs", "1", "--batch-size", "512"]


class WrongShift(Shift):
    def undo(self, y, h):
        return y - 1.5 * h

    def undo_(self, y, h):
        return y.sub_(1.5 * h)


class WrongCoupling(iz.AdditiveCoupling):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.map = WrongShift()


def test_help_names_the_command_and_its_options(capsys):
    for argv, words in (
        (["--help"], ["demo", "zoo", "check"]),
        (["demo", "-h"], ["--depth", "--mode", "--device", "--picture"]),
        (["check", "-h"], ["module:name", "--shape", "--side", "--dtype", "--seed", "--without"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)


@pytest.mark.parametrize("installed", [True, False])
def test_version(capsys, monkeypatch, installed):
    def version(name):
        if not installed:
            raise PackageNotFoundError(name)
        return f"1.2.3 of {name}"

    monkeypatch.setattr(iz, "version", version)
    expected = "1.2.3 of invzoo" if installed else "from source, not installed"
    assert getattr(iz, "__version__", "from source, not installed") == expected
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"invzoo {expected}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: command"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--dept", "x"], "argument --depth: expected a positive integer; got 'x'"),
        (["demo", "--depth", "0"], "argument --depth: expected a positive integer; got '0'"),
        (["demo", "--epochs", "-1"], "argument --epochs: expected a positive integer; got '-1'"),
        (["demo", "--batch-size", "1.5"], "argument --batch-size: expected a positive integer; got '1.5'"),
        (["demo", "--seed", str(2**63)], "argument --seed: expected an integer from 0 to 2**63 - 1"),
        (["demo", "--mode"], "argument --mode: expected at least one argument"),
        (["demo", "--mode", "invert", "forget"], "argument --mode: invalid choice: 'forget'"),
        (["demo", "--device", "toaster"], "argument --device: expected a device such as cpu"),
        (["demo", "--device", "meta"], "argument --device: device 'meta' is not available; this machine has cpu"),
        (["demo", "--device", "cpu:1"], "argument --device: device 'cpu:1' is not available; this machine has cpu"),
        (["demo", "--picture", "memory.txt"], "argument --picture: expected a name that ends in .png, .pdf, .svg"),
        (["demo", "--picture", "no/such/place.png"], "argument --picture: no such directory: no/such"),
        (["demo", "--fast"], "unrecognized arguments: --fast"),
        (["check"], "the following arguments are required: module:name, --shape"),
        (["check", "tanh", "--shape", "3,4"], "argument module:name: expected package.module:name; got 'tanh'"),
        (["check", "a:b", "--shape", "3,x"], "argument --shape: expected sizes such as 4,8,16,16; got '3,x'"),
        (["check", "a:b", "--shape", "0,4"], "argument --shape: expected sizes such as 4,8,16,16; got '0,4'"),
        (["check", "a:b", "--shape", "1,4"], "argument --shape: expected a batch of at least 2; got '1,4'"),
        (["check", "a:b", "--side", "3,4"], "argument --side: expected a name and a shape such as context=4,8"),
        (["check", "a:b", "--dtype", "int8"], "argument --dtype: expected one of float64, float32; got 'int8'"),
        (["check", "a:b", "--without", "assert_memory"], "argument --without: expected an assertion and the reason"),
    ],
)
def test_bad_usage_exits_with_2_and_says_why(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Mode." not in printed  # modes are shown as they are typed


def test_tiny_demo_end_to_end(capsys, tmp_path):
    picture = tmp_path / "memory.png"
    assert main([*TINY, "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for line in printed.splitlines() if len(cells := line.replace("│", "").split()) == 6}
    store, recompute, invert = (rows[mode] for mode in ("store", "recompute", "invert"))
    assert [row[1:3] for row in (store, recompute, invert)] == [["4", "0"], ["4", "4"], ["4", "4"]]
    peaks = [int(row[0].replace(",", "")) for row in (store, recompute, invert)]
    assert peaks == sorted(set(peaks), reverse=True)
    assert printed.count("relative error") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_modes_can_be_chosen(capsys, tmp_path):
    before = torch.get_rng_state()
    assert main([*TINY, "--mode", "invert", "--picture", str(tmp_path / "memory.svg")]) == 0
    printed = capsys.readouterr().out
    assert "│ invert" in printed
    assert "│ store" not in printed
    assert "invert against store" in printed
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_learn_the_same_and_invert_stays_flat():
    batch = (torch.rand(8, 1, 8, 8), torch.arange(8))
    peaks = {(d, mode): demo.peak_bytes(demo.build(d, 0), batch, mode) for d in (8, 32) for mode in iz.Mode}
    assert peaks[32, "invert"] == peaks[8, "invert"]
    assert peaks[32, "recompute"] > 2 * peaks[8, "recompute"]
    assert peaks[32, "store"] > 3 * peaks[8, "store"]
    errors = demo.gradient_errors(demo.build(32, 0).double(), (batch[0].double(), batch[1]), [*iz.Mode])
    assert errors.keys() == {"recompute", "invert"}
    assert max(errors.values()) < 1e-12


def test_wrong_gradients_are_a_failure(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(iz, "AdditiveCoupling", lambda *args, **kw: WrongCoupling(*args, check="never", **kw))
    assert main([*TINY, "--picture", str(tmp_path / "memory.png")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("invzoo demo: error: Expected gradients within 1e-04 of those in mode store; got ")
    assert "in mode invert" in message
    assert "in mode recompute" not in message
    assert not (tmp_path / "memory.png").exists()


def test_gradients_that_are_not_numbers_are_a_failure(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "gradient_errors", lambda *args: {iz.Mode.invert: float("nan")})
    assert main([*TINY, "--picture", str(tmp_path / "memory.png")]) == 1
    assert "got nan in mode invert" in capsys.readouterr().err


def test_a_wrong_inverse_that_the_engine_finds_is_a_failure_that_names_the_layer(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(iz, "AdditiveCoupling", WrongCoupling)
    assert main([*TINY, "--mode", "invert", "--picture", str(tmp_path / "memory.png")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("invzoo demo: error: ")
    assert "WrongCoupling" in message


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich", "rich")]
)
def test_a_missing_extra_says_what_to_install(capsys, monkeypatch, module, package):
    for name in [name for name in sys.modules if name == "invzoo.demo" or name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(iz, "demo")
    monkeypatch.setattr(sys, "meta_path", [Missing(module), *sys.meta_path])
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"invzoo demo: error: the demo needs {package}; pip install invzoo[demo]\n"


class Missing:
    """An importer that finds no module of one package."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_an_interrupt_exits_with_130(capsys, monkeypatch):
    def interrupt(**arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_a_failure(capsys, tmp_path):
    (tmp_path / "taken.png").mkdir()
    assert main([*TINY, "--mode", "store", "--picture", str(tmp_path / "taken.png")]) == 1
    assert "taken.png" in capsys.readouterr().err


def test_the_package_and_its_command_line_import_without_the_extra():
    code = "import sys, invzoo.cli; print({'sklearn', 'matplotlib', 'rich'} & {*sys.modules})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout  # noqa: S603
    assert printed == "set()\n"


def test_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "invzoo", "demo", "--depth", "0"], capture_output=True, text=True)  # noqa: PLW1510
    assert ran.returncode == 2
    assert "invzoo demo: error: argument --depth" in ran.stderr


def test_counted_counts_replays():
    stack = iz.InvertibleSequential(iz.AdditiveCoupling(net := demo.Counted(nn.Tanh())))
    stack(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert net.evaluations == 2


def test_zoo_names_every_layer_with_its_map(capsys):
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for entry in iz.testing.CATALOGUE:
        assert any(entry.name in line and entry.map in line and entry.log_det in line for line in lines), entry


def test_zoo_writes_the_tables_of_the_readme(capsys):
    assert main(["zoo", "--markdown"]) == 0
    assert capsys.readouterr().out == tables() + "\n"


def test_zoo_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len(lines) == 1 + len(iz.testing.CATALOGUE)
    (row,) = (line for line in lines if line.startswith("InvertibleLogit "))
    cells = [cell.strip() for cell in row.split("  ") if cell]
    assert cells == [
        *("InvertibleLogit", "log(x) - log(1 - x)", "-sum(log(x) + log(1 - x))"),
        *("1x", "no", "[0, 1]", "its input"),
    ]


LAYERS = """
import torch, invzoo as iz
from torch import nn

class Wrong(iz.InvertibleModule):
    volume_preserving = True
    def function(self, x): return 2 * x
    def inverse(self, y): return y / 2

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 2)
    def forward(self, x, context): return self.net(torch.cat((x, context), 1))

def coupling(): return iz.AdditiveCoupling(Net())
layer = iz.InvertibleSequential(iz.Reverse(), iz.InvertibleTanh())
def fails(): raise RuntimeError("out of clay")
number = 3
"""


@pytest.fixture
def layers(tmp_path, monkeypatch):
    name = f"layers_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(LAYERS)
    (tmp_path / "half_written.py").write_text("layer = (")
    monkeypatch.chdir(tmp_path)
    return name


def test_check_of_a_layer_that_is_right(capsys, layers):
    argv, before = ["check", f"{layers}:coupling", "--shape", "3,4", "--side", "context=3,3"], torch.get_rng_state()
    assert main([*argv, "--seed", "5"]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"ok        {assertion.__name__}" for assertion in iz.testing.ASSERTIONS]
    assert lines[-1] == f"{len(lines) - 1} of {len(lines) - 1} assertions hold for AdditiveCoupling"
    assert main([*argv, "--dtype", "float32"]) == 0


def test_check_of_an_instance_and_a_reason(capsys, layers):
    reason = "assert_memory=the tanh keeps its input"
    assert main(["check", f"{layers}:layer", "--shape", "3,4", "--without", reason]) == 0
    assert "left out  assert_memory: the tanh keeps its input" in capsys.readouterr().out
    assert main(["check", f"{layers}:layer", "--shape", "3,4"]) == 1
    assert "FAILED    assert_memory: InvertibleSequential: Expected 4 more calls" in capsys.readouterr().out


def test_check_of_a_layer_that_is_wrong(capsys, layers):
    assert main(["check", f"{layers}:Wrong", "--shape", "3,4"]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = "FAILED    assert_log_det: Wrong: Expected the log-determinant to be"
    assert [line.startswith(wrong) for line in lines].count(True) == 1
    assert len(lines) == 1 + len(iz.testing.ASSERTIONS)


BUILD = "argument module:name: cannot build "


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere_at_all:layer"], f"{BUILD}'nowhere_at_all:layer': ModuleNotFoundError: "),
        (["invzoo:Nope"], f"{BUILD}'invzoo:Nope': AttributeError: "),
        (["{}:number"], "argument module:name: expected an InvertibleModule, or what makes one; got 3"),
        (["torch.nn:Identity"], "argument module:name: expected an InvertibleModule"),
        (["invzoo:ActNorm"], f"{BUILD}'invzoo:ActNorm': TypeError: "),
        (["json:dumps"], f"{BUILD}'json:dumps': TypeError: "),
        (["{}:fails"], ":fails': RuntimeError: out of clay"),
        (["half_written:layer"], f"{BUILD}'half_written:layer': SyntaxError: "),
        (["{}:layer", "--without", "assert_all=no time"], "argument --without: Expected without to give reasons"),
    ],
)
def test_check_of_what_is_no_layer(capsys, layers, argv, message):
    assert main(["check", argv[0].format(layers), "--shape", "3,4", *argv[1:]]) == 2
    assert message in capsys.readouterr().err
