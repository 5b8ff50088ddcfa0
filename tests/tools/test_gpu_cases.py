"""The measurements of `make gpu-check` on the CPU: what is saved, what fails, what a wrong result costs."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import cases, environment, measure, peers, results, timing
from benchmarks.suites import gates, hyper, shapes
from mi_kernels import backends
from tools import gpu, gpu_cases, gpu_figures

pytestmark = pytest.mark.tools


def test_the_clock_is_chosen_by_device():
    assert gpu.clock_of("cpu") is timing.wall
    calls = []
    sample = timing.sample(
        lambda: "run", 3, clock=lambda run, n: calls.append((run, n)) or timing.Sample(2.0, 1.0)
    )
    assert sample.seconds == 2.0 and calls == [("run", 3)]
    taken = list(
        timing.interleave({"a": lambda: "run"}, 2, 1.0, 9.0, clock=lambda *_: timing.Sample(2.0, 1.0))
    )
    assert [(name, calls) for name, calls, _ in taken] == [("a", 1)] * 2


def test_each_backend_of_ours_is_measured():
    place = measure.Environment("cpu", timing.wall, ("portable", "reference"))
    limits = measure.Limits(rounds=1, shortest=0)
    entry = shapes.by_name(["tiny"])[0]
    case = measure.measure(entry, torch.float32, "forward+backward", ["einsum"], limits, place)
    found = {c["name"]: c for c in case["candidates"] if c["kind"] == "ours"}
    assert set(found) == {"mi_kernels portable", "mi_kernels reference"}
    assert all(c["error"] < 1e-5 and c["median_s"] > 0 for c in found.values())


def test_modulation_is_measured_on_each_backend():
    place = measure.Environment("cpu", timing.wall, ("portable", "reference"))
    case = next(gates.modulations())
    result = _empty([])
    gpu_cases._measure(("modulate", case, torch.float32, "forward"), place, result, lambda found: None)
    assert [entry["backend"] for entry in result["gates"]] == ["portable", "reference"]
    result["gates"] = [entry | {"name": "tokens"} for entry in result["gates"]]
    result["ceilings"] = {"copy_bytes_per_s": 1e9}
    shares = [row for row in gpu_figures.figures(result) if "bandwidth" in row["figure"]]
    assert len(shares) == 2 and all(row["measured"] > 0 for row in shares)


def test_names_of_files():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def _empty(unmeasured):
    result = {"ceilings": None, "cases": [], "gates": [], "broken": {}, "figures": [], "under way": None}
    return result | {"unmeasured": list(unmeasured), "backends": {"portable": None}}


@pytest.fixture
def two_steps(monkeypatch):
    """The benchmark on the CPU, of one tiny shape, with what a GPU would have beside."""
    steps = [
        ("dense", shapes.by_name(["tiny"])[0], torch.bfloat16, work) for work in measure.passes.PASSES[:2]
    ]
    monkeypatch.setattr(gpu_cases, "steps", lambda device: iter(steps))
    monkeypatch.setattr(gpu_cases, "RIVALS", ("einsum",))
    ceilings = environment.ceilings
    monkeypatch.setattr(
        environment, "ceilings", lambda dtypes, _, *rest: ceilings(dtypes, 32, 0.01, *rest[1:])
    )
    return [gpu_cases.name_of(step) for step in steps]


def _measure_all(result, save=lambda found: None, names=("portable",), seconds=60.0):
    return gpu_cases.measure_all(time.monotonic() + seconds, "cpu", list(names), result, save)


def test_results_are_saved_as_they_come(two_steps, monkeypatch):
    saved = []
    result = _empty(two_steps)
    assert _measure_all(result, lambda r: saved.append((len(r["cases"]), len(r["figures"]) > 0)))
    assert saved[-1] == (2, True) and (1, True) in saved
    assert result["unmeasured"] == [] and result["ceilings"]["copy_bytes_per_s"] > 0
    monkeypatch.setattr(measure, "measure", lambda *arguments: 1 / 0)
    result = _empty(two_steps)
    assert _measure_all(result) and result["broken"] == dict.fromkeys(
        two_steps, "ZeroDivisionError: division by zero"
    )
    result = _empty(two_steps)
    assert _measure_all(result, seconds=0) and result["unmeasured"] == two_steps


@pytest.fixture
def failing(monkeypatch):
    """The backend `reference` fails before anything is measured."""
    attempt = gpu_cases._try

    def fail(*arguments):
        if backends.choose(torch.empty(0)) == "reference":
            raise RuntimeError("an illegal memory access")
        attempt(*arguments)

    monkeypatch.setattr(gpu_cases, "_try", fail)


def test_a_backend_that_fails_costs_no_other(two_steps, failing):
    result = _empty(two_steps)
    assert _measure_all(result, names=("reference", "portable"))
    assert list(result["broken"]) == [f"{step} on reference" for step in two_steps]
    for case in result["cases"]:
        assert [c["name"] for c in case["candidates"] if c["kind"] == "ours"] == ["mi_kernels portable"]
    assert len(result["cases"]) == 2 and result["unmeasured"] == []


def test_a_backend_that_fails_while_it_is_timed_costs_no_other(monkeypatch):
    def fail(*arguments):
        if backends.choose(torch.empty(0)) == "reference":
            raise RuntimeError("no memory")
        return {"candidates": {cases.OURS: {"error": 0.0}}}

    monkeypatch.setattr(gpu_cases.cases, "measure", fail)
    result, place = _empty([]), measure.Environment("cpu", timing.wall, ("reference", "portable"))
    step = ("modulate", next(gates.modulations()), torch.float32, "forward")
    gpu_cases._measure(step, place, result, lambda found: None)
    assert [found["backend"] for found in result["gates"]] == ["portable"]
    assert result["broken"] == {f"{gpu_cases.name_of(step)} on reference": "RuntimeError: no memory"}


@pytest.mark.parametrize("phase", ["checked", "timed"])
def test_a_backend_that_fails_in_the_middle_of_a_case_costs_its_own_row(phase, two_steps, monkeypatch):
    """After the trial: in the check against float64, or when it is timed."""
    monkeypatch.setattr(gpu_cases, "ruined", lambda device: False)
    calls, ours = [], measure._ours

    def backend_of_ours(name):
        def call(*arguments):
            calls.append(name)
            if name == "reference" and calls.count(name) > (0 if phase == "checked" else 4):
                raise RuntimeError("no memory")
            return ours(name)(*arguments)

        return call

    monkeypatch.setattr(measure, "_ours", backend_of_ours)
    result = _empty(two_steps[:1])
    assert _measure_all(result, names=("reference", "portable"))
    assert result["broken"] == {f"{two_steps[0]} on reference": "fails: RuntimeError: no memory"}
    rows = {c["name"]: c for c in result["cases"][0]["candidates"]}
    assert rows["mi_kernels portable"]["median_s"] > 0 and rows["einsum"]["median_s"] > 0
    assert "median_s" not in rows["mi_kernels reference"] and result["unmeasured"] == []
    # Where it takes the GPU with it, the case is left to the next process, which leaves that backend out.
    calls.clear()
    monkeypatch.setattr(gpu_cases, "ruined", lambda device: bool(result["broken"]))
    result = _empty(two_steps[:1])
    assert not _measure_all(result, names=("reference", "portable"))
    assert result["cases"] == [] and result["unmeasured"] == two_steps[:1]


def test_a_ruined_process_is_left_and_the_next_goes_on(two_steps, failing, monkeypatch):
    monkeypatch.setattr(gpu_cases, "ruined", lambda device: len(result["broken"]) > len(result["cases"]))
    result = _empty(two_steps)
    assert not _measure_all(result, names=("reference", "portable"))
    assert list(result["broken"]) == [f"{two_steps[0]} on reference"] and result["unmeasured"] == two_steps
    monkeypatch.setattr(gpu_cases, "ruined", lambda device: False)
    assert _measure_all(result, names=("reference", "portable"))
    assert len(result["cases"]) == 2 and result["unmeasured"] == [] and len(result["broken"]) == 2


def test_the_process_measures_what_is_left(two_steps, tmp_path):
    path = tmp_path / "result.json"
    results.write(path, _empty(two_steps[1:]))
    assert gpu_cases.main([str(path), "cpu", str(time.monotonic() + 60)]) == 0
    result = results.read(path)
    assert [case["pass"] for case in result["cases"]] == ["forward+backward"] and result["unmeasured"] == []


def _candidates(ours, *rivals):
    return [{"name": "mi_kernels triton", "kind": "ours", "status": "ok", "error": ours}] + [
        {"name": str(k), "kind": "rival", "status": "ok", "error": error} for k, error in enumerate(rivals)
    ]


@pytest.mark.parametrize(
    ("ours", "rivals", "dtype", "right"),
    [
        (0.005, (0.003, 0.02), torch.bfloat16, True),
        (0.02, (0.003, 0.02), torch.bfloat16, False),
        (0.02, (), torch.bfloat16, False),
        (2e-7, (1e-9,), torch.float32, True),
        (1e-5, (1e-6,), torch.float32, False),
        (float("nan"), (0.003,), torch.bfloat16, False),
        (0.005, (float("nan"), 0.003), torch.bfloat16, True),
    ],
)
def test_an_error_above_twice_the_best_rivals_is_wrong(ours, rivals, dtype, right):
    found = _candidates(ours, *rivals)
    assert (gpu_cases._wrong(found[0], found, dtype) is None) == right
    assert gpu_cases._wrong(found[0] | {"status": "fails"}, found, dtype) is None  # which is said already


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_a_wrong_kernel_fails_its_case_and_no_other(backend, two_steps, monkeypatch):
    ours = measure._ours

    def wrong(name):
        return (lambda *a: 1.03 * ours(name)(*a)) if name == backend else ours(name)

    monkeypatch.setattr(measure, "_ours", wrong)
    result = _empty(two_steps)
    assert _measure_all(result, names=("reference", "portable"))
    assert list(result["broken"]) == [f"{step} on {backend}" for step in two_steps]
    assert all("wrong: error 0.0" in reason for reason in result["broken"].values())
    assert len(result["cases"]) == 2 and result["unmeasured"] == []


def test_wrong_modulation_fails_too(monkeypatch):
    case = next(gates.modulations())
    functions = case.functions | {cases.OURS: lambda x, s, t: case.functions[cases.OURS](x, s, t) * 1.05}
    result, place = _empty([]), measure.Environment("cpu", timing.wall, ("portable",))
    step = ("modulate", replace(case, functions=functions), torch.bfloat16, "forward")
    gpu_cases._measure(step, place, result, lambda found: None)
    assert result["gates"] == [] and "wrong: error" in next(iter(result["broken"].values()))


def test_segments_are_measured_against_a_grouped_product():
    (case,) = hyper.ragged("cuda" if torch.cuda.is_available() else "meta", [("small", 3, 4, 5, 8, 8)])
    assert "grouped_mm" in case.functions
    (case,) = hyper.ragged("cpu", [("small", 3, 4, 5, 8, 8)])
    assert "grouped_mm" not in case.functions
    result, place = _empty([]), measure.Environment("cpu", timing.wall, ("portable",))
    for work in cases.PASSES:
        gpu_cases._measure(("segments", case, torch.bfloat16, work), place, result, lambda found: None)
    assert len(result["gates"]) == 2 and result["broken"] == {}


def test_a_grouped_product_of_pytorch_is_the_same_function(monkeypatch):
    """On the CPU, to which the case for a GPU is brought."""
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a: to(t, *(x for x in a if x != "cuda")) if a != ("cuda",) else t
    )
    (case,) = hyper.ragged("cuda", [("small", 3, 4, 5, 8, 8)])
    arguments = case.arguments(torch.bfloat16, 0)
    found, expected = (case.functions[name](*arguments).float() for name in ("grouped_mm", "F.linear loop"))
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_a_rival_that_does_not_run_costs_no_figure():
    case = next(gates.modulations())
    functions = case.functions | {"broken": lambda *a: 1 / 0}
    found = cases.measure(
        replace(case, functions=functions), torch.float32, "forward", gpu_cases.gate_options(False)
    )
    assert found["failures"] == {"broken": "ZeroDivisionError: division by zero"}
    assert "broken" not in found["candidates"] and found["best_rival_over_ours"] > 0


def test_rivals_of_a_gpu_say_what_they_lack():
    for name in peers.GPU_PEERS:
        assert "cuequivariance-ops-torch" in (peers.find(name).missing() or "cuequivariance-ops-torch")
    with pytest.raises(ValueError, match="no rival is called 'typo'"):
        peers.find("typo")


def test_a_plain_product_by_triton_is_a_limit(monkeypatch):
    """Its launches, on tensors without data: one product forward, three with backward."""
    pytest.importorskip("triton")
    from mi_kernels.ops.triton.launch import recording

    monkeypatch.setattr(
        torch, "Generator", lambda device: type("G", (), {"manual_seed": lambda s, n: None})()
    )
    for work, products in (("forward", 1), ("forward+backward", 3)):
        with recording((9, 0)) as launches:
            peers.triton_gemm(work, peers.Sizes(256, 4, 32, 128), torch.bfloat16, "meta")()
        assert len(launches) >= products
    entry = shapes.by_name(["tiny"])[0]
    operands = measure.passes.random_operands(measure.sizes_of(entry), torch.bfloat16)
    for device, there in (("cpu", False), ("cuda", True)):
        place = measure.Environment(device, timing.wall, ("triton",))
        monkeypatch.setattr(peers, "gemm", lambda *a: None)
        monkeypatch.setattr(peers, "triton_gemm", lambda *a: None)
        monkeypatch.setattr(measure, "_ours", lambda name: None)
        arguments = (
            measure.sizes_of(entry),
            torch.bfloat16,
            "forward",
            [],
            operands,
            measure.Limits(),
            place,
        )
        kinds = {c.name: c.kind for c in measure._candidates(*arguments)}
        assert (kinds.get(measure.TRITON) == "limit") == there


def test_names_of_steps_do_not_depend_on_the_device():
    names = [gpu_cases.name_of(step) for step in gpu_cases.steps()]
    assert len(set(names)) == len(names) and "segments segments-wide torch.bfloat16 forward" in names
