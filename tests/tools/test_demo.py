"""The demonstration runs, says what it found, and leaves a picture."""

import re

import pytest
import torch

from mi_kernels import demo
from mi_kernels.testing.memory import peak_memory

pytestmark = pytest.mark.tools

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "BENCHMARK_SHAPES", ((8, 4, 5, 6), (1, 3, 2, 1)))
    monkeypatch.setattr(demo, "BENCHMARK_SECONDS", 0.01)
    monkeypatch.setattr(demo, "HELD_OUT_PAIRS", 100)


def hide(monkeypatch, *hidden):
    find_spec = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name in hidden else find_spec(name))


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_a_short_run(short, rich, tmp_path, capsys, monkeypatch):
    if not rich:
        hide(monkeypatch, "rich")
    path = tmp_path / "new" / "demo.png"
    assert demo.main(["--output", str(path), "--steps", "6", "--seed", "3"]) == 0
    assert path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000
    printed = capsys.readouterr().out
    agreement = re.search(r"largest difference of a step (\S+) absolute, (\S+) relative", printed)
    assert agreement is not None and all(float(value) < 1e-4 for value in agreement.groups())
    for expected in ("backend: ", "ms/step", "extra MiB", "gradgradcheck", "8x4x5x6", "What to try next"):
        assert expected in printed
    assert "FAILS" not in printed


def test_a_failing_check_is_said_and_fails_the_run(short, tmp_path, capsys, monkeypatch):
    def wrong():
        raise AssertionError("gradients differ")

    monkeypatch.setattr(demo, "_per_sample_gradients", wrong)
    assert demo.main(["--output", str(tmp_path / "demo.png"), "--steps", "1"]) == 1
    assert "FAILS: AssertionError" in capsys.readouterr().out


def test_missing_packages_are_named_in_one_sentence(capsys, monkeypatch):
    hide(monkeypatch, "sklearn", "matplotlib")
    assert demo.main([]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "The demo needs scikit-learn and matplotlib: pip install scikit-learn matplotlib\n"
    )
    assert captured.out == ""


def test_steps_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_told_before_the_training(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        demo.main(["--output", str(tmp_path / "file" / "x.png")])
    assert "--output: expected a file that can be written" in capsys.readouterr().err


def test_pairs_are_balanced_and_come_from_one_side_of_the_split():
    train, held_out = demo.load_images(0)
    assert len(train.pixels) + len(held_out.pixels) == 1797
    labels = torch.repeat_interleave(torch.arange(10), train.counts)
    # The pixels name the image: give each one its own index instead, to see which images were drawn.
    train.pixels = torch.arange(len(labels)).unsqueeze(1)
    left, right, same = train.pairs(5000, torch.Generator().manual_seed(0))
    assert same.mean() == 0.5
    assert torch.equal(labels[left] == labels[right], same.bool().unsqueeze(1))
    assert not (left == right).any()
    assert len(left.unique()) > 1000 and len(right.unique()) > 1000


def test_peak_memory_counts_what_is_alive_together():
    before = torch.empty(1000)

    def allocate():
        first = torch.empty(1_000_000)
        second = torch.empty(500_000)
        del first
        return before, second, torch.empty(250_000)

    assert peak_memory(allocate) == 4 * 1_500_000
    assert peak_memory(lambda: None) == 0


def test_peak_memory_sees_allocations_inside_operators():
    a, b = torch.randn(100, 50), torch.randn(100, 40)
    weight = torch.randn(30, 50, 40)
    # einsum makes the [100, 30 * 40] intermediate inside one operator and gives it back.
    assert peak_memory(lambda: torch.einsum("bi,oij,bj->bo", a, weight, b)) >= 4 * 100 * 30 * 40
