"""The examples do what they say."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hyper_tasks():
    return load("hyper_tasks")


def test_hyper_tasks_meets_its_criterion(hyper_tasks, tmp_path, capsys):
    """With fewer steps than by default, and one seed."""
    path = tmp_path / "plot.png"
    assert hyper_tasks.main(["--steps", "300", "--seeds", "1", "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "worst seed" in capsys.readouterr().out


def test_both_models_of_hyper_tasks_have_the_same_size(hyper_tasks):
    hyper, concat = (hyper_tasks.parameters(hyper_tasks.make(name)) for name in ("hyper", "concat"))
    assert hyper <= concat <= 1.05 * hyper
