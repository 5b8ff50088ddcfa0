"""The compiled CPU library: its imports, its instruction sets, its checks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_passes

from mi_kernels import backends, libraries
from mi_kernels.testing.samples import ODD, Sample
from tools import symbols

ERROR = backends.cpu_library_error()
pytestmark = pytest.mark.skipif(ERROR is not None, reason=f"no compiled library: {ERROR}")

CPU_SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
ISAS = ("generic", "avx2", "avx512", "avx512bf16")

VALUES = """
import torch
from mi_kernels import backends, libraries
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.checks import gradients_of
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.samples import samples
import mi_kernels as mi
import sys

assert libraries.cpu_isa()["selected"] == sys.argv[1], libraries.cpu_isa()
torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)

# Each sample in one wide dtype and one of 16 bits, which take turns: the sets differ in how wide vectors
# are, and every dtype has a third of all tails at least. The set that is selected here has all four.
DTYPES = ((torch.float64, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.bfloat16))
count = 0
with mi.backend("cpu"):
    for index, sample in enumerate(samples()):
        for dtype in DTYPES[index % 3]:
            if sample.shape.name.startswith("sum") and dtype != torch.float32:
                continue
            try:
                check_errors(
                    gradients_of(mi.interaction, values=True),
                    gradients_of(reference.interaction, values=True),
                    lambda seed: (sample.cotangent(dtype, seed=seed), *sample.arguments(dtype, seed=seed)),
                    enough=200,
                )
            except AssertionError as error:
                raise AssertionError(f"{sample} {dtype}: {error}") from None
            count += 1
print(count)
"""


def python(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
    )


def library() -> Path:
    return Path(backends.__file__).parent / "libmi_kernels_cpu.so"


@pytest.mark.skipif(symbols.NM is None, reason="nm of binutils is not installed")
def test_only_the_stable_abi_is_imported():
    """No symbol of C++ libtorch, whose ABI changes between releases; those of the stable shim are plain C."""
    assert symbols.undefined(library()) & symbols.STABLE_ABI, "nothing of torch is imported at all?"
    assert symbols.foreign(library()) == set()


def test_selected_set_is_the_best_supported_one():
    if "MI_KERNELS_CPU_ISA" in os.environ:
        pytest.skip("MI_KERNELS_CPU_ISA is set")
    isa = libraries.cpu_isa()
    assert isa["selected"] == isa["supported"][0]
    assert set(isa["supported"]) <= set(isa["compiled"]) <= set(ISAS)
    assert "generic" in isa["supported"]


@pytest.mark.subprocess
@pytest.mark.parametrize("isa", ISAS)
def test_values_and_gradients_on_each_instruction_set(isa):
    if isa not in libraries.cpu_isa()["supported"]:
        pytest.skip(f"this machine or build has no {isa}")
    if isa == libraries.cpu_isa()["selected"]:
        pytest.skip(f"{isa} is what every other test runs on here")
    run = python(VALUES, isa, MI_KERNELS_CPU_ISA=isa)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) > 200


@pytest.mark.subprocess
@pytest.mark.parametrize("isa", ISAS)
def test_gates_on_each_instruction_set(isa):
    """The error rule of gates and modulation, and products of a few rows: the inner loop's selection."""
    if isa not in libraries.cpu_isa()["supported"]:
        pytest.skip(f"this machine or build has no {isa}")
    if isa == libraries.cpu_isa()["selected"]:
        pytest.skip(f"{isa} is what every other test runs on here")
    files = [f"test_{name}.py" for name in ("gates", "modulate", "linear", "few_rows")]
    chosen = (
        "test_error_rule and cpu and float32 and not portable and (threaded or tall or odd or three-rows)"
        " or test_streamed_tasks and not portable and (float64 or bfloat16) or few_rows"
    )
    assert_passes("-k", chosen, *files, least=130, MI_KERNELS_CPU_ISA=isa, MI_KERNELS_TEST_SELECTION="fast")


@pytest.mark.subprocess
@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2 "])
def test_unknown_instruction_set(isa):
    script = "import torch, mi_kernels as mi\nx = torch.ones(3, 3)\nmi.interaction(x, x, None, x)"
    run = python(script, MI_KERNELS_CPU_ISA=isa)
    assert run.returncode == 1
    assert f"MI_KERNELS_CPU_ISA: expected one of {','.join(libraries.cpu_isa()['supported'])}" in run.stderr
    assert f"got '{isa}'" in run.stderr


