"""The examples of real layers: ours computes what the published layer does, and trains as it does."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.tools, pytest.mark.usefixtures("one_thread")]

ZOO = Path(__file__).resolve().parents[2] / "examples" / "zoo"
# Steps of training, and which part of the first loss is left after them.
STEPS = {
    "biaffine_parser": (40, 0.6),
    "dit_block": (60, 0.9),
    "fuxictr_apg": (250, 0.95),
    "layoutlm_relation": (80, 0.9),
    "llama_mlp": (150, 0.95),
    "multibench_mi": (60, 0.7),
    "mutan_fusion": (150, 0.3),
    "pyg_nnconv_rgcn": (40, 0.1),
    "pykeen_tucker": (100, 0.9),
}
OPTIONAL = {  # the module it needs, and what pip calls that
    "dit_block": ("sklearn", "scikit-learn"),
    "multibench_mi": ("sklearn", "scikit-learn"),
    "pyg_nnconv_rgcn": ("torch_geometric", "torch_geometric"),
    "pykeen_tucker": ("pykeen", "pykeen"),
}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ZOO)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ZOO / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_every_example_is_tested_and_described():
    names = {path.stem for path in ZOO.glob("*.py") if not path.stem.startswith("_")}
    assert names == set(STEPS)
    readme = (ZOO / "README.md").read_text()
    assert [name for name in names if f"| `{name}.py` |" not in readme] == []


@pytest.mark.parametrize("name", STEPS)
def test_ours_is_the_published_layer(name, load):
    if name in OPTIONAL:
        module, package = OPTIONAL[name]
        pytest.importorskip(module, reason=f"{name}.py needs {package}")
    steps, left = STEPS[name]
    example, limit = load(name), load("_compare").LIMIT
    result = example.run(steps, True)
    assert result.comparisons and all(c.ratio > 0 for c in result.comparisons)
    differences = {c.name: (c.outputs, c.gradients) for c in result.comparisons}
    assert {
        name: found for name, found in differences.items() if not (found[0] <= limit and found[1] <= limit)
    } == {}
    ours, theirs = result.losses["ours"], result.losses["theirs"]
    # Later steps differ by more: what rounding changes grows with each.
    assert len(ours) == steps and ours[:20] == pytest.approx(theirs[:20], rel=1e-4)
    assert sum(ours[-5:]) / 5 < left * ours[0]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_package_is_one_line_and_exit_code_2(name, load, monkeypatch, capsys):
    module, package = OPTIONAL[name]
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        load(name)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == f"this example needs {package}: pip install {package}\n" and printed.out == ""


def test_a_package_that_misses_one_of_its_own_is_not_called_missing(load, monkeypatch, tmp_path):
    (tmp_path / "zoo_broken.py").write_text("import zoo_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="zoo_absent"):
        load("_compare").need("zoo_broken", "zoo_broken")


@pytest.mark.parametrize("difference, code", [(1e-15, 0), (1e-6, 1), (float("nan"), 1)])
def test_a_difference_fails_the_run(difference, code, load, capsys):
    shared = load("_compare")
    comparison = shared.Comparison("layer", 0.5, (0.4, 0.6), (1 << 20, 2 << 20), 1e-16, difference)
    found = shared.Result([comparison], {"theirs": [2.0, 1.0], "ours": [2.0, 1.1]}, {"score": "7"})
    given = []

    def run(steps, quick):
        given.append((steps, quick))
        return found

    assert shared.main("About.", run, 50, []) == shared.main("About.", run, 50, ["--quick"]) == code
    assert shared.main("About.", run, 50, ["--steps", "3"]) == code
    assert given == [(50, False), (5, True), (3, False)]
    printed = capsys.readouterr().out
    for expected in (
        "ours / theirs 0.50 (0.40 to 0.60)",
        "1.0 against 2.0 MiB",
        "score: 7",
        "by 5.0e-02 in all",
    ):
        assert expected in printed


@pytest.mark.parametrize("steps", ["0", "-5"])
def test_steps_are_checked(steps, load, capsys):
    with pytest.raises(SystemExit):
        load("_compare").main("About.", None, 50, ["--steps", steps])
    assert f"argument --steps: expected at least 1, got {steps}" in capsys.readouterr().err


@pytest.mark.subprocess
def test_an_example_runs_by_its_path(tmp_path):
    command = [sys.executable, str(ZOO / "layoutlm_relation.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "whole head, 64 pairs: time of a training step, ours / theirs" in done.stdout
