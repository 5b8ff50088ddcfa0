"""The CUDA library compiles, links and loads without a GPU; its kernels hold their sums in registers."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mi_kernels import backends

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
TOOLS = (Path("/usr/local/cuda/bin"), *(Path(p) / "bin" for p in [os.environ.get("CUDA_HOME")] if p))


def tool(name: str) -> str | None:
    return shutil.which(name) or next((str(p / name) for p in TOOLS if (p / name).exists()), None)


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    triton = Path(torch.__file__).parents[1] / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool("cuobjdump") or (str(triton) if triton.exists() else None)


NVCC = tool("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
ARCHITECTURES = ("80", "90a")
# By the architecture's own file names: *_sm90.cu are for 90a alone.
KERNELS = sorted(path.name for path in SOURCES.glob("*.cu"))


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """source name -> (object, what ptxas said), compiled as library.cmake does."""
    if NVCC is None:
        pytest.skip("no nvcc")
    directory = tmp_path_factory.mktemp("cuda")
    includes = ("-I", ROOT / "csrc", "-isystem", Path(torch.__file__).parent / "include")
    defines = ("-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000")
    flags = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-c")

    def compiled(name: str) -> tuple[Path, str]:
        archs = ("90a",) if name.endswith("_sm90.cu") else ARCHITECTURES
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        to = directory / (name + ".o")
        run = subprocess.run(
            [NVCC, *flags, *defines, *includes, *codes, SOURCES / name, "-o", to],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return to, run.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KERNELS, pool.map(compiled, KERNELS), strict=True))


@needs_nvcc
def test_no_kernel_spills(objects):
    kernels = 0
    for name, (_, said) in objects.items():
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        kernels += len(spills)
        assert set(spills) <= {("0", "0")}, f"{name}: {said[-3000:]}"
    assert kernels >= 2 * 4 * 9  # architectures, dtypes, kernels


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("name", [name for name in KERNELS if name.endswith("_mma.cu")])
def test_matrix_instructions_are_used(objects, name):
    listing = subprocess.run(
        [cuobjdump(), "-sass", "-arch", "sm_80", objects[name][0]], capture_output=True, text=True, check=True
    )
    functions = re.split(r"Function : ", listing.stdout)[1:]
    assert len(functions) == 4
    for function in functions:
        instructions = re.findall(r"HMMA\.16816\.F32(\.BF16)?|LDGSTS|LDSM|DFMA|FFMA", function)
        symbol = function.split()[0]
        assert "LDGSTS" in function, f"{symbol}: no asynchronous copy"
        if "BFloat16" in symbol:
            assert "HMMA.16816.F32.BF16" in function and "LDSM" in function
        elif "Half" in symbol:
            assert "HMMA.16816.F32" in function and "LDSM" in function
        else:
            assert "HMMA" not in function and instructions


@needs_nvcc
def test_ptx_is_in_one_file():
    for path in [*SOURCES.glob("*.cu*"), *SOURCES.glob("*.h")]:
        assert path.name == "ptx.cuh" or not re.search(r"\basm\b", path.read_text()), path.name


LOADED = """
import sys, torch
import mi_kernels
torch.ops.load_library(sys.argv[1])
for name in sys.argv[2:]:
    listing = torch._C._dispatch_dump("mi_kernels::" + name)
    assert "CUDA: registered" in listing, listing
plan = torch.ops.mi_kernels.cuda_interaction_plan("forward", [1, 64, 8, 64, 64], torch.bfloat16, 1, 80, 108)
print(plan)
"""
OPERATIONS = (
    *("interaction", "interaction_input_grads", "interaction_weight_grads", "diagonal", "gated_interaction"),
    *("modulate", "modulate_grads"),
)


@needs_nvcc
def test_library_links_and_loads_without_cuda(objects, tmp_path):
    """Linked to no more of torch than the CPU has, it loads and registers its kernels."""
    torch_directory = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-I", ROOT / "csrc", "-isystem", torch_directory / "include"]
    library = tmp_path / "libmi_kernels_cuda.so"
    host_objects = []
    for path in SOURCES.glob("*.cpp"):
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
    assert run.stdout.startswith("algorithm=mma;")


def test_doctor_says_why_there_is_no_cuda():
    reason = backends.why_not("cuda")
    if reason is None:
        pytest.skip("the backend cuda runs here")
    assert re.search("not built|built without CUDA|could not be loaded|no GPU", reason)


def test_automatic_choice_is_never_cuda():
    """Until the suite has passed on hardware."""
    for device in ("cpu", "meta"):
        assert backends.choose(torch.empty(0, device=device)) != "cuda"
    source = Path(backends.__file__).read_text()
    assert '"cpu" if compiled else "portable"' in source
