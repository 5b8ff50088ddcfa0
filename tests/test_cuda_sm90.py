"""The sm_90a engine without a GPU: its index functions, the engine itself on the machine of sm90/machine.h,
and what the compiler for 90a makes of it."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from cuda_objects import NVCC, ROOT, compiled

from mi_kernels.testing import sass
from mi_kernels.testing.kernel_sizes import EVERY, HALF, MMA, SM90, KernelSize

pytestmark = pytest.mark.build

COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(
    NVCC is None or sass.disassembler("cuobjdump") is None, reason="no nvcc or no cuobjdump"
)


def build(source: Path, program: Path, *flags: str | Path) -> Path:
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", *flags, "-o", program, source]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr == ""
    return program


def run(program: Path, *arguments: str, **options: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, **options)


@needs_compiler
def test_layouts_agree_with_the_documents(tmp_path):
    done = run(build(ROOT / "tests/sm90/layouts.cpp", tmp_path / "layouts", "-O1"))
    assert done.returncode == 0, done.stderr


def lines(cases: Iterable[tuple[KernelSize, str]]) -> str:
    """The calls as the programs in sm90/ read them."""
    return "".join(f"{' '.join(map(str, size.sizes))} {int(dtype == 'bfloat16')}\n" for size, dtype in cases)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return build(ROOT / "tests/sm90/engine.cpp", tmp_path_factory.mktemp("engine") / "engine", "-O2")


@needs_compiler
def test_the_engine_agrees_with_the_formula(engine):
    done = run(engine, "2")
    assert done.returncode == 0, done.stderr


def work(size: KernelSize) -> int:
    """Multiply-adds of the tiles, padding included."""
    groups, rows, context, width, out = size.sizes
    tile = size.kernel[0]
    return groups * -(-rows // 128) * 128 * -(-out // tile) * tile * -(-width // 64) * 64 * (context + 1)


needs_minutes = pytest.mark.skipif(
    "MI_KERNELS_TEST_MINUTES" not in os.environ, reason="takes minutes: with MI_KERNELS_TEST_MINUTES=1"
)


@needs_compiler
@pytest.mark.parametrize(
    ("least", "most"), [(0, 3e9), pytest.param(3e9, 1e10, marks=needs_minutes)], ids=("small", "large")
)
def test_the_engine_at_the_sizes(least, most, engine):
    """On the kernel and the number of blocks that each is launched on; the largest would take too long."""
    cases = [(size, dtype) for size in SM90 if least <= work(size) < most for dtype in size.dtypes]
    assert len(cases) >= 4
    done = run(engine, "calls", input=lines(cases))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(cases)} calls agree with the formula\n"


# What goes wrong on hardware only now and then: the machine has to notice each. (file, text, replacement)
FAULTS = {
    "operand overwritten while wgmma reads it": ("engine_sm90.cuh", "mma_wait<1>()", "mma_wait<2>()"),
    "sums read before wgmma is done": (
        "engine_sm90.cuh",
        "mma_wait<0>();\n      M::hold(left)",
        "mma_wait<1>()",
    ),
    "stage released while wgmma reads it": (
        "engine_sm90.cuh",
        "release(ring.stage == 0 ? Shape::kStages - 1 : ring.stage - 1);\n    advance",
        "release(ring.stage);\n    advance",
    ),
    "no wait for the weights": ("engine_sm90.cuh", "    wait();\n    M::mma_fence();", "    M::mma_fence();"),
    "no wait for the operand": ("engine_sm90.cuh", "    wait();\n    MI_UNROLL", "    MI_UNROLL"),
    "wrong parity": ("engine_sm90.cuh", "ring.phase ^ 1", "ring.phase"),
    "no fence before wgmma": ("engine_sm90.cuh", "wait();\n    M::mma_fence();", "wait();"),
    "no fence before the copy of the result": (
        "engine_sm90.cuh",
        "M::shared_fence();\n    M::sync_warpgroup",
        "M::sync_warpgroup",
    ),
    "no fence between ldmatrix and the next copy": (
        "engine_sm90.cuh",
        "M::shared_fence();\n    release(ring.stage);",
        "release(ring.stage);",
    ),
    "fence after the stage was released": (
        "engine_sm90.cuh",
        "M::shared_fence();\n    release(ring.stage);",
        "release(ring.stage);\n    M::shared_fence();",
    ),
    "result overwritten while it is copied": ("engine_sm90.cuh", "if (thread == 0) M::store_wait();", ""),
    "the other block's consumers are not asked": (
        "engine_sm90.cuh",
        "kConsumerWarps * Shape::kCluster",
        "kConsumerWarps",
    ),
    "both blocks load the same half": ("engine_sm90.cuh", "tile.out + rank * kShare", "tile.out"),
    "sums written over stages that are still read": ("engine_sm90.cuh", "M::sync_consumers();", ""),
    "another swizzle": ("sm90_layout.h", "(address >> 3) & 0x70", "(address >> 3) & 0x30"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_notices(fault, tmp_path):
    name, text, replacement = FAULTS[fault]
    for folder in ("csrc", "tests/sm90"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    source = tmp_path / "csrc/cuda" / name
    assert text in source.read_text()
    source.write_text(source.read_text().replace(text, replacement))
    program = build(tmp_path / "tests/sm90/engine.cpp", tmp_path / "engine", "-O0", "-DMI_FEW")
    done = run(program, "2")
    assert done.returncode == 1, "nothing was noticed"
    assert done.stderr


@needs_compiler
def test_the_sizes_choose_the_kernels_they_name(tmp_path):
    """By the plan and the checks of alignment; between them they reach every kernel there is."""
    program = build(ROOT / "tests/sm90/choices.cpp", tmp_path / "choices", "-O1", ROOT / "csrc/cuda/plan.cpp")
    cases = [(size, dtype) for size in (*SM90, *MMA) for dtype in size.dtypes if dtype in HALF]
    done = run(program, input=lines(cases))
    assert done.returncode == 0, done.stderr
    reached = set()
    for (size, dtype), answer in zip(cases, done.stdout.splitlines(), strict=True):
        if size.kernel is None:
            assert answer == "the plan prefers another engine", (size, dtype)
            continue
        assert re.match(r"\d", answer), (size, dtype, answer)
        out, cluster, split, blocks = map(int, answer.split())
        assert (out, cluster, split) == size.kernel, (size, dtype)
        reached.add((out, "split" if split > 1 else cluster, "BF16" if dtype == "bfloat16" else "F16"))
        if "many" in size.name:
            groups, rows, _, _, columns = size.sizes
            tiles = groups * -(-rows // (128 * cluster)) * -(-columns // out)
            assert tiles > blocks // cluster, size
    assert reached == KERNELS
    assert all(size.dtypes == EVERY for size in MMA)


SOURCE = "interaction_sm90.cu"
# Every kernel in it: outputs per tile, blocks of a cluster (or split), element type.
KERNELS = {(out, cluster, "BF16") for out in (64, 128, 256) for cluster in (1, 2)}
KERNELS |= {(out, cluster, "F16") for out in (64, 128) for cluster in (1, 2)}
KERNELS |= {(out, "split", dtype) for out in (64, 128) for dtype in ("BF16", "F16")}


def compile_kernels() -> tuple[str, dict[tuple, str]]:
    """What nvcc says of the kernels, and their machine code by what KERNELS has."""
    path, report = compiled(SOURCE)[SOURCE]
    kernels = {}
    for text in re.split(r"Function : ", sass.text_of(path))[1:]:
        name = re.search(r"(Bf16|F16)ENS\d_5ShapeILi(\d+)ELi(\d)ELb(\d)E", text.split("\n", 1)[0])
        cluster = "split" if name[4] == "1" else int(name[3])
        kernels[int(name[2]), cluster, name[1].upper()] = text
    return report, kernels


def check_resources(report: str, kernels: dict[tuple, str]) -> None:
    assert set(kernels) == KERNELS
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(KERNELS)
    assert "erialized" not in report and "warning" not in report.lower(), report
    for text in kernels.values():
        assert not re.search(r"\b(LDL|STL)\b", text), "local memory"
        # setmaxnreg gives a consumer 232.
        assert max(int(r) for r in re.findall(r"\bR(\d+)\b", text)) < 232


def check_instructions(kernels: dict[tuple, str]) -> None:
    for (out, cluster, dtype), text in kernels.items():
        products = re.findall(r"HGMMA\.64x(\d+)x16\.F32(\.BF16)? R\d+, (R\d+), gdesc", text)
        assert len(products) == text.count("HGMMA"), "a left operand is not in registers"
        # Scaled: even and odd steps, the one that is left, and that of U. Exact: a step, and that of U.
        assert len(products) == 4 * (4 if dtype == "BF16" else 2)
        assert {(int(n), bf16 == ".BF16") for n, bf16, _ in products} == {(out, dtype == "BF16")}
        loads = re.findall(r"UTMALDG\.4D(\.MULTICAST)?", text)
        assert len(loads) == 5 and loads.count(".MULTICAST") == (3 if cluster == 2 else 0)  # x, z; W, U, V
        assert ("UTMASTG.4D" in text) == (cluster != "split") and "USETMAXREG" in text
        assert ("UCGABAR_ARV" in text) == (cluster != 1)
        # The barriers are initialised; x is read, z is; the result is written. None in a step.
        assert text.count("FENCE.VIEW.ASYNC.S") == (3 if cluster == "split" else 4)


def check_hazards(kernels: dict[tuple, str]) -> None:
    """No left operand is overwritten while a wgmma may read it."""
    for key, text in kernels.items():
        found = list(sass.loops(text))
        assert found, f"{key}: no loop with wgmma from registers"
        assert [loop.hazards for loop in found if loop.hazards] == [], key


@needs_nvcc
def test_what_the_compiler_makes_of_it():
    """No spills; the tensor cores and the copy engine are used as meant; no hazard."""
    report, kernels = compile_kernels()
    check_resources(report, kernels)
    check_instructions(kernels)
    check_hazards(kernels)


@needs_nvcc
def test_launches_in_a_fresh_thread(tmp_path):
    """The kernel that was chosen, its cluster and shared memory; no tensor map before there is a context."""
    launcher, _ = compiled(SOURCE)[SOURCE]
    program = tmp_path / "launches"
    command = [NVCC, "-std=c++20", "-Xlinker", "--wrap=cudaFuncSetAttribute,--wrap=cudaLaunchKernelExC"]
    command += ["-o", program, ROOT / "tests/sm90/launches.cpp", launcher]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    cases = [(size, dtype) for size in SM90 for dtype in size.dtypes]
    done = run(program, input=lines(cases))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(cases)} launches as chosen\n"
