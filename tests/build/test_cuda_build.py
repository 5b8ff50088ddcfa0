"""The CUDA library compiles, links and loads without a GPU; its kernels do not spill."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_objects import ARCHITECTURES, KERNELS, NVCC, ROOT, SOURCES, compiled

from mi_kernels import backends, verified
from mi_kernels.ops.backend import Automatic, registered

sys.path.insert(0, str(ROOT))

from tools import sass

pytestmark = pytest.mark.build

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")


@pytest.fixture(scope="module")
def objects():
    """source name -> (object, what ptxas said)."""
    return compiled(*KERNELS)


def functions(path: Path) -> dict[str, str]:
    """The machine code for 80 of each kernel, by its symbol."""
    return {text.split()[0]: text for text in re.split(r"Function : ", sass.text_of(path, "sm_80"))[1:]}


@needs_nvcc
def test_no_kernel_spills(objects):
    kernels = 0
    for name, (_, said) in objects.items():
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        kernels += len(spills)
        assert set(spills) <= {("0", "0")}, f"{name}: {said[-3000:]}"
    assert kernels >= len(ARCHITECTURES) * 4 * 9  # architectures, dtypes, kernels


# The matrix instruction of a dtype, by how it appears in a kernel's symbol.
HALF, TF32 = "HMMA.16816.F32", "HMMA.1688.F32.TF32"
INSTRUCTIONS = {"BFloat16": f"{HALF}.BF16", "Half": HALF, "tf32": TF32}
# Kernels in float16 whose operand is generated: the forward pass if not per context, and dW.
WIDENED = ("forward_kernelIN3c104HalfELb0", "weight_grads_kernelIN3c104HalfELb1")
# Twice as many where W is read in either order; float64 has no dx and dz along its outputs.
COUNT = {"sm80/forward.cu": 12, "sm80/input_grads.cu": 9, "sm80/weight_grads.cu": 10}


@needs_nvcc
@pytest.mark.skipif(sass.disassembler("cuobjdump") is None, reason="no cuobjdump")
@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("sm80/")])
def test_matrix_instructions_are_used(objects, name):
    kernels = functions(objects[name][0])
    assert len(kernels) == COUNT.get(name, 5)
    for symbol, text in kernels.items():
        expected = {code for dtype, code in INSTRUCTIONS.items() if dtype in symbol}
        widened = any(part in symbol for part in WIDENED)
        if widened:
            expected = {TF32}
        assert set(re.findall(r"HMMA\S+", text)) == expected, symbol
        assert expected or re.search("DFMA|FFMA", text), symbol
        assert ("LDGSTS" in text) != widened, symbol  # both operands are generated
        # MN-major tf32 is loaded word by word.
        assert ("LDSM" in text) == bool(expected) or "weight_grads" in symbol, symbol


@needs_nvcc
def test_ptx_is_in_one_file():
    for path in [*SOURCES.rglob("*.cu*"), *SOURCES.rglob("*.h")]:
        assert path.name == "ptx.cuh" or not re.search(r"\basm\b", path.read_text()), path.name


# The macros of torch 2.11: TORCH_TARGET_VERSION excludes newer functions, but not newer macros.
MACROS_OF_2_11 = {"STD_TORCH_CHECK", "STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK"}
MACROS_OF_2_11 |= {"TORCH_ABI_VERSION"}


def test_macros_of_torch_are_in_the_oldest_release():
    sources = [path for path in SOURCES.parent.rglob("*.*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    assert sources
    for path in sources:
        used = set(re.findall(r"\b(?!MI_)(?:\w+_)?(?:TORCH|AOTI|THO|C10)_[A-Z]\w*\b", path.read_text()))
        newer = used - MACROS_OF_2_11
        assert not newer, f"{path.name}: expected macros that torch 2.11 has, got {newer}"


LOADED = """
import sys, torch
import mi_kernels
torch.ops.load_library(sys.argv[1])
for name in sys.argv[2:]:
    listing = torch._C._dispatch_dump("mi_kernels::" + name)
    assert "CUDA: registered" in listing, listing
