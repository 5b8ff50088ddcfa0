"""The selections of tests: what each keeps, and that there is time to compile the kernels for a GPU."""

import subprocess
import sys
from collections import namedtuple
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import environment_of_pytest
from rehearsed import described, lines_of, without_data
from selection import cover, features_of, thinned

from mi_kernels import backends
from mi_kernels.testing.samples import LAYOUTS, MIDDLE, ODD, GateSample, Sample, lay_out

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tools import gpu_tests  # noqa: E402

pytestmark = pytest.mark.tools

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of one backend. A kernel takes about 0.65 s of a core to compile, in Triton and in the C of its launcher.
MOST_TESTS, MOST_KERNELS = 950, 1250  # kernels: of the tests of values and gradients, by which most are made
PART = "error_rule or test_values or generate"


def test_every_value_and_every_pair_of_words_is_kept():
    cases = [
        features_of({"number": n, "dtype": d, "plan": p}) for n, d, p in product(range(30), DTYPES, "ab")
    ]
    kept = [cases[index] for index in cover(cases)]
    assert {case["number"] for case in kept} == {case["number"] for case in cases} and len(kept) == 30
    assert {(case["dtype"], case["plan"]) for case in kept} == {*product(DTYPES, "ab")}


def test_samples_count_by_their_fields():
    samples = [Sample(shape, layout=layout) for shape in (ODD, MIDDLE) for layout in LAYOUTS]
    cases = [features_of({"sample": sample, "dtype": d}) for sample in samples for d in DTYPES]
    kept = [cases[index] for index in cover(cases)]
    assert len(kept) == len(LAYOUTS) * len(DTYPES) and len({case["sample.shape"] for case in kept}) == 2
    assert features_of({"sample": GateSample("diagonal", ODD, "A")})["sample.op"] == "diagonal"


Item = namedtuple("Item", "path originalname callspec")
Called = namedtuple("Called", "params")


def test_what_runs_without_a_gpu_is_left_out():
    def item(name, **parameters):
        return Item(Path("tests/test_a.py"), name, Called(parameters))

    items = [item("test_a", place="gpu"), item("test_gradcheck", place="gpu"), item("test_a", dtype="d")]
    assert thinned(items, "gpu") == (items[:1], items[1:])
    assert thinned(items, "fast") == thinned(items, None) == (items, [])
    many = [item("test_a", place="cpu", dtype=d, plan=p) for d in DTYPES[:2] for p in range(20)]
    kept, left_out = thinned([*many, *items], "fast")
    assert kept[-3:] == items and len(kept) == 20 + 3 and len(left_out) == 20
    assert {i.callspec.params["dtype"] for i in kept[:20]} == {*DTYPES[:2]}
    portable = [item("test_a", place="portable", dtype=d, plan=p) for d in DTYPES[:2] for p in range(20)]
    kept, left_out = thinned([*many, *portable], None)
    assert kept[:-20] == many and len(left_out) == 20


def pytest_on(tmp_path, *options, **variables):
    files = [str(ROOT / name) for name in gpu_tests.files()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    variables = {"MI_KERNELS_TEST_SELECTION": "gpu", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [*command, *options, *files],
        cwd=ROOT,
        env=environment_of_pytest(**variables),
        capture_output=True,
        text=True,
    )


rehearsal = pytest.mark.skipif(backends.interpreting(), reason="the kernels are made for the interpreter")


@rehearsal
def test_the_kernels_are_few_enough_to_compile(tmp_path):
    """Rehearsed without a GPU. A product of parameters that the selection does not thin out fails here."""
    pytest.importorskip("triton")
    path = tmp_path / "kernels"
    done = pytest_on(tmp_path, "-m", "not slow", "-k", PART, MI_KERNELS_TEST_REHEARSED=str(path))
    assert done.returncode == 0, done.stdout[-3000:]
    lines = lines_of(path)
    kernels = {line["key"] for line in lines}
    assert 500 < len(kernels) <= MOST_KERNELS
    names = {line["kernel"] for line in lines}
    assert names >= {
        "interaction",
        "weight_grads",
        "softmax_gate",
        "_modulate_kernel",
        "_modulate_grads_kernel",
    }
    tests = "".join(line["test"] for line in lines)
    for word in (
        *map(str, DTYPES),
        *LAYOUTS[1:],
        "diagonal",
        "gated_interaction",
        "per_x",
        "per_z",
        "softmax",
    ):
        assert word in tests


@rehearsal
def test_the_tests_are_few_enough_and_of_the_places_asked_for(tmp_path):
    variables = {"MI_KERNELS_TEST_REHEARSED": str(tmp_path / "kernels"), "MI_KERNELS_TEST_PLACES": "triton"}
    done = pytest_on(tmp_path, "-m", "not slow", "--collect-only", **variables)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert 500 < len(found) <= MOST_TESTS and all("[triton" in line for line in found), done.stdout[-2000:]
    done = pytest_on(tmp_path, "--collect-only", **variables | {"MI_KERNELS_TEST_PLACES": "cuda-cuda"})
    assert done.returncode != 0
    assert "MI_KERNELS_TEST_PLACES: expected some of triton, got cuda-cuda" in done.stdout + done.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stand_ins_lie_as_the_arguments_do(layout):
    tensor = lay_out(torch.randn(3, 4, 6, dtype=torch.float16), layout)
    stand_in = without_data(tensor)
    assert described(stand_in) == described(tensor) and stand_in.device.type == "meta"
