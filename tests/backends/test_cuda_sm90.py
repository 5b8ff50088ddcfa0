"""The sm_90a engine without a GPU: its layouts, the engine on the emulator of sm90/, its machine code."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from cuda_objects import NVCC, ROOT, compiled

from mi_kernels.testing.kernel_sizes import EVERY, HALF, MMA, SM90, KernelSize

sys.path.insert(0, str(ROOT))

from tools import sass

pytestmark = pytest.mark.build

COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(
    NVCC is None or sass.disassembler("cuobjdump") is None, reason="no nvcc or no cuobjdump"
)


def build(source: Path, program: Path, *flags: str | Path) -> Path:
    csrc = source.parents[2] / "csrc"
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", "-I", csrc, *flags, "-o", program, source]
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
    """The calls in the format that the programs in sm90/ read."""
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
    """With the kernel and grid that each is launched with; the largest would take too long."""
    cases = [(size, dtype) for size in SM90 if least <= work(size) < most for dtype in size.dtypes]
    assert len(cases) >= 4
    done = run(engine, "calls", input=lines(cases))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(cases)} calls agree with the formula\n"


# Races that hardware shows only now and then; the emulator has to notice each. (file, text, replacement)
FAULTS = {
    "operand overwritten while wgmma reads it": ("engine.cuh", "wgmma_wait<1>()", "wgmma_wait<2>()"),
    "accumulators read before wgmma is done": (
        "engine.cuh",
        "wgmma_wait<0>();\n      Arch::fence_operand(a)",
        "wgmma_wait<1>()",
    ),
    "stage released while wgmma reads it": (
        "engine.cuh",
        "if (!first) release_previous()",
        "if (!first) release(state.stage)",
    ),
    "no wait for the weights": (
        "engine.cuh",
        "    wait();\n    Arch::wgmma_fence();",
        "    Arch::wgmma_fence();",
    ),
    "no wait for the operand": ("engine.cuh", "    wait();\n    MI_UNROLL", "    MI_UNROLL"),
    "wrong parity": ("engine.cuh", "state.phase ^ 1", "state.phase"),
    "no fence before wgmma": ("engine.cuh", "wait();\n    Arch::wgmma_fence();", "wait();"),
    "no fence before the copy of the result": (
        "engine.cuh",
        "Arch::fence_async_proxy();\n    Arch::sync_warpgroup",
        "Arch::sync_warpgroup",
    ),
    "no fence between ldmatrix and the next copy": (
        "engine.cuh",
        "Arch::fence_async_proxy();\n    release(state.stage);",
        "release(state.stage);",
    ),
    "fence after the stage was released": (
        "engine.cuh",
        "Arch::fence_async_proxy();\n    release(state.stage);",
        "release(state.stage);\n    Arch::fence_async_proxy();",
    ),
    "result overwritten while it is copied": (
        "engine.cuh",
        "if (thread == 0) Arch::tma_store_wait();",
        "",
    ),
    "the other block's consumers are not waited for": (
        "engine.cuh",
        "kConsumerWarps * Traits::kCluster",
        "kConsumerWarps",
    ),
    "both blocks load the same half": ("engine.cuh", "tile.out + rank * kSlice", "tile.out"),
    "accumulators written over stages that are still read": ("engine.cuh", "Arch::sync_consumers();", ""),
    "another swizzle": ("layout.h", "(address >> 3) & 0x70", "(address >> 3) & 0x30"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_notices(fault, tmp_path):
    name, text, replacement = FAULTS[fault]
    for folder in ("csrc", "tests/sm90"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    source = tmp_path / "csrc/cuda/sm90" / name
    assert text in source.read_text()
    source.write_text(source.read_text().replace(text, replacement))
    program = build(tmp_path / "tests/sm90/engine.cpp", tmp_path / "engine", "-O0", "-DMI_FEW")
    done = run(program, "2")
    assert done.returncode == 1, "nothing was noticed"
    assert done.stderr


@needs_compiler
def test_the_sizes_choose_the_kernels_they_name(tmp_path):
    """By the plan and the checks of alignment. Together they reach every kernel."""
    program = build(
        ROOT / "tests/sm90/choices.cpp", tmp_path / "choices", "-O1", ROOT / "csrc/cuda/host/plan.cpp"
    )
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


SOURCE = "sm90/forward.cu"
# Every kernel in it: outputs per tile, blocks of a cluster (or "split"), element type.
KERNELS = {(out, cluster, "BF16") for out in (64, 128, 256) for cluster in (1, 2)}
KERNELS |= {(out, cluster, "F16") for out in (64, 128) for cluster in (1, 2)}
KERNELS |= {(out, "split", dtype) for out in (64, 128) for dtype in ("BF16", "F16")}


def compile_kernels() -> tuple[str, dict[tuple, str]]:
    """The report of ptxas, and the machine code of each of KERNELS."""
    path, report = compiled(SOURCE)[SOURCE]
    kernels = {}
    for text in re.split(r"Function : ", sass.text_of(path))[1:]:
        name = re.search(r"(Bf16|F16)ENS\d_12KernelTraitsILi(\d+)ELi(\d)ELb(\d)E", text.split("\n", 1)[0])
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
        assert len(products) == text.count("HGMMA"), "an A operand is not in registers"
        # Scaled: the even and the odd step of the loop, the last one, that of U. Exact: a step, that of U.
        assert len(products) == 4 * (4 if dtype == "BF16" else 2)
        assert {(int(n), bf16 == ".BF16") for n, bf16, _ in products} == {(out, dtype == "BF16")}
        loads = re.findall(r"UTMALDG\.4D(\.MULTICAST)?", text)
        assert len(loads) == 5 and loads.count(".MULTICAST") == (3 if cluster == 2 else 0)  # x, z; W, U, V
        assert ("UTMASTG.4D" in text) == (cluster != "split") and "USETMAXREG" in text
        assert ("UCGABAR_ARV" in text) == (cluster != 1)
        # After the mbarriers are initialised, x and z read and the result written; none within a step.
        assert text.count("FENCE.VIEW.ASYNC.S") == (3 if cluster == "split" else 4)


def check_hazards(kernels: dict[tuple, str]) -> None:
    """No A operand is overwritten while a wgmma may read it."""
    for key, text in kernels.items():
        found = list(sass.loops(text))
        assert found, f"{key}: no loop with wgmma from registers"
        assert [loop.hazards for loop in found if loop.hazards] == [], key


@needs_nvcc
def test_machine_code():
    """No spills, the intended wgmma and TMA instructions, no hazard."""
    report, kernels = compile_kernels()
    check_resources(report, kernels)
    check_instructions(kernels)
    check_hazards(kernels)


@needs_nvcc
def test_launches_in_a_fresh_thread(tmp_path):
    """The chosen kernel, cluster and shared memory; no tensor map before there is a context."""
    launcher, _ = compiled(SOURCE)[SOURCE]
    program = tmp_path / "launches"
    command = [NVCC, "-std=c++20", "-Xlinker", "--wrap=cudaFuncSetAttribute,--wrap=cudaLaunchKernelExC"]
    command += ["-I", ROOT / "csrc", "-o", program, ROOT / "tests/sm90/launches.cpp", launcher]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    cases = [(size, dtype) for size in SM90 for dtype in size.dtypes]
    done = run(program, input=lines(cases))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(cases)} launches as chosen\n"
