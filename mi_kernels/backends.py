"""Which implementation runs: the choice of a backend, and the reason where one cannot run."""

import importlib.util
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch

from mi_kernels import records, verified
from mi_kernels.ops.compiling import constant_while_compiling

BackendName = Literal["auto", "reference", "portable", "cpu", "triton", "cuda"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)
COMPILED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_FROM = (8, 0)  # compute capability
_PACKAGE = Path(__file__).parent
# Another build of it, such as that of `make sanitize`, can be named.
_LIBRARY = Path(os.environ.get("MI_KERNELS_CPU_LIBRARY") or _PACKAGE / "libmi_kernels_cpu.so")
_SKIPPED = _PACKAGE / "native_skipped.txt"  # of setup.py
_ASKED_FOR = "this installation was asked to have no compiled kernels (MI_KERNELS_SKIP_NATIVE)"
_CUDA_LIBRARY = _PACKAGE / "libmi_kernels_cuda.so"


class _Selected(threading.local):
    def __init__(self) -> None:  # in each thread; Dynamo of PyTorch 2.11 sets no guard on class attributes
        self.name = "auto"


# A thread-local object and not a context variable: torch.compile traces the former and guards on it.
_selected = _Selected()


def _load_cpu_library() -> str | None:
    if not _LIBRARY.exists() and _SKIPPED.exists():
        return _ASKED_FOR
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


def _users_level() -> int:
    """The ``stacklevel`` of the statement that imports or calls this package, past import machinery."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith("<frozen importlib"):
            if Path(name).parent != _PACKAGE and _PACKAGE not in Path(name).parents:
                break
            level += 1
        frame = frame.f_back
    return level


_cpu_error = _load_cpu_library()
_cuda_error = _load_cuda_library()
if _cpu_error not in (None, _ASKED_FOR):
    warnings.warn(
        f"mi_kernels runs on its portable backend: {_cpu_error}",
        RuntimeWarning,
        stacklevel=_users_level(),
    )


def cpu_library_error() -> str | None:
    """Why the compiled CPU kernels are missing, or None where they are loaded."""
    return _cpu_error


def why_not(name: str) -> str | None:
    """Why backend ``name`` cannot run in this installation, or None if it can.

    Raises ValueError for a name that is none of ``NAMES``.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "cpu":
        return _cpu_error or (cpu_isa() or {}).get("error")
    if name == "triton":
        return _triton_error()
    if name == "cuda":
        return _cuda_error or _cuda_gpu_error()
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _best_capability() -> tuple[int, int]:
    return max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


def _cuda_gpu_error() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU that torch reaches"
    here = _best_capability()
    built = cuda_architectures()
    if any(_runs_on(architecture, 10 * here[0] + here[1]) for architecture in built):
        return None
    if not built:
        return "the CUDA library is of another version of this package: build it again"
    found = ".".join(map(str, here))
    return f"the CUDA library was built for {', '.join(built)}, the best GPU here has {found}"


def _runs_on(architecture: str, capability: int) -> bool:
    """Code for 90a runs on 9.0 alone; of 80 there is PTX, which later GPUs translate."""
    if architecture.isdigit():
        return int(architecture) <= capability
    return int(architecture[:-1]) == capability


def _triton_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting():
        return None
    if torch.cuda.is_available() and torch.version.hip is not None:
        return None  # nobody has run it there: `auto` takes it where `verify` has passed on that GPU
    if torch.cuda.is_available():
        best = _best_capability()
        if best < TRITON_FROM:
            here = ".".join(map(str, best))
            return f"it needs a GPU of compute capability 8.0 or later, the best one here has {here}"
        return None
    return "there is no GPU that Triton reaches (with TRITON_INTERPRET=1 its kernels run on the CPU, slowly)"


P = ParamSpec("P")
R = TypeVar("R")


class _Blocks(threading.local):
    """Those of one object that this thread is in."""

    def __init__(self) -> None:
        self.entered: list[AbstractContextManager[None]] = []


class Selection(AbstractContextManager[None]):
    """What :func:`backend` returns, for a ``with`` block or as a decorator. By itself it selects nothing."""

    def __init__(self, name: str) -> None:
        self._name, self._used = name, False
        self._blocks = _Blocks()

    def __enter__(self) -> None:
        self._used = True
        self._blocks.entered.append(_selecting(self._name))
        self._blocks.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._blocks.entered.pop().__exit__(*error)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        self._used = True
        return _selecting(self._name)(function)

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                f"mi_kernels.backend({self._name!r}) selected nothing: it is for a `with` block",
                RuntimeWarning,
                stacklevel=2,
            )


def backend(name: BackendName) -> Selection:
    """Run the operations of this thread on one backend inside a ``with`` block.

    What is returned selects nothing by itself, and warns where it is dropped without a ``with``.

    Args:
        name: ``"auto"`` (compiled kernels where they exist for device and dtype, on GPUs only where a suite
            has passed on such hardware or by ``python -m mi_kernels verify`` on this one, else portable; in
            ``torch.onnx.export`` the reference, since ONNX has no such operations),
            ``"reference"`` (einsum, differentiated by PyTorch), ``"portable"`` (pure PyTorch, bounded
            memory, any device), ``"cpu"`` (C++ kernels), ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: the name is unknown, or the backend cannot run here; the message says why.
    """
    reason = why_not(name)
    if reason is not None:
        raise ValueError(f"backend: {name!r} cannot run: {reason}")
    if torch.compiler.is_compiling():
        return _selecting(name)  # type: ignore[return-value]  # Dynamo traces generators, not __del__
    return Selection(name)