W, UNALIGNED, W_UNALIGNED = 1, 64, 128
ZXO, ZOX = [1, 64 * 64, 64], [64, 64 * 64, 1]
PADDED, NOT_A_MULTIPLE = [8 * 72, 72, 1], [8 * 72 + 8, 72, 1]
for arch, terms, rows, strides in (
    (80, W, 64, []), (90, W, 64, []), (90, W | UNALIGNED, 64, []), (90, W | W_UNALIGNED, 64, []),
    (90, W, 64, ZXO), (90, W, 4096, ZXO), (90, W, 64, ZOX), (80, W, 64, ZOX),
    (90, W, 64, NOT_A_MULTIPLE), (90, W, 64, PADDED),
):
    sizes = [1, rows, 8, 64, 64, *strides]
    print(torch.ops.mi_kernels.cuda_interaction_plan("forward", sizes, torch.bfloat16, terms, arch, 108))
"""
OPERATIONS = (
    *("interaction", "interaction_input_grads", "interaction_weight_grads", "diagonal", "gated_interaction"),
    *("modulate", "modulate_grads", "mix", "mix_grads", "dual_linear", "dual_linear_grads"),
    *("norm_modulate", "norm_modulate_grads"),
)


@needs_nvcc
def test_library_links_and_loads_without_cuda(objects, tmp_path):
    """It is linked to nothing of torch that a CPU build lacks, loads, and registers its kernels."""
    torch_directory = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-DMI_HAVE_SM90=1", '-DMI_CUDA_ARCHITECTURES="80 90a"']
    flags += ["-I", ROOT / "csrc", "-isystem", torch_directory / "include"]
    library = tmp_path / "libmi_kernels_cuda.so"
    host_objects = []
    for path in SOURCES.rglob("*.cpp"):
        to = tmp_path / (path.stem + ".o")
        subprocess.run(["g++", *flags, "-c", path, "-o", to], check=True)
        host_objects.append(to)
    link = [NVCC, "-shared", *host_objects, *(o for o, _ in objects.values()), "-o", library]
    link += ["-L", torch_directory / "lib", "-ltorch_cpu", "-lc10", "-Xlinker", "-z,defs", "-ldl"]
    run = subprocess.run(link, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", library], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines()]
    assert [symbol for symbol in symbols if re.search(r"\b(c10|at|torch|caffe2)::", symbol)] == []
    assert not [symbol for symbol in symbols if re.match(r"cu[A-Z]", symbol)], "libcuda is not linked"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", LOADED, library, *OPERATIONS], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    plans = [dict(field.split("=") for field in line.split(";")) for line in run.stdout.splitlines()]
    algorithms = [plan["algorithm"] for plan in plans]
    assert algorithms == ["mma", "wgmma", "mma", "mma", "mma", "wgmma", "wgmma", "mma", "wgmma", "wgmma"]
    # Along the outputs: by the mma engine where it lies or, for many rows, copied.
    assert [int(plan["copied"]) for plan in plans] == [0] * 5 + [2 * 8 * 64 * 64] * 4 + [0]
    assert all(int(plan["scratch"]) >= int(plan["copied"]) for plan in plans)


def test_doctor_says_why_there_is_no_cuda():
    reason = backends.why_not("cuda")
    if reason is None:
        pytest.skip("the backend cuda runs here")
    assert re.search("not built|built without CUDA|could not be loaded|no GPU", reason)


def test_automatic_choice_is_never_cuda():
    """Until the suite has passed on hardware."""
    for device in ("cpu", "meta"):
        assert backends.choose(torch.empty(0, device=device)) != "cuda"
    gpu = [one for one in registered() if "cuda" in (one.devices() or ())]
    assert gpu and all(one.automatic == Automatic.VERIFIED for one in gpu) and verified.VERIFIED == ()
