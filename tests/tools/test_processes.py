"""First calls, changes of threads, two processes (benchmarks/suites/processes.py), and counts of tasks."""

import math
import shutil

import pytest
import torch

import mi_kernels as mi
from benchmarks.harness import process, results, scaling
from benchmarks.suites import processes, shapes
from mi_kernels import libraries

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
ENTRIES = (*shapes.FULL, *shapes.SMOKE)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def calls(dtypes=DTYPES):
    return [
        (primitive, tuple(scaling.sizes_of(entry)), dtype)
        for entry in ENTRIES
        for dtype in dtypes
        for primitive in scaling.PRIMITIVES
    ]


@pytest.mark.parametrize(
    ("costs", "threads", "longest"),
    [
        ([1, 1, 1, 1], 2, 2),
        ([1, 1, 1], 2, 2),
        ([1, 1, 5], 2, 6),  # in the order in which they are taken, not the largest first
        ([5, 1, 1], 2, 5),
        ([3, 2], 64, 3),
        ([], 2, 0),
    ],
)
def test_a_free_thread_takes_the_next_task(costs, threads, longest):
    assert scaling.longest_share(costs, threads) == longest


@pytest.mark.build
@needs_compiler
@pytest.mark.parametrize("isa", scaling.VECTOR_BYTES)
def test_tasks_cover_the_call(isa):
    """As many boxes as the plan has tasks, and together, but for the padding, the operations of the call."""
    for (primitive, sizes, dtype), division in zip(calls(), scaling.divisions(calls(), isa), strict=True):
        costs = division.costs()
        assert len(costs) == division.tasks, (primitive, sizes, dtype)
        exact = division.factor * math.prod(extent for extent, _, _ in division.axes)
        # A product of a multiply and an add for each of B, Z, X, O; `split` has one for each gradient.
        products = 2 * math.prod(sizes) * (2 if division.form == "split" else 1)
        assert exact == products and sum(costs) >= exact, (primitive, sizes, dtype)
        assert division.longest(1) == sum(costs) and division.efficiency(1) == 1


@pytest.mark.build
@needs_compiler
@pytest.mark.skipif(libraries.cpu_error is not None, reason="the compiled library is not installed")
def test_the_library_divides_likewise():
    """Its scratch memory, which is a worker's as often as threads have tasks, tells how many there are."""
    flags = {"forward": 1, "input_grads": 1 | 16 | 32, "weight_grads": 1}
    before = torch.get_num_threads()
    try:
        for (primitive, sizes, dtype), division in zip(calls(), scaling.divisions(calls()), strict=True):
            for threads in (1, 3, 64):
                torch.set_num_threads(threads)
                text = torch.ops.mi_kernels.cpu_interaction_plan(
                    primitive, [1, *sizes], dtype, flags[primitive]
                )
                found = dict(field.split("=") for field in text.split(";"))
                if found["algorithm"] == "materialised":
                    break  # several products, of which each is divided by itself
                workers = min(threads, division.tasks) if division.operations >= scaling.SHARED else 1
                scratch = workers * division.worker_bytes + division.partial_bytes + 64
                case = primitive, sizes, dtype, threads
                assert (found["algorithm"], int(found["scratch"])) == (division.form, scratch), case
    finally:
        torch.set_num_threads(before)


@pytest.mark.build
@needs_compiler
def test_two_threads_share_evenly():
    """Every call of the named shapes that is worth sharing, by counts."""
    for call, division in zip(calls(), scaling.divisions(calls()), strict=True):
        if division.operations >= scaling.SHARED:
            assert division.tasks >= 2 and division.efficiency(2) > scaling.ENOUGH, call


def test_forms_agree():
    """What is compared computes the same."""
    for form in process.FORMS.values():
        tensors = [torch.randn(size, dtype=torch.float64) for size in form.sizes(3, 4)]
        torch.testing.assert_close(
            form.ours(mi, *tensors), form.rival(torch, *tensors), rtol=1e-12, atol=1e-12
        )


@pytest.mark.build
@pytest.mark.subprocess
@needs_compiler
def test_the_smallest_run(tmp_path, capsys):
    output = tmp_path / "found.json"
    options = "--form glu --rounds 1 --changes 1 --seconds 0.01 --divisor 16".split()
    assert processes.main([*options, "--output", str(output)]) == 0
    found = results.read(output)
    assert [one["module"] for one in found["imports"]] == ["torch", "mi_kernels", "torch._dynamo"]
    assert [one["pass"] for one in found["first"]] == ["forward", "forward+backward"]
    assert {(one["rows"], one["to"]) for one in found["switch"]} == {(32, 1), (32, 2)}
    assert {one["threads"] for one in found["pairs"]} == {1, 2}
    assert all(one["ours_alone"] > 0 and one["rival_together"] > 0 for one in found["pairs"])
    assert {one["shape"] for one in found["scaling"]} == {entry.shape.name for entry in shapes.SMOKE}
    assert all(len(one["efficiency"]) == len(scaling.THREADS) for one in found["scaling"])
    assert "two of ours / of the rival" in capsys.readouterr().out


@pytest.mark.build
@pytest.mark.subprocess
@needs_compiler
@pytest.mark.skipif(libraries.cpu_error is not None, reason="the compiled library is not installed")
@pytest.mark.skipif(processes.libgomp() is None, reason="torch's OpenMP library is not that of GNU")
def test_parallel_regions(capsys):
    """Each waits for its last thread: a kernel has one, a call fewer than PyTorch's form."""
    assert processes.main("--part regions --form gated_interaction diagonal glu".split()) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    found = {(row[0].strip(), row[1].strip()): [int(cell) for cell in row[3:]] for row in lines[2:]}
    assert set(found) == {
        ("gated_interaction", "64,64"), ("diagonal", "64,64"), ("glu", "64,64"), ("diagonal", "2048,256"),
        ("glu", "512,512"),
    }  # fmt: skip
    for case in (("gated_interaction", "64,64"), ("diagonal", "2048,256"), ("glu", "512,512")):
        forward, both, rival_forward, rival_both = found[case]
        assert forward == 1 < both < rival_both and rival_forward >= 1, case


@pytest.mark.subprocess
def test_a_process_that_ends_is_reported():
    with processes.Process() as one:
        with pytest.raises(RuntimeError, match="a measured process ended with status 1"):
            one.ask("import", module="no_such_module")
