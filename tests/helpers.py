"""Small tools of several test files."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mi_kernels as mi
from mi_kernels.ops.interaction import reference


def plain(name: str) -> str:
    """The name of an operation without the suffix of a twin."""
    return name.removesuffix("_portable").removesuffix("_triton")


class Spy(TorchDispatchMode):
    """Records the calls of this package's operations.

    ``calls``: name and arguments, ``names``: names alone, both without the suffix of a twin;
    ``raw``: full names.
    """

    def __init__(self):
        super().__init__()
        self.raw: list[str] = []
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("mi_kernels"):  # the emulated ones too
            name = func.__name__.split(".")[0]
            self.raw.append(name)
            self.calls.append((plain(name), args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def reference_gradients(needs: tuple[bool, ...]):
    """A function (g, x, z, W, U, V, c) -> the gradients by the needed arguments, by PyTorch from einsum."""

    def gradients(grad: Tensor, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
        y = reference.interaction(*leaves)
        return gradients_of(y, leaves, grad, needs)

    return gradients


def gradients_of(y: Tensor, arguments, grad: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    wanted = [t for t, need in zip(arguments, needs, strict=True) if need and t is not None]
    if not y.requires_grad:  # no argument contributes
        return tuple(torch.zeros_like(t) for t in wanted)
    found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))


COMPILE = {"fullgraph": True, "dynamic": True}


def with_gradients(function, arguments) -> list[Tensor]:
    """y of fresh leaves, and the gradients of sum(y^2) by each of them."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in arguments]
    y = function(*leaves)
    y.float().pow(2).sum().backward()
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


def environment_of_pytest(**variables: str) -> dict[str, str]:
    """For a second pytest, on no more threads than this process."""
    # The number of workers says which share of the cores is this process's (conftest.py).
    share = "PYTEST_XDIST_WORKER_COUNT"
    kept = {k: v for k, v in os.environ.items() if k == share or not k.startswith("PYTEST_")}
    root = Path(mi.__file__).parents[1]
    return kept | {"PYTHONPATH": os.pathsep.join(map(str, (root, *sys.path)))} | variables


@contextmanager
def interruptible():
    """Processes started inside can be interrupted, also if this one, started with & or nohup, cannot."""
    ignored = [s for s in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def located(argument: str | Path) -> str:
    """A test file, or tests in it, by the name of the file alone: where it is."""
    name = str(argument)
    if re.match(r"test_\w+\.py(::|$)", name) is None:
        return name
    file, *node = name.split("::")
    (found,) = Path(__file__).parent.glob(f"*/{file}")
    return "::".join((str(found), *node))


def assert_passes(*arguments: str | Path, least: int = 1, **variables: str) -> None:
    """A second pytest, on no more threads than this process, with these environment variables.

    ``least``: how many tests have to pass, so that a selection that has become empty is noticed.
    """
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *map(located, arguments)]
    root, environment = Path(mi.__file__).parents[1], environment_of_pytest(**variables)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least, done.stdout[-500:]


def assert_passes_interpreted(*arguments: str, **variables: str) -> None:
    """In Triton's interpreter; TRITON_INTERPRET is read when the kernels are made."""
    assert_passes(*arguments, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", **variables)
