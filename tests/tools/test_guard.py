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
    assert fake.asked == CASES[:2] and guard.status(verdicts) == 0


def test_a_regression_is_slower_every_time():
    fake = Fake(measured(SLOWER), measured(EQUAL), *[measured(SLOWER)] * guard.AGAIN)
    verdicts = {v.case: v for v in guard.judge(CASES[:2], fake)}
    assert verdicts[CASES[0]].kind == "regression" and verdicts[CASES[1]].kind == "same"
    assert len(verdicts[CASES[0]].runs) == 1 + guard.AGAIN
    assert fake.asked == [*CASES[:2], *CASES[:1] * guard.AGAIN]  # after all others
    assert guard.status(list(verdicts.values())) == 1


@pytest.mark.parametrize("number", range(guard.AGAIN))
def test_noise_is_no_regression(number):
    """One measurement that finds it as fast ends the matter."""
    fake = Fake(*[measured(SLOWER)] * (1 + number), measured(EQUAL))
    (verdict,) = guard.judge(CASES[:1], fake)
    assert verdict.kind == "same" and len(verdict.runs) == 2 + number and not fake.runs
    assert guard.status([verdict]) == 0


def test_a_slower_median_is_not_enough():
    """Nor is a loss below the threshold."""
    overlapping, small = measured(APART), measured((1.05, 1.06, 1.07), (1.0, 1.01, 1.02))
    assert overlapping["base_over_head"] < 1 - guard.THRESHOLD < small["base_over_head"] < 1
    verdicts, fake = judged(overlapping, small)
    assert [v.kind for v in verdicts] == ["same", "same"] and len(fake.asked) == 2
    (verdict,) = guard.judge(CASES[:1], Fake(*[small] * (1 + guard.AGAIN)), threshold=0.04)
    assert verdict.kind == "regression"


NOT_THERE = {"failed": "base", "missing": True, "why": "AttributeError: no such function"}
CRASHED = {"failed": "base", "missing": False, "why": "RuntimeError: no"}
OURS = {"failed": "this", "missing": True, "why": "AttributeError: no glu"}
ENDED = {"failed": "either", "why": "a process ended"}


def test_what_the_base_does_not_have_is_no_failure():
    verdicts, _ = judged(NOT_THERE, measured(EQUAL))
    assert [v.kind for v in verdicts] == ["not measured", "same"] and guard.status(verdicts) == 0
    first = guard.page(verdicts, "a" * 40, FACTS).splitlines()[0]
    assert first.startswith("**No case is slower**") and first.endswith(" 1 could not be measured.")


@pytest.mark.parametrize("run", [NOT_THERE, CRASHED, OURS, ENDED])
def test_where_nothing_is_measured_nothing_is_judged(run):
    verdicts, _ = judged(run, run)
    assert guard.status(verdicts) == 2
    text = guard.page(verdicts, "a" * 40, FACTS)
    assert (
        text.startswith("**Not judged**: none of 2 cases could be compared") and text.count(run["why"]) == 2
    )
    assert guard.status([]) == 2


@pytest.mark.parametrize("run", [CRASHED, OURS, ENDED])
def test_a_case_that_fails_is_not_judged(run):
    """Beside others that pass, or when it is measured again; a regression remains one."""
    verdicts, _ = judged(run, measured(EQUAL), measured(EQUAL))
    assert guard.status(verdicts) == 2
    assert guard.page(verdicts, "a" * 40, FACTS).startswith("**Not judged**: 1 of 3 cases could not be")
    fake = Fake(run, *[measured(SLOWER)] * (1 + guard.AGAIN))
    assert guard.status(guard.judge(CASES[:2], fake)) == 1


@pytest.mark.parametrize("run", [NOT_THERE, CRASHED, OURS, ENDED])
def test_a_second_measurement_may_fail(run):
    fake = Fake(measured(SLOWER), measured(EQUAL), measured(SLOWER), run)
    verdicts = guard.judge(CASES[:2], fake)
    assert [v.kind for v in verdicts] == ["not measured", "same"] and not fake.runs
    assert len(verdicts[0].ratios) == 2
    text = guard.page(verdicts, "a" * 40, FACTS)
    assert "not measured again: " in text and run["why"] in text and "0.77, 0.77 |" in text
    assert guard.status(verdicts) == 2 and text.startswith("**Not judged**: 1 of 2 cases")


