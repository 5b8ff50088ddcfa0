"""What every test runs under: poisoned uninitialised memory, a seed, and a choice of backends."""

import functools
import inspect
import os
import signal
from typing import NamedTuple

import pytest
import rehearsed
import selection
import torch
from emulated import backend as emulated
from hypothesis import settings

import mi_kernels as mi
from mi_kernels import backends

# PyTorch refuses cuBLAS under deterministic algorithms without it; read when the first GPU product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The same examples on every machine and every run; a slow machine is no failure.
SELECTION = os.environ.get("MI_KERNELS_TEST_SELECTION")
EXAMPLES = 10 if SELECTION == "fast" else 60
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=EXAMPLES)
settings.load_profile("fixed")

# Workers share the cores; what threads change is the subject of test_determinism.py.
THREADS = max((os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 1)


class BackendOnDevice(NamedTuple):
    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"


def _search_builtins_once() -> None:
    """Triton's interpreter looks for the builtins of its language at every call of a device function.

    Searching modules and classes takes half of the time of these tests; which names are builtins is known
    after the first time.
    """
    from triton.language import core
    from triton.runtime import interpreter

    builtins = functools.cache(lambda package: inspect.getmembers(package, core.is_builtin))

    def patch(package, builder, *scope):
        found = builtins(package)
        if found and core.is_builtin(
            getattr(package, found[-1][0])
        ):  # else they have been patched, all of them
            for name, member in found:
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch


def _places() -> list[BackendOnDevice]:
    if backends.interpreting():  # test_triton.py runs tests so, in a process of their own
        _search_builtins_once()
        return [BackendOnDevice("triton", "cpu")]
    if "MI_KERNELS_TEST_EMULATED" in os.environ:  # the CUDA kernels on the host: test_cuda_emulated.py
        emulated.install()
        return [BackendOnDevice("cuda", "cpu")]
    if "MI_KERNELS_TEST_REHEARSED" in os.environ:  # the launches of Triton on a GPU: rehearsed.py
        rehearsed.install()
        return [BackendOnDevice("triton", "cpu")]
    places = [BackendOnDevice(name, "cpu") for name in ("portable", "cpu") if backends.why_not(name) is None]
    if torch.cuda.is_available():
        names = ("portable", "triton", "cuda")
        places += [BackendOnDevice(name, "cuda") for name in names if backends.why_not(name) is None]
    return places


def _asked_for(places: list[BackendOnDevice]) -> list[BackendOnDevice]:
    """Of MI_KERNELS_TEST_PLACES, as in "triton-cuda,cuda-cuda", where it is set; others get no tests."""
    names = os.environ.get("MI_KERNELS_TEST_PLACES")
    if names is None:
        return places
    known = {str(place): place for place in places}
    missing = [name for name in names.split(",") if name not in known]
    if missing:
        raise pytest.UsageError(
            f"MI_KERNELS_TEST_PLACES: expected some of {', '.join(known)}, got {', '.join(missing)}"
        )
    return [known[name] for name in names.split(",")]


PLACES = _asked_for(_places())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SELECTION not in (None, "gpu", "fast", "all"):
        raise pytest.UsageError(f"MI_KERNELS_TEST_SELECTION: expected gpu, fast or all, got {SELECTION}")
    named = any("::" in argument for argument in config.args)
    if SELECTION == "all" or (SELECTION is None and named):
        return
    items[:], left_out = selection.thinned(items, SELECTION)
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def one_thread():
    """For small models: more threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=PLACES, ids=str)
def place(request):
    """A backend that runs here, selected for the test, and the device it runs on."""
    with mi.backend(request.param.backend):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what torch.empty returns, in Python and in compiled kernels, with NaN (integers: the largest)."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _signals():
    """A command that a test calls handles the signals that end this process; not beyond the test."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def fresh_compiler():
    """Nothing compiled by another test is left, and nothing is left for the next one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
