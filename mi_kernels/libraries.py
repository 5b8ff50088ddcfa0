"""Loading of the compiled libraries, their build facts, and why they cannot run here."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .ops.namespace import OPS

_facts: Any = None
try:
    from .ops import build_facts  # written by CMake or setup.py
except ImportError:
    pass
else:
    _facts = build_facts

_PACKAGE = Path(__file__).parent
# The variable names another build, such as that of `make sanitize`.
_LIBRARY = Path(os.environ.get("MI_KERNELS_CPU_LIBRARY") or _PACKAGE / "libmi_kernels_cpu.so")
ASKED_FOR = "this installation was asked to have no compiled kernels (MI_KERNELS_SKIP_NATIVE)"
_CUDA_LIBRARY = _PACKAGE / "libmi_kernels_cuda.so"


def _load_cpu_library() -> str | None:
    if not _LIBRARY.exists() and hasattr(_facts, "SKIPPED"):
        return ASKED_FOR
    if not _LIBRARY.exists():
        return "the compiled CPU library was not built (pip install . --no-build-isolation builds it)"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the compiled CPU library could not be loaded: {error}"
    return None


def _load_cuda_library() -> str | None:
    if not _CUDA_LIBRARY.exists():
        return "the CUDA library was not built (FORCE_CUDA=1 pip install . --no-build-isolation builds it)"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        return f"the CUDA library could not be loaded: {error}"
    return None


cpu_error = _load_cpu_library()
cuda_error = _load_cuda_library()


@cache
def best_capability() -> tuple[int, int]:
    return max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


def cuda_gpu_error() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU that torch reaches"
    here = best_capability()
    built = cuda_architectures()
    if any(_runs_on(architecture, 10 * here[0] + here[1]) for architecture in built):
        return None
    if not built:
        return "the CUDA library is of another version of this package: build it again"
    found = ".".join(map(str, here))
    return f"the CUDA library was built for {', '.join(built)}, the best GPU here has {found}"


def _runs_on(architecture: str, capability: int) -> bool:
    """Code for 90a runs on 9.0 only; code for 80 includes PTX, which later GPUs compile."""
    if architecture.isdigit():
        return int(architecture) <= capability
    return int(architecture[:-1]) == capability


@cache
def cpu_isa() -> dict | None:
    """Instruction sets of the CPU library: compiled in, supported by this CPU, selected."""
    if cpu_error is not None:
        return None
    try:
        text = OPS.cpu_isa()
    except RuntimeError as error:  # MI_KERNELS_CPU_ISA names an unavailable instruction set
        return {"error": re.sub("^.*?(?=MI_KERNELS_CPU_ISA)", "", str(error).splitlines()[0])}
    fields = [field.split(",") for field in text.split(";")]
    return {"compiled": fields[0], "supported": fields[1], "selected": fields[2][0]}


def cuda_architectures() -> list[str]:
    """The architectures of the loaded CUDA library, as in ["80", "90a"]; [] if unknown."""
    if cuda_error is not None:
        return []
    try:
        return OPS.cuda_architectures().split()
    except (RuntimeError, NotImplementedError):  # a library of an older version of this package
        return []


def build_info() -> dict | None:
    """Facts about the native build; None where there was none, or its facts are not there."""
    if not hasattr(_facts, "COMPILER"):
        return None
    return {
        "mi_kernels": _facts.VERSION,
        "namespace": _facts.NAMESPACE,
        "compiler": _facts.COMPILER,
        "build_type": _facts.BUILD_TYPE,
        "cxx_standard": _facts.CXX_STANDARD,
        "processor": _facts.PROCESSOR,
        "instruction_sets": _facts.INSTRUCTION_SETS,
        "cuda_architectures": _facts.CUDA_ARCHITECTURES,
        "torch": _facts.TORCH,
        "torch_target": _facts.TORCH_TARGET,
    }
