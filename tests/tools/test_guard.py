"""`make guard`: what counts as slower, what is measured again, what the page says. Times are made up."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import run
from benchmarks.harness import base, guard, measure
from benchmarks.suites import guard as guarded
from benchmarks.suites import shapes
from benchmarks.suites.guard import Named

pytestmark = pytest.mark.tools

CASES = [(name, torch.float32, "forward") for name in guarded.CASES[:4]]
SLOWER, EQUAL, FASTER = (1.3, 1.32, 1.4), (1.0, 1.02, 1.1), (0.5, 0.52, 0.6)
APART = (1.09, 1.15, 1.2)  # of a base of EQUAL they overlap with it, though the median is a tenth slower
FACTS = {
    "commit": {"revision": "b" * 40, "dirty": True},
    "machine": {"cpu": "A CPU", "threads": 2, "load_average": [0.25, 0, 0]},
    "versions": {"torch": "2.13.0", "python": "3.11.7"},
    "instruction_sets": {"selected": "avx512"},
}


def measured(head, base=EQUAL):
    sides = {side: {"samples_s": list(times)} for side, times in (("head", head), ("base", base))}
    return sides | {"base_over_head": sorted(base)[1] / sorted(head)[1]}


class Fake:
    """Answers with prepared measurements, and remembers what it was asked."""

    def __init__(self, *runs):
        self.runs, self.asked = list(runs), []

    def __call__(self, cases):
        for case in cases:
            self.asked.append(case)
            yield self.runs.pop(0)


def judged(*runs):
    fake = Fake(*runs)
    first = min(len(CASES), len(runs))
    return guard.judge(CASES[:first], fake), fake


def test_what_is_as_fast_is_measured_once():
    verdicts, fake = judged(measured(EQUAL), measured(FASTER))
    assert [v.kind for v in verdicts] == ["same", "faster"]
    assert fake.asked == CASES[:2] and not guard.failed(verdicts)


def test_a_regression_is_slower_every_time():
    fake = Fake(measured(SLOWER), measured(EQUAL), *[measured(SLOWER)] * guard.AGAIN)
    verdicts = {v.case: v for v in guard.judge(CASES[:2], fake)}
    assert verdicts[CASES[0]].kind == "regression" and verdicts[CASES[1]].kind == "same"
    assert len(verdicts[CASES[0]].runs) == 1 + guard.AGAIN
    assert fake.asked == [*CASES[:2], *CASES[:1] * guard.AGAIN]  # after all others
    assert guard.failed(verdicts.values())


@pytest.mark.parametrize("number", range(guard.AGAIN))
def test_noise_is_no_regression(number):
    """One measurement that finds it as fast ends the matter."""
    fake = Fake(*[measured(SLOWER)] * (1 + number), measured(EQUAL))
    (verdict,) = guard.judge(CASES[:1], fake)
    assert verdict.kind == "same" and len(verdict.runs) == 2 + number and not fake.runs
    assert not guard.failed([verdict])


def test_a_slower_median_is_not_enough():
    """Nor is a loss below the threshold."""
    overlapping, small = measured(APART), measured((1.05, 1.06, 1.07), (1.0, 1.01, 1.02))
    assert overlapping["base_over_head"] < 1 - guard.THRESHOLD < small["base_over_head"] < 1
    verdicts, fake = judged(overlapping, small)
    assert [v.kind for v in verdicts] == ["same", "same"] and len(fake.asked) == 2
    (verdict,) = guard.judge(CASES[:1], Fake(*[small] * (1 + guard.AGAIN)), threshold=0.04)
    assert verdict.kind == "regression"


def test_what_the_base_does_not_have_is_no_failure():
    for side, expected in (("base", False), ("this", True)):
        (verdict,) = guard.judge(CASES[:1], Fake({"failed": side, "why": "AttributeError: no glu"}))
        assert verdict.kind == "not measured" and guard.failed([verdict]) is expected


def test_the_page_has_the_verdict_first_and_no_times():
    fake = Fake(
        measured(SLOWER),
        measured(FASTER),
        {"failed": "base", "why": "AttributeError: no such function"},
        measured(SLOWER),
        *[measured(SLOWER)] * guard.AGAIN,
        measured(EQUAL),
    )
    text = guard.page(guard.judge(CASES, fake), "a" * 40, FACTS)
    lines = text.splitlines()
    assert lines[0] == "**Slower** in 1 of 3 cases than `aaaaaaaaaaaa`."
    assert lines[2] == (
        "This tree: `bbbbbbbbbbbb` with changes. A CPU, 2 threads, avx512, PyTorch 2.13.0, Python 3.11.7, "
        "load 0.2 at the start."
    )
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert list(rows)[2:] == [str(case[0]) for case in CASES]
    slower, faster, missing, noise = (rows[str(case[0])] for case in CASES)
    assert "0.77, 0.77, 0.77" in slower and "**slower**" in slower
    assert "1.96" in faster and faster.rstrip(" |").endswith("faster")
    assert "the base cannot run it (AttributeError: no such function)" in missing
    assert "0.77, 1.00" in noise and "not slower when measured again" in noise
    assert "1.3" not in text and " s" not in rows[str(CASES[0][0])]
    dense = [(shapes.by_name(["odd"])[0], torch.float32, "forward")]
    calm = guard.page(guard.judge(dense, Fake(measured(EQUAL))), "a" * 40, FACTS)
    assert "| dense odd |" in calm
    assert calm.startswith("**No case is slower** than at `aaaaaaaaaaaa`, of 1 that were measured.")


@pytest.mark.parametrize(("head", "status"), [(EQUAL, 0), (SLOWER, 1)])
def test_the_command_ends_with_a_status(head, status, tmp_path, monkeypatch, capsys):
    class Built:
        def __enter__(self):
            return tmp_path, "c" * 40

        def __exit__(self, *_):
            return None

    def compare(folder, cases, limits):
        assert folder == tmp_path
        for name, _, work in cases:
            shape = str(name) if isinstance(name, Named) else name.shape.name
            yield measured(head) | {"shape": shape, "pass": work}

    monkeypatch.setattr(base, "built", lambda revision: Built())
    monkeypatch.setattr(base, "compare", compare)
    page = tmp_path / "made" / "guard.md"
    assert run.main(["--guard", "HEAD~1", "--page", str(page)]) == status
    assert page.read_text().splitlines()[0].startswith("**Slower**" if status else "**No case is slower**")
    assert page.read_text() in capsys.readouterr().out


def test_the_cases_are_there():
    """Every family has one, in forward and backward, and the sizes are those of the suites."""
    families = {case.suite for case in guarded.CASES}
    assert families >= {"glu", "gates", "norms", "hyper", "biaffine", "recurrent", "segments"}
    assert set(guarded.PASSES) == {"forward", "forward+backward"}
    assert all(case.found().name == case.name for case in guarded.CASES)
    assert len(shapes.by_name(list(guarded.DENSE))) == len(guarded.DENSE)
    with pytest.raises(KeyError, match="has no case 'none' of 'glu'"):
        Named("glu", "glu", "none").found()


@pytest.mark.subprocess
def test_two_processes_measure_a_case_of_a_suite():
    small, none = (Named("gates", "diagonal", name) for name in ("small", "none"))
    cases = [(small, torch.float32, "forward+backward"), (none, torch.float32, "forward")]
    found, missing = base.compare(base.ROOT, cases, measure.Limits(rounds=2, shortest=1e-5))
    assert found["shape"] == "diagonal small" and found["pass"] == "forward+backward"
    assert len(found["head"]["samples_s"]) == len(found["base"]["samples_s"]) == 2
    assert missing["failed"] == "this" and "has no case 'none'" in missing["why"]


def test_the_revision_to_compare_with(tmp_path, monkeypatch):
    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *options, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(base, "ROOT", tmp_path)
    git("init", "-b", "main")
    for text in ("first", "second"):
        (tmp_path / "file").write_text(text)
        git("add", "file")
        git("commit", "-m", text)
    assert base.default_revision() == "HEAD~1"
    (tmp_path / "file").write_text("changed")
    assert base.default_revision() == "HEAD"
    second = git("rev-parse", "HEAD")
    git("checkout", "-b", "change")
    git("commit", "-am", "third")
    assert base.default_revision() == second


def test_libraries_are_built_again_where_their_sources_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    answers = {"diff": 0, "ls-files": ""}

    def git(command, *_):
        code = answers["diff"] if command == "diff" else 0
        return subprocess.CompletedProcess([], code, answers["ls-files"] if command == "ls-files" else "")

    monkeypatch.setattr(base, "_git", git)
    assert not base._has_these_libraries("HEAD")  # nothing is built here
    (tmp_path / "mi_kernels").mkdir()
    (tmp_path / "mi_kernels" / "libmi_kernels_cpu.so").write_text("built")
    assert base._has_these_libraries("HEAD")
    answers["diff"] = 1
    assert not base._has_these_libraries("HEAD")
    answers |= {"diff": 0, "ls-files": "csrc/new.cpp\n"}
    assert not base._has_these_libraries("HEAD")
