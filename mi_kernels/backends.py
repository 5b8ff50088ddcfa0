"""The records of all backends, and the choice between them."""

import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch

from . import libraries, planners, records, verified
from .ops.backend import Automatic, Backend, get, register, registered
from .ops.compiling import constant_while_compiling
from .ops.dtypes import FLOATING
from .ops.rules import is_distributed
from .ops.triton import interpreting

BackendName = Literal["auto", "reference", "portable", "cpu", "triton", "cuda"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)
TRITON_FROM = (8, 0)  # minimum compute capability
_PACKAGE = Path(__file__).parent


class _Selected(threading.local):
    def __init__(self) -> None:  # runs per thread; Dynamo of PyTorch 2.11 does not guard class attributes
        self.name = "auto"


# A thread-local, not a context variable: torch.compile can trace it and guard on it.
_selected = _Selected()


def _users_level() -> int:
    """The ``stacklevel`` of the caller outside this package, skipping import machinery."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith("<frozen importlib"):
            if Path(name).parent != _PACKAGE and _PACKAGE not in Path(name).parents:
                break
            level += 1
        frame = frame.f_back
    return level


if libraries.cpu_error not in (None, libraries.ASKED_FOR):
    warnings.warn(
        f"mi_kernels runs on its portable backend: {libraries.cpu_error}",
        RuntimeWarning,
        stacklevel=_users_level(),
    )


def cpu_library_error() -> str | None:
    """Why the compiled CPU kernels are missing, or None where they are loaded."""
    return libraries.cpu_error


def _cpu_error() -> str | None:
    return libraries.cpu_error or (libraries.cpu_isa() or {}).get("error")


def _cuda_error() -> str | None:
    return libraries.cuda_error or libraries.cuda_gpu_error()


def _cuda_facts() -> str:
    return f" (built for {' '.join(libraries.cuda_architectures())})"


def _triton_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting():
        return None
    if torch.cuda.is_available() and torch.version.hip is not None:
        return None  # untested on AMD: `auto` selects it only where `verify` has passed on that GPU
    if torch.cuda.is_available():
        best = libraries.best_capability()
        if best < TRITON_FROM:
            here = ".".join(map(str, best))
            return f"it needs a GPU of compute capability 8.0 or later, the best one here has {here}"
        return None
    return "there is no GPU that Triton reaches (with TRITON_INTERPRET=1 its kernels run on the CPU, slowly)"


def _interpreted_error(tensor: torch.Tensor) -> str | None:
    if tensor.dtype == torch.bfloat16 and interpreting():
        return (
            "torch.bfloat16 while interpreting: Triton's interpreter has its numbers as integers and computes"
            " garbage; take torch.float32 or torch.float16, or a GPU"
        )
    return None


# All that is specific to a backend is in its record. `auto` selects the first suitable one, in this order.
register(Backend("reference", suffix=None, planner=planners.Reference()))
register(Backend("portable", suffix="_portable", automatic=Automatic.OTHERWISE, planner=planners.Portable()))
register(
    Backend(
        "cpu",
        absent=cpu_library_error,
        why_not=_cpu_error,
        devices=lambda: ("cpu",),
        dtypes=FLOATING,
        automatic=Automatic.ALWAYS,
        planner=planners.Compiled(),
        fused=True,
        packs=True,
    )
)
register(
    Backend(
        "cuda",
        why_not=_cuda_error,
        devices=lambda: ("cuda",),
        dtypes=FLOATING,
        automatic=Automatic.VERIFIED,
        planner=planners.Cuda(),
        fused=True,
        facts=_cuda_facts,
        lacks=("recurrent",),
    )
)
register(
    Backend(
        "triton",
        why_not=_triton_error,
        devices=lambda: ("cpu",) if interpreting() else ("cuda",),
        dtypes=FLOATING,
        automatic=Automatic.VERIFIED,
        suffix="_triton",
        planner=planners.Triton(),
        fused=True,
        refuses=_interpreted_error,
    )
)


def why_not(name: str) -> str | None:
    """Why backend ``name`` cannot run in this installation, or None if it can.

    Raises ValueError: the name is not in ``NAMES``.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return None if name == "auto" else get(name).why_not()


P = ParamSpec("P")
R = TypeVar("R")


class _Blocks(threading.local):
    """The ``with`` blocks of one object that this thread has entered."""

    def __init__(self) -> None:
        self.entered: list[AbstractContextManager[None]] = []


