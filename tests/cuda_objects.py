"""The CUDA sources, compiled by nvcc once for all tests and all processes of pytest."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "nvcc"
TOOLS = (Path("/usr/local/cuda/bin"), *(Path(p) / "bin" for p in [os.environ.get("CUDA_HOME")] if p))
# With MI_KERNELS_TEST_MINUTES=1 both, for every kernel: a minute more.
ARCHITECTURES = ("80", "90a") if "MI_KERNELS_TEST_MINUTES" in os.environ else ("80",)
# As "folder/file.cu"; what is in sm90/ is for 90a alone.
KERNELS = sorted(path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.cu"))
# The flags of library.cmake.
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-c")
FLAGS += ("-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000")


def tool(name: str) -> str | None:
    return shutil.which(name) or next((str(p / name) for p in TOOLS if (p / name).exists()), None)


NVCC = tool("nvcc")


def compiled(*names: str) -> dict[str, tuple[Path, str]]:
    """source name -> (object, output of nvcc and ptxas); compiled again only when a source has changed."""
    assert NVCC is not None
    digest = hashlib.sha256(f"{torch.__version__} {FLAGS} {ARCHITECTURES}".encode())
    digest.update(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.suffix in (".h", ".cuh", ".cu"):
            digest.update(path.read_bytes())
    directory = CACHE / digest.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    for old in CACHE.iterdir():
        if old != directory:
            shutil.rmtree(old, ignore_errors=True)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with ThreadPoolExecutor(max(2 // workers, 1)) as pool:
        # First what no other process is compiling, then wait for the rest.
        for wait in (False, True):
            list(pool.map(_compile, names, [directory] * len(names), [wait] * len(names)))
    return {name: (_file(directory, name, "o"), _file(directory, name, "txt").read_text()) for name in names}


def _file(directory: Path, name: str, suffix: str) -> Path:
    return directory / f"{name.replace('/', '_')}.{suffix}"


def _compile(name: str, directory: Path, wait: bool) -> None:
    report = _file(directory, name, "txt")  # written last
    with open(_file(directory, name, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return
        if report.exists():
            return
        archs = ("90a",) if name.startswith("sm90/") else ARCHITECTURES
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        includes = ("-I", ROOT / "csrc", "-isystem", Path(torch.__file__).parent / "include")
        command = [NVCC, *FLAGS, *includes, *codes, SOURCES / name, "-o", _file(directory, name, "o")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        report.write_text(run.stderr)