def test_the_page_has_the_verdict_first_and_no_times():
    fake = Fake(
        measured(SLOWER),
        measured(FASTER),
        NOT_THERE,
        measured(SLOWER),
        *[measured(SLOWER)] * guard.AGAIN,
        measured(EQUAL),
    )
    text = guard.page(guard.judge(CASES, fake), "a" * 40, FACTS)
    lines = text.splitlines()
    assert lines[0] == "**Slower** in 1 of 3 cases than `aaaaaaaaaaaa`. 1 could not be measured."
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


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Where the page is written; the base is built."""

    class Built:
        def __enter__(self):
            return tmp_path, "c" * 40

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(base, "built", lambda revision: Built())
    return tmp_path / "made" / "guard.md"


def compared(answer, ends_after=None):
    """Of base.compare: the same answer to each case; the processes end after some."""

    def compare(folder, cases, limits):
        for number, (name, _, work) in enumerate(cases):
            if number == ends_after:
                raise base.ComparisonError("--base: the process of a revision ended with status -9")
            shape = str(name) if isinstance(name, Named) else name.shape.name
            yield answer | {"shape": shape, "pass": work}

    return compare


@pytest.mark.parametrize(
    ("answer", "status", "verdict"),
    [
        (measured(EQUAL), 0, "**No case is slower**"),
        (measured(SLOWER), 1, "**Slower**"),
        (NOT_THERE, 2, "**Not judged**"),
    ],
)
def test_the_command_ends_with_a_status(answer, status, verdict, page, monkeypatch, capsys):
    monkeypatch.setattr(base, "compare", compared(answer))
    assert run.main(["--guard", "HEAD~1", "--page", str(page)]) == status
    assert page.read_text().splitlines()[0].startswith(verdict)
    assert page.read_text() in capsys.readouterr().out


@pytest.mark.parametrize("ends_after", [0, 2])
def test_a_page_is_written_where_a_process_ends(ends_after, page, monkeypatch, capsys):
    monkeypatch.setattr(base, "compare", compared(measured(EQUAL), ends_after))
    assert run.main(["--guard", "HEAD~1", "--page", str(page)]) == 2
    assert page.read_text().startswith("**Not judged**")
    cases = len(guarded.PASSES) * (len(guarded.DENSE) + len(guarded.CASES))
    assert page.read_text().count("ended with status -9") == cases - ends_after
    assert "ended with status -9" in capsys.readouterr().err


def test_no_page_of_an_earlier_run_remains(page, monkeypatch):
    page.parent.mkdir()
    page.write_text("**No case is slower**")

    def fails(revision):
        raise base.ComparisonError("no such revision")

    monkeypatch.setattr(base, "built", fails)
    assert run.main(["--guard", "nothing", "--page", str(page)]) == 2 and not page.exists()


IGNORED = {
    "--suite": "smoke", "--shape": "odd", "--dtype": "float32", "--pass": "forward", "--rivals": "einsum",
    "--compile": None, "--longest": "10.0", "--call-limit": "60", "--memory-limit": "6", "--seed": "0",
    "--output": "a.json",
}  # fmt: skip


@pytest.mark.parametrize("option", IGNORED)
def test_options_that_it_would_ignore_are_refused(option, capsys):
    """Also with their defaults."""
    value = IGNORED[option]
    with pytest.raises(SystemExit) as ended:
        run.main([*([option] if value is None else [option, value]), "--guard", "HEAD"])
    assert ended.value.code == 2
    assert f"--guard has cases and limits of its own: it does not take {option}\n" in capsys.readouterr().err


def test_all_options_are_used_or_refused():
    known = {name for action in run._parser()._actions for name in action.option_strings} - {"-h", "--help"}
    used = {f"--{name}" for name in run.OF_GUARD}
    assert known == used | set(IGNORED) | {"--overhead", "--sweep", "--base"}  # which exclude each other


@pytest.mark.parametrize("option", ["--threshold", "--page"])
def test_its_options_belong_to_it(option, capsys):
    with pytest.raises(SystemExit):
        run.main([option, "0.1", "--suite", "smoke"])
    assert f"{option}: expected with --guard only" in capsys.readouterr().err


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
    assert missing["missing"]


@pytest.mark.subprocess
def test_a_process_that_ends_is_a_comparison_error(tmp_path):
    """Here there is no mi_kernels in the folder of the base."""
    case = (Named("gates", "diagonal", "small"), torch.float32, "forward")
    compared = base.compare(tmp_path, [case], measure.Limits(rounds=2, shortest=1e-5))
    with pytest.raises(base.ComparisonError, match="the process of a revision ended with status 1"):
        next(compared)
    worker = base.Worker(tmp_path)
    worker.process.wait()
    with pytest.raises(base.ComparisonError, match="ended with status 1"):
        worker.sample({"case": ["gates", "diagonal", "small"]})
    worker.close()


@pytest.fixture
def git(tmp_path, monkeypatch):
    """git, in a repository of two commits of main, which is compared."""

    def run(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *options, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(base, "ROOT", tmp_path)
    run("init", "-b", "main")
    for text in ("first", "second"):
        (tmp_path / "file").write_text(text)
        run("add", "file")
        run("commit", "-m", text)
    return run


def test_the_revision_to_compare_with(git, tmp_path):
    assert base.default_revision() == "HEAD~1"
    (tmp_path / "file").write_text("changed")
    assert base.default_revision() == "HEAD"
    second = git("rev-parse", "HEAD")
    git("checkout", "-b", "change")
    git("commit", "-am", "third")
    assert base.default_revision() == second
    (tmp_path / "file").write_text("again")
    git("commit", "-am", "fourth")
    git("update-ref", "refs/remotes/origin/main", "main")
    git("branch", "-D", "main")  # as in a clone of a pull request
    assert base.default_revision() == second


def test_without_a_main_branch_a_revision_is_asked_for(git, tmp_path, page, capsys):
    git("branch", "-m", "change")
    with pytest.raises(base.ComparisonError, match="no branch main or origin/main .*make guard BASE=REV"):
        base.default_revision()
    assert run.main(["--guard", "--page", str(page)]) == 2
    assert "BASE=REV" in capsys.readouterr().err and not page.exists()
    git("checkout", "--orphan", "main")
    git("commit", "-m", "of another history")
    git("checkout", "change")
    with pytest.raises(base.ComparisonError, match="where this branch left main: .*BASE=REV"):
        base.default_revision()


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
