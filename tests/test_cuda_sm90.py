"""The sm_90a engine without a GPU: its index functions, and the engine itself on the machine of sm90/machine.h."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def build(source: Path, program: Path, *flags: str) -> Path:
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", *flags, "-o", program, source]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr == ""
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


def test_layouts_agree_with_the_documents(tmp_path):
    done = run(build(ROOT / "tests/sm90/layouts.cpp", tmp_path / "layouts", "-O1"))
    assert done.returncode == 0, done.stderr


def test_the_engine_agrees_with_the_formula(tmp_path):
    done = run(build(ROOT / "tests/sm90/engine.cpp", tmp_path / "engine", "-O2"), "2")
    assert done.returncode == 0, done.stderr


# What goes wrong on hardware only now and then: the machine has to notice each. (file, text, replacement)
FAULTS = {
    "operand overwritten while wgmma reads it": ("engine_sm90.cuh", "mma_wait<1>()", "mma_wait<2>()"),
    "sums read before wgmma is done": ("engine_sm90.cuh", "mma_wait<0>();\n      M::hold(left)", "mma_wait<1>()"),
    "stage released while wgmma reads it": (
        "engine_sm90.cuh",
        "release(ring.stage == 0 ? Shape::kStages - 1 : ring.stage - 1);\n    advance",
        "release(ring.stage);\n    advance",
    ),
    "no wait for the weights": ("engine_sm90.cuh", "    wait();\n    M::mma_fence();", "    M::mma_fence();"),
    "no wait for the operand": ("engine_sm90.cuh", "    wait();\n    MI_UNROLL", "    MI_UNROLL"),
    "wrong parity": ("engine_sm90.cuh", "ring.phase ^ 1", "ring.phase"),
    "no fence before wgmma": ("engine_sm90.cuh", "wait();\n    M::mma_fence();", "wait();"),
    "no fence before the copy of the result": ("engine_sm90.cuh", "M::shared_fence();", ""),
    "result overwritten while it is copied": ("engine_sm90.cuh", "if (thread == 0) M::store_wait();", ""),
    "the other block's consumers are not asked": (
        "engine_sm90.cuh",
        "kConsumerWarps * Shape::kCluster",
        "kConsumerWarps",
    ),
    "both blocks load the same half": ("engine_sm90.cuh", "tile.out + rank * kShare", "tile.out"),
    "another swizzle": ("sm90_layout.h", "(address >> 3) & 0x70", "(address >> 3) & 0x30"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_notices(fault, tmp_path):
    name, text, replacement = FAULTS[fault]
    for folder in ("csrc/cuda", "tests/sm90"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    source = tmp_path / "csrc/cuda" / name
    assert text in source.read_text()
    source.write_text(source.read_text().replace(text, replacement))
    program = build(tmp_path / "tests/sm90/engine.cpp", tmp_path / "engine", "-O1", "-DMI_FEW")
    done = run(program, "2")
    assert done.returncode == 1, "nothing was noticed"
    assert done.stderr