class Selection(AbstractContextManager[None]):
    """The result of :func:`backend`, a ``with`` block or decorator; without either it has no effect."""

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

    The returned object has no effect by itself, and warns if it is never used in a ``with``.

    Args:
        name: ``"auto"`` (compiled kernels where they exist for device and dtype, on GPUs only if the test
            suite has passed on such hardware or ``python -m mi_kernels verify`` on this one, else portable;
            in ``torch.onnx.export`` the reference, since ONNX has no such operations),
            ``"reference"`` (einsum, differentiated by PyTorch), ``"portable"`` (pure PyTorch, bounded
            memory, any device), ``"cpu"`` (C++ kernels), ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: the name is unknown, or the backend cannot run here; the message says why.

    Example:
        >>> with mi.backend("portable"):
        ...     y = mi.modulate(torch.ones(2, 3), torch.ones(3))
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
    """The backend for an operation of a family (records.FAMILIES) on tensors like this one.

    Raises:
        ValueError: the backend selected by name does not take this device, dtype or family.
    """
    name = _selected.name
    if name == "auto":
        if torch.compiler.is_exporting() and _is_in_onnx_export():
            return "reference"  # ONNX does not have this package's operations
        return _automatic(tensor.device, tensor.dtype, family)
    record = get(name)
    devices = record.devices()
    if devices is not None and tensor.device.type not in devices:
        raise ValueError(f"backend: {name!r} takes tensors on {devices[0]}, got device {tensor.device}")
    if devices is not None and tensor.dtype not in record.dtypes:
        names = ", ".join(str(dtype) for dtype in record.dtypes)
        raise ValueError(f"backend: {name!r} takes {names}, got {tensor.dtype}")
    if family in record.lacks:
        raise ValueError(f"backend: {name!r} has no kernels of the family {family}")
    reason = record.refuses(tensor)
    if reason is not None:
        raise ValueError(f"backend: {name!r} does not take {reason}")
    return name


def is_open() -> bool:
    """Whether the choice is this package's: no backend was asked for by name, and nothing traces the call."""
    if torch.compiler.is_compiling() or _selected.name != "auto":
        return False
    return torch._C._get_tracing_state() is None


def eager_cpu(tensor: object, family: str = "interaction") -> str | None:
    """`choose` in a microsecond: "cpu" for a call that nothing casts or traces, None for any other."""
    if torch.compiler.is_compiling() or not isinstance(tensor, torch.Tensor) or not tensor.is_cpu:
        return None
    if type(tensor) is not torch.Tensor and is_distributed(tensor):
        return None
    name = _selected.name
    if name == "auto":
        name = _auto_choice(tensor.device, tensor.dtype, family)
    if name != "cpu" or tensor.dtype not in FLOATING:
        return None
    if torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None:
        return None
    return name


@constant_while_compiling
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


@constant_while_compiling  # Dynamo ignores caches and would trace the cached function
def _automatic(device: torch.device, dtype: torch.dtype, family: str) -> str:
    return _auto_choice(device, dtype, family)


@cache
def _auto_choice(device: torch.device, dtype: torch.dtype, family: str) -> str:
    """The first backend that ``auto`` may select."""
    candidates = [one for one in registered() if dtype in one.dtypes and device.type in (one.devices() or ())]
    runs = {rule: [one.name for one in candidates if one.automatic == rule] for rule in Automatic}
    for name in runs[Automatic.ALWAYS]:
        if get(name).absent() is None:
            return name
    verified_here = (
        None if interpreting() else _verified_choice(device, dtype, family, runs[Automatic.VERIFIED])
    )
    return verified_here or next(one.name for one in registered() if one.automatic == Automatic.OTHERWISE)


def _verified_choice(device: torch.device, dtype: torch.dtype, family: str, names: list[str]) -> str | None:
    """A backend whose suite has passed, by the package's table or the user's record; else None."""
    runs = {name for name in names if why_not(name) is None and family not in get(name).lacks}
    if not runs:
        return None
    dtype_name = str(dtype).removeprefix("torch.")
    name = verified.backend_for(device, dtype, family)
    if name in runs and name not in records.failed(device.index, dtype_name, family):
        return name
    name = records.backend_for(device.index, dtype_name, family, runs.__contains__)
    if name is None:
        _warn_unverified(device, dtype_name, family)
    return name


def remark(tensor: torch.Tensor, family: str) -> str | None:
    """Why `auto` uses the portable backend for a tensor on a GPU, for `explain`; None if it does not."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.device.type != "cuda" or _selected.name != "auto" or get(choose(tensor, family)).fused:
        return None
    if not any(one.fused and tensor.dtype in one.dtypes for one in registered()):
        return f"no compiled backend takes {dtype}"
    reason = records.why_none(tensor.device.index, dtype, family) or "its checks failed here (doctor)"
    return f"portable on this GPU: {reason}; python -m mi_kernels verify checks compiled backends"


_warned = False


def _warn_unverified(device: torch.device, dtype: str, family: str) -> None:
    """Warn, once per process, that compiled kernels are unverified on this GPU, and how to verify them."""
    global _warned
    reason = None if _warned else records.why_none(device.index, dtype, family)
    if reason is None:
        return
    _warned = True
    name = records.device_of(device.index)[0]
    warnings.warn(
        f"mi_kernels runs {family} in {dtype} on its portable backend on {name}: {reason}."
        " `python -m mi_kernels verify` checks the compiled kernels there, in three minutes at most",
        RuntimeWarning,
        stacklevel=_users_level(),
    )
