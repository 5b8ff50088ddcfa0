"""The benchmarks run, record what they should and calculate ratios correctly; no time here means anything."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import run
from benchmarks.harness import base, measure, passes, peers, report, results, summary, tables, timing
from benchmarks.suites import gates, heads, hyper, linear, shapes
from tools import aot, cold_start

pytestmark = pytest.mark.tools

PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["--rounds", "2", "--shortest", "0.01"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The path of the results of the smoke suite, all rivals that are installed here."""
    path = tmp_path_factory.mktemp("benchmarks") / "smoke.json"
    arguments = ["--suite", "smoke", "--dtype", "float64,float32", "--output", str(path), *TINY]
    assert run.main(arguments) == 0
    return path


def test_results_have_every_field(smoke):
    result = results.read(smoke)
    assert result["commit"].keys() == {"revision", "dirty"}
    assert result["machine"]["cpu"] and result["machine"]["cores"] and result["machine"]["threads"]
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["versions"]) >= {"mi_kernels", "python", "opt_einsum", "cuequivariance-torch", "e3nn"}
    assert result["command"].startswith("benchmarks/run.py --suite smoke") and result["date"]
    assert result["ceilings"]["copy_bytes_per_s"] > 0
    assert len(result["cases"]) == 3 * 2 * 3
    for case in result["cases"]:
        assert case["operations"] > 0 and case["bytes"] > 0 and case["shape"]["origin"]
        onednn = [measure.ONEDNN] * (case["dtype"] == "float32" and torch.backends.mkldnn.is_available())
        names = [candidate["name"] for candidate in case["candidates"]]
        assert names == [measure.OURS, *peers.PEERS, *measure.GEMM_NAMES, *onednn]
        for candidate in case["candidates"]:
            if candidate["status"] == "ok":
                assert 0 < candidate["q25_s"] <= candidate["median_s"] <= candidate["q75_s"]
                assert 1 <= candidate["samples"] <= 2 and candidate["extra_bytes"] >= 0
                assert candidate["cores"] > 0
            else:
                assert candidate["status"].startswith("not installed")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (aot.main, ["--jobs", "0"], "argument --jobs: expected at least 1, got 0"),
        (
            aot.main,
            ["--output", "no/such/folder.json"],
            "argument --output: no/such/folder.json: No such file",
        ),
        (cold_start.main, ["--rounds", "0"], "argument --rounds: expected at least 1, got 0"),
        (
            cold_start.main,
            ["--output", "no/such/folder.json"],
            "argument --output: no/such/folder.json: No such",
        ),
    ],
)
def test_tools_refuse_their_arguments_before_the_work(main, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_an_output_is_not_touched_before_there_is_one(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("old")
    assert [aot.writable(str(path)) for path in (new, old)] == [new, old]
    assert not new.exists() and old.read_text() == "old"


@pytest.mark.parametrize("tool", [aot, cold_start])
def test_tools_compile_nothing_in_the_interpreter(tool, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tool.main([]) == 2
    assert (
        "with TRITON_INTERPRET=1 Triton interprets its kernels and compiles none" in capsys.readouterr().err
    )


def test_all_candidates_compute_the_same(smoke):
    for case in results.read(smoke)["cases"]:
        limit = {"float64": 1e-14, "float32": 1e-5}[case["dtype"]]
        for candidate in case["candidates"]:
            if candidate["kind"] in ("ours", "rival") and candidate["status"] == "ok":
                assert candidate["error"] < limit, (case["shape"], case["pass"], candidate)


def test_overhead_is_recorded(smoke):
    overhead = results.read(smoke)["overhead"]
    assert len(overhead) == len(shapes.OVERHEAD) * len(measure.MODES)
    assert [c["name"] for c in overhead[0]["candidates"]] == ["mi_kernels", "einsum", "F.bilinear"]


def test_report_has_tables_and_pictures(smoke, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "report.md"
    assert report.main([str(smoke), "--output", str(output), "--pictures", str(tmp_path / "pictures")]) == 0
    text = output.read_text()
    for expected in (
        "### Figures to reach",
        "### Call overhead",
        "### float32, forward+backward",
        "| tiny-odd",
    ):
        assert expected in text
    drawn = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(drawn) == 2 * 3 + 2  # bars for each dtype and pass, a roofline for each dtype
    for path in drawn:
        assert path.read_bytes().startswith(PNG) and f"(pictures/{path.name})" in text


def test_sweep_and_its_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.json"
    arguments = [
        "--sweep",
        "--suite",
        "smoke",
        "--dtype",
        "float32",
        "--pass",
        "forward",
        "--rivals",
        "einsum",
    ]
    assert run.main([*arguments, "--output", str(path), *TINY]) == 0
    cases = results.read(path)["cases"]
    assert {case["sweep"] for case in cases} == set("BZXO")
    assert report.main([str(path), "--output", str(tmp_path / "r.md"), "--pictures", str(tmp_path)]) == 0
    assert (tmp_path / "sweep-sweep-float32-forward.png").read_bytes().startswith(PNG)


def _case(ours, rivals, gemms, name="made", work="forward"):
    def candidate(name, kind, seconds):
        measured = {} if seconds is None else {"median_s": seconds, "q25_s": seconds, "q75_s": seconds}
        return {"name": name, "kind": kind, "status": "ok" if measured else "skipped: memory", **measured}

    candidates = [candidate("mi_kernels", "ours", ours)]
    candidates += [candidate(name, "rival", seconds) for name, seconds in rivals.items()]
    candidates += [candidate(f"mm {k}", "gemm", seconds) for k, seconds in enumerate(gemms)]
    return {"shape": {"name": name}, "dtype": "float32", "pass": work, "operations": 1, "bytes": 1,
            "candidates": candidates}  # fmt: skip


def test_ratios_and_figures_of_a_made_up_result():
    first = _case(2.0, {"einsum": 16.0, "x-first": 4.0, "e3nn": None}, [3.0, 2.0], "first")
    second = _case(4.0, {"einsum": 8.0, "x-first": 2.0}, [4.0, 16.0], "second")
    assert summary.ratios(first) == {"rival": 2.0, "gemm": 1.0, "fastest gemm": 1.0, "einsum": 8.0}
    assert summary.ratios(second) == {"rival": 0.5, "gemm": 1.0, "fastest gemm": 1.0, "einsum": 2.0}
    # The best rival of a rival is another one.
    assert summary.ratios(first, first["candidates"][2])["rival"] == 4.0
    rows = {row["figure"]: row for row in summary.figures([first, second])}
    assert math.isclose(rows[summary.RIVAL]["measured"], 1.0) and rows[summary.RIVAL]["reached"] is False
    assert rows[summary.RIVAL_WORST]["measured"] == 0.5 and rows[summary.RIVAL_WORST]["shape"] == "second"
    assert math.isclose(rows[summary.GEMM]["measured"], 1.0) and rows[summary.GEMM]["target"] == 1.0
    assert math.isclose(rows[summary.EINSUM]["measured"], 4.0)


def test_a_faster_gemm_than_mm_counts_apart():
    case = _case(2.0, {"einsum": 4.0}, [6.0])
    case["candidates"].append({"name": "oneDNN fp32", "kind": "onednn", "status": "ok", "median_s": 1.0})
    assert summary.ratios(case)["gemm"] == 3.0 and summary.ratios(case)["fastest gemm"] == 0.5
    assert summary.ratios(case)["rival"] == 2.0  # a yardstick is no rival
    rows = {row["figure"]: row["measured"] for row in summary.figures([case])}
    assert math.isclose(rows[summary.GEMM], 3.0) and math.isclose(rows[summary.FASTEST_GEMM], 0.5)


def test_threads_that_shared_a_core_are_noticed():
    case = {**_case(1.0, {"einsum": 1.0}, [1.0]), "operations": summary.LARGE}
    for candidate, cores in zip(case["candidates"], (1.95, 1.0, 1.0), strict=True):
        candidate["cores"] = cores
    assert summary.starved(case, 2) == ["mm 0"] and summary.starved(case, 1) == []
    assert summary.starved({**case, "operations": 1}, 2) == []


def test_onednn_computes_in_full_float32():
    """It would be no yardstick for float32 if it rounded to fewer bits."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    a, b = torch.randn(64, 300), torch.randn(32, 300)
    y = torch.nn.functional.linear(a.to_mkldnn(), b.to_mkldnn()).to_dense()
    exact = a.double() @ b.double().t()
    assert (y - exact).norm() < 1e-6 * exact.norm()


def test_figures_of_passes_are_apart_and_what_is_missing_is_none():
    alone = _case(1.0, {"einsum": None}, [], work="forward+backward")
    rows = {(r["pass"], r["figure"]): r for r in summary.figures([_case(1.0, {"einsum": 9.0}, [1.0]), alone])}
    assert math.isclose(rows["forward", summary.EINSUM]["measured"], 9.0)
    missing = rows["forward+backward", summary.EINSUM]
    assert missing["measured"] is None and missing["reached"] is None and missing["target"] == 4.0
    assert "not measured" in tables.figure_rows([missing])[0]
    assert tables.not_measured(alone) == "Not measured: einsum (skipped: memory)"


def test_overhead_figure_is_the_worse_mode_of_the_smallest_shape():
    def entry(shape, mode, ours):
        return {**_case(ours, {"einsum": 6.0, "F.bilinear": 1.0}, []), "shape": shape, "mode": mode}

    overhead = [entry("a", "forward, no grad", 2.0), entry("a", "forward, with grad", 8.0)]
    overhead += [entry("a", "forward+backward", 3.0), entry("b", "forward, no grad", 100.0)]
    rows = {row["pass"]: row for row in summary.figures([], overhead)}
    assert rows["forward"]["measured"] == 0.75 and rows["forward"]["reached"] is False
    assert rows["forward+backward"]["measured"] == 2.0 and rows["forward+backward"]["reached"] is True


def test_median_and_quartiles():
    assert timing.statistics_of([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median_s": 3.0, "q25_s": 2.0, "q75_s": 4.0}
    assert timing.statistics_of([7.0]) == {"median_s": 7.0, "q25_s": 7.0, "q75_s": 7.0}


def test_rounds_are_interleaved_and_slow_candidates_sit_out(monkeypatch):
    cost = {"fast": 0.001, "slow": 3.0}
    monkeypatch.setattr(
        timing, "sample", lambda start, calls, warm=False, clock=None: timing.Sample(cost[start], 1.0)
    )
    samples = list(timing.interleave({"fast": "fast", "slow": "slow"}, rounds=4, shortest=0.01, longest=7.0))
    assert [name for name, _, _ in samples[:2]] in (["fast", "slow"], ["slow", "fast"])
    assert sorted(name for name, _, _ in samples) == ["fast"] * 4 + ["slow"] * 2
    assert all(calls * sample.seconds >= 0.01 for _, calls, sample in samples)


@pytest.mark.parametrize(("name", "double"), [("large-256", 7), ("hypernetwork", 5)])
def test_gemm_does_as_many_operations_as_the_pass(name, double):
    entry = shapes.by_name([name])[0]
    sizes = measure.sizes_of(entry)
    for work in passes.PASSES:
        found = measure.count(entry, work, torch.float32).operations
        assert sum(peers.gemms(work, sizes)) * 2 * math.prod(sizes) == found
    assert sum(peers.gemms("double-backward", sizes)) == double


def _measure(rivals, **limits):
    entry = shapes.by_name(["tiny"])[0]
    settings = measure.Limits(rounds=1, shortest=0, **limits)
    case = measure.measure(entry, torch.float32, "forward+backward", rivals, settings)
    return {candidate["name"]: candidate for candidate in case["candidates"]}


def test_what_cannot_run_is_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: None)

    def broken(sizes):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer("broken", broken, lambda sizes: 0))
    found = _measure(["e3nn", "broken", "einsum"], memory=100)
    assert found["e3nn"]["status"] == "not installed: e3nn"
    assert found["broken"]["status"] == "fails: RuntimeError: no such kernel"
    assert found["einsum"]["status"] == "skipped: memory" and "median_s" not in found["einsum"]
    assert found["mm [O,ZX]"]["status"] == "skipped: memory"
    assert found["mi_kernels"]["status"] == "ok"


def test_what_would_take_too_long_is_predicted_and_skipped(monkeypatch):
    monkeypatch.setattr(measure, "PROBE_OPERATIONS", 1)
    monkeypatch.setattr(measure, "PROBE_PART", 2)
    found = _measure(["einsum"], call=0.0)
    assert found["einsum"]["status"].startswith("skipped: time") and found["einsum"]["predicted_s"] > 0


def test_einsum_is_not_secretly_opt_einsum(monkeypatch):
    seen = []
    einsum = torch.einsum
    monkeypatch.setattr(
        torch, "einsum", lambda *a: seen.append(torch.backends.opt_einsum.enabled) or einsum(*a)
    )
    _measure(["einsum"])
    assert seen and not any(seen)


def test_suites():
    assert len(shapes.FULL) >= 16 and len({entry.shape.name for entry in shapes.FULL}) == len(shapes.FULL)
    assert len(shapes.SUITES["quick"]) == 6 and len(shapes.SMOKE) == 3
    assert all(entry.origin for entry in shapes.FULL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "nowhere"], "no shape is called nowhere"),
        (["--rivals", "nobody"], "no rival is called 'nobody'"),
        (["--dtype", "int8"], "expected some of float64"),
        (["--pass", "sideways"], "expected some of forward"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--sweep", "--overhead"], "exclude each other"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_nothing_is_compared_while_tests_are_red(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_interaction.py").write_text("def test_red():\n    assert 1 == 2\n")
    output = tmp_path / "base.json"
    assert run.main(["--base", "HEAD", "--suite", "smoke", "--output", str(output)]) == 1
    assert "the tests of the operation are red" in capsys.readouterr().err
    assert not output.exists()


def test_unknown_revision():
    with pytest.raises(base.ComparisonError, match="'no-such-revision' is no revision"):
        with base.built("no-such-revision"):
            pass


def test_two_processes_measure_in_turns():
    cases = [(shapes.by_name(["tiny"])[0], torch.float32, work) for work in ("forward", "forward+backward")]
    found = list(base.compare(base.ROOT, cases, measure.Limits(rounds=2, shortest=1e-5)))
    assert [case["pass"] for case in found] == ["forward", "forward+backward"]
    for case in found:
        assert len(case["head"]["samples_s"]) == len(case["base"]["samples_s"]) == 2
        assert math.isclose(case["base_over_head"], case["base"]["median_s"] / case["head"]["median_s"])
    assert len(tables.base_rows({"cases": found})) == 2


@pytest.mark.parametrize(
    ("module", "options", "families"),
    [
        (gates, ["--shape", "small", "tokens-cached"], {"diagonal", "modulate"}),
        (hyper, ["--shape", "pairs"], {"shared", "generate", "apply"}),
        (heads, ["--shape", "nnconv-small", "apg-low-rank", "task"], {"edges", "samples", "tasks"}),
        (linear, ["--shape", "20-100x100"], {"outputs first", "outputs last"}),
        (
            linear,
            ["--family", "weight-gradient", "--pass", "forward", "--shape", "70-100x100"],
            {"weight gradient"},
        ),
    ],
    ids=["gates", "hyper", "heads", "linear", "weight gradients"],
)
def test_the_other_benchmarks_run(module, options, families, tmp_path, capsys):
    """Each candidate's results are compared with float64; the times of such a short run mean nothing."""
    output = tmp_path / "result.json"
    short = ["--rounds", "1", "--shortest", "0.0001", "--dtype", "float32", "--output", str(output)]
    assert module.main([*options, *short]) == 0
    found = results.read(output)["cases"]
    assert {case["family"] for case in found} >= families
    for case in found:
        for name, candidate in case["candidates"].items():
            assert candidate["median_s"] > 0 and candidate.get("error", 0) < 1e-5, name
    assert "geometric mean" in capsys.readouterr().out