@pytest.mark.subprocess
def test_doctor_tells_that_an_instruction_set_is_not_there():
    script = (
        "from mi_kernels import backends, doctor\nprint(doctor.as_text())\nprint(backends.why_not('cpu'))"
    )
    run = python(script, MI_KERNELS_CPU_ISA="sse9")
    assert run.returncode == 0, run.stderr
    reason = "MI_KERNELS_CPU_ISA: expected one of"
    assert f"does not run: {reason}" in run.stdout
    assert run.stdout.splitlines()[-1].startswith(reason)


CROSS_COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.build
@pytest.mark.skipif(
    shutil.which(CROSS_COMPILER) is None, reason=f"no {CROSS_COMPILER} (g++-aarch64-linux-gnu)"
)
@pytest.mark.parametrize("source", sorted(f"{p.parent.name}/{p.name}" for p in CPU_SOURCES.glob("*/*.cpp")))
def test_sources_compile_on_aarch64(source):
    """No x86 intrinsic without a portable twin: a compiler for another architecture takes every source."""
    torch_headers = Path(torch.__file__).parent / "include"
    definitions = ("MI_ISA=generic", "MI_HAVE_ISA_generic=1", "TORCH_TARGET_VERSION=0x020b000000000000")
    command = [CROSS_COMPILER, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi"]
    command += [f"-D{definition}" for definition in definitions]
    command += ["-I", CPU_SOURCES.parent, "-isystem", torch_headers, CPU_SOURCES / source]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


OPS = torch.ops.mi_kernels
SIZES = {"x": (4, 5), "z": (4, 3), "weight": (2, 3, 5), "weight_z": (2, 3), "weight_x": (2, 5), "bias": (2,)}


@pytest.mark.parametrize("name", ["z", "weight", "weight_z", "weight_x", "bias"])
@pytest.mark.parametrize("change", ["size", "rank", "dtype"])
def test_direct_calls_are_checked_too(name, change):
    """The registered operations never touch memory on a wrong size, whoever calls them."""
    tensors = {key: torch.ones(size) for key, size in SIZES.items()}
    wrong = {
        "size": torch.ones(*SIZES[name][:-1], SIZES[name][-1] + 1),
        "rank": torch.ones(1, 1, *SIZES[name]),
        "dtype": torch.ones(SIZES[name], dtype=torch.float64),
    }[change]
    with pytest.raises(RuntimeError, match=r"interaction: \w+: expected"):
        OPS.interaction(*(tensors | {name: wrong}).values())


TENSORS = {"interaction_input_grads": 6, "interaction_weight_grads": 3}


@pytest.mark.parametrize(("operation", "position"), [(op, i) for op, n in TENSORS.items() for i in range(n)])
def test_direct_calls_of_the_gradients_are_checked_too(operation, position):
    tensors = [torch.ones(4, 2), *(torch.ones(size) for size in list(SIZES.values())[:5])][
        : TENSORS[operation]
    ]
    wants = (True,) * (2 if operation == "interaction_input_grads" else 4)
    tensors[position] = torch.ones(*tensors[position].shape[:-2], 9, tensors[position].shape[-1])
    with pytest.raises(RuntimeError, match=rf"{operation}: \w+: expected"):
        getattr(OPS, operation)(*tensors, *wants)


def test_kernels_run_without_python_dispatch():
    """The plain operation is the compiled kernel: it agrees with its portable twin, but not in every bit."""
    arguments = Sample(ODD).arguments(torch.bfloat16)
    torch.testing.assert_close(
        OPS.interaction(*arguments), OPS.interaction_portable(*arguments), rtol=2e-2, atol=2e-2
    )
    names = torch._C._dispatch_dump("mi_kernels::interaction")
    assert re.search(r"^CPU: registered", names, re.MULTILINE)


def test_direct_calls_do_not_mix_devices():
    """The registered operation itself, past the checks of the public functions."""
    x, z, weight = torch.ones(3, 4), torch.ones(3, 5), torch.ones(2, 5, 4)
    for broken in ((x, z, weight.to("meta")), (x, z.to("meta"), weight)):
        with pytest.raises(
            ValueError, match=r"interaction: (z|weight): expected device cpu \(that of x\), got meta"
        ):
            torch.ops.mi_kernels.interaction(*broken, None, None, None)