@contextmanager
def _selecting(name: str) -> Iterator[None]:
    previous, _selected.name = _selected.name, name
    try:
        yield
    finally:
        _selected.name = previous


def choose(tensor: torch.Tensor, family: str = "interaction") -> str:
    """The backend that an operation of a family (records.FAMILIES) on tensors like this one runs on.

    Raises:
        ValueError: the backend selected by name does not take this device or dtype.
    """
    name = _selected.name
    if name == "auto":
        if torch.compiler.is_exporting() and _is_in_onnx_export():
            return "reference"  # ONNX knows nothing of this package's operations
        if tensor.device.type == "cuda":
            return _automatic_on_gpu(tensor.device, tensor.dtype, family)
        compiled = _cpu_error is None and tensor.device.type == "cpu" and tensor.dtype in COMPILED_DTYPES
        return "cpu" if compiled else "portable"
    if name in ("cpu", "cuda", "triton"):
        device = "cpu" if name == "cpu" or (name == "triton" and interpreting()) else "cuda"
        if tensor.device.type != device:
            raise ValueError(f"backend: {name!r} takes tensors on {device}, got device {tensor.device}")
        if tensor.dtype not in COMPILED_DTYPES:
            names = ", ".join(str(dtype) for dtype in COMPILED_DTYPES)
            raise ValueError(f"backend: {name!r} takes {names}, got {tensor.dtype}")
        if name == "triton" and device == "cpu" and tensor.dtype == torch.bfloat16:
            raise ValueError(
                "backend: 'triton' does not take torch.bfloat16 while interpreting: Triton's interpreter has"
                " its numbers as integers and computes garbage; take torch.float32 or torch.float16, or a GPU"
            )
    return name


@constant_while_compiling
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


@constant_while_compiling  # dynamo does not see a cache and would trace what is behind it
def _automatic_on_gpu(device: torch.device, dtype: torch.dtype, family: str) -> str:
    return _verified_on_gpu(device, dtype, family)


@cache
def _verified_on_gpu(device: torch.device, dtype: torch.dtype, family: str) -> str:
    """A compiled backend only where its suite has passed: by the package's table, or the user's record."""
    if interpreting() or dtype not in COMPILED_DTYPES:  # the interpreter is not what was verified
        return "portable"
    runs = {name for name in records.BACKENDS if why_not(name) is None}
    if not runs:
        return "portable"
    word = str(dtype).removeprefix("torch.")
    name = verified.backend_for(device, dtype, family)
    if name in runs and name not in records.failed(device.index, word, family):
        return name
    name = records.backend_for(device.index, word, family, runs.__contains__)
    if name is None:
        _hint(device, word, family)
    return name or "portable"


def remark(tensor: torch.Tensor, family: str) -> str | None:
    """Why `auto` takes the portable path for a tensor on a GPU, for `explain`; None where it does not."""
    name, dtype = str(tensor.device.type), str(tensor.dtype).removeprefix("torch.")
    if name != "cuda" or _selected.name != "auto" or choose(tensor, family) != "portable":
        return None
    if tensor.dtype not in COMPILED_DTYPES:
        return f"no compiled backend takes {dtype}"
    reason = records.why_none(tensor.device.index, dtype, family) or "its checks failed here (doctor)"
    return f"portable on this GPU: {reason}; python -m mi_kernels verify checks compiled backends"


_hinted = False


def _hint(device: torch.device, dtype: str, family: str) -> None:
    """Says, once a process, how compiled kernels come to run on a GPU that nobody has verified them on."""
    global _hinted
    reason = None if _hinted else records.why_none(device.index, dtype, family)
    if reason is None:
        return
    _hinted = True
    name = records.device_of(device.index)[0]
    warnings.warn(
        f"mi_kernels runs {family} in {dtype} on its portable backend on {name}: {reason}."
        " `python -m mi_kernels verify` checks the compiled kernels there, in three minutes at most",
        RuntimeWarning,
        stacklevel=_users_level(),
    )


@cache
def cpu_isa() -> dict | None:
    """Instruction sets of the CPU library: compiled in, supported by this CPU, selected."""
    if _cpu_error is not None:
        return None
    try:
        text = torch.ops.mi_kernels.cpu_isa()
    except RuntimeError as error:  # MI_KERNELS_CPU_ISA asks for a set that is not there
        return {"error": re.sub("^.*?(?=MI_KERNELS_CPU_ISA)", "", str(error).splitlines()[0])}
    fields = [field.split(",") for field in text.split(";")]
    return {"compiled": fields[0], "supported": fields[1], "selected": fields[2][0]}


def cuda_architectures() -> list[str]:
    """What the CUDA library that is loaded was built for, as in ["80", "90a"]; [] where it cannot say."""
    if _cuda_error is not None:
        return []
    try:
        return torch.ops.mi_kernels.cuda_architectures().split()
    except (RuntimeError, NotImplementedError):  # a library of an older version of this package
        return []


def build_info() -> dict | None:
    """Facts about the build of the native parts, or None without ``_C``, as for another Python."""
    try:
        import mi_kernels._C as _C
    except ImportError:
        return None
    return _C.build_info()
