"""The examples do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("kind", ["mlstm", "mi_gru"])
def test_char_mlstm_learns_more_than_frequencies(kind, capsys):
    """In a few steps, and so does the LSTM beside it, which is at most a unit larger than it has to be."""
    char_mlstm = load("char_mlstm")
    found = char_mlstm.main(["--quick", "--kind", kind])
    least = found.pop("frequencies")
    assert set(found) == {kind, "nn.LSTM"} and all(bits < least for bits in found.values())
    assert capsys.readouterr().out.count("held out") == 2


def test_no_character_of_char_mlstm_is_both_seen_and_held_out():
    char_mlstm = load("char_mlstm")
    text = "".join(map(chr, range(10 * char_mlstm.BLOCK + 5)))
    blocks, held_out, characters = char_mlstm.encode(text)
    assert characters == len(text) and blocks.shape[0] == 9 and held_out.shape[0] == 1
    assert torch.equal(torch.cat((blocks, held_out)).flatten(), torch.arange(10 * char_mlstm.BLOCK))


def test_the_models_of_char_mlstm_have_the_same_size():
    char_mlstm = load("char_mlstm")
    for kind in char_mlstm.KINDS:
        ours = char_mlstm.parameters(char_mlstm.make(kind, 32, 91))
        units = char_mlstm.hidden_of_lstm(ours, 91)
        theirs, less = (char_mlstm.parameters(char_mlstm.make("lstm", n, 91)) for n in (units, units - 1))
        assert less < ours <= theirs
