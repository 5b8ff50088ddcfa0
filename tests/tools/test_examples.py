"""The examples do what they say."""

import importlib.util
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TUTORIALS = sorted((EXAMPLES / "tutorials").glob("plot_*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_film_answers_the_question_and_nothing_else_can():
    """In a few steps. Half of the answers are yes: without the question, none is better than a guess."""
    film_digits = load("film_digits")
    (first, without), (_, with_film) = film_digits.train(False, 40), film_digits.train(True, 300)
    assert 0.5 < first < 1.0  # nearly log 2
    assert without < 0.6 < 0.75 < with_film


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_what_it_compares_is_equal(path, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pyplot.switch_backend("agg")
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(len(pyplot.gcf().axes)))
    runpy.run_path(str(path))
    pyplot.close("all")
    printed = capsys.readouterr().out
    assert shown and all(shown) and printed
    assert "False" not in printed and "nan" not in printed
