"""What an operation knows of a backend: where its kernels are registered, and what they plan for a call.

The records are made in mi_kernels/backends.py, which registers them here, so that operations depend on no
backend in particular. A backend is passed along by name, as an argument of registered operations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from mi_kernels.ops.dtypes import DTYPES


class Automatic(Enum):
    """When ``auto`` takes a backend."""

    ALWAYS = "wherever it takes device and dtype"
    VERIFIED = "where its suite has passed on that device and dtype"
    OTHERWISE = "where no other backend does"
    NEVER = "not at all"


class Answer(NamedTuple):
    """How a primitive runs: algorithm, bytes of scratch (None: not known), and the reason in a sentence."""

    algorithm: str
    scratch: int | None
    why: str


class DenseCall(NamedTuple):
    """A primitive of the dense interaction whose plan is asked for, every row with a context of its own."""

    primitive: str  # "forward", "input_grads" or "weight_grads"
    sizes: tuple[int, int, int, int]  # B, Z, X, O
    x: Tensor
    z: Tensor
    weights: Sequence[Tensor | None]  # W, U, V, c
    terms: tuple[bool, ...]  # of W, U, V, c: those that there are, or whose gradients are wanted
    wanted: Sequence[bool]  # gradients, of x, z, W, U, V, c


class GateCall(NamedTuple):
    """The forward pass of a gate whose plan is asked for."""

    rows: int
    context: int
    x: Tensor
    terms: tuple[bool, ...]  # W, U, V, a shift, and a matrix in it
    activation: str


class Planner:
    """What ``explain`` asks a backend; this one knows nothing of its own."""

    gate = "elementwise"  # how an activation is applied

    def dense(self, call: DenseCall) -> Answer:
        raise NotImplementedError

    def weight_copy(self, weight: Tensor | None) -> int:
        """Bytes of the contiguous copy that the kernels make of W."""
        return 0

    def gate_algorithm(self, activation: str) -> str:
        return self.gate

    def gate_scratch(self, call: GateCall) -> int | None:
        return None

    def linear_scratch(
        self,
        dtype: torch.dtype,
        groups: int,
        rows: int,
        features: int,
        out: int,
        bias: bool,
        major: tuple[bool, bool] = (True, False),
    ) -> int | None:
        """Of a product without W; ``major``: whether the matrix is contiguous along K, and along N."""
        return None


@dataclass(frozen=True)
class Backend:
    """One backend.

    Attributes:
        name: what users call it.
        absent: why its kernels are not there, None where they are; a wrong setting is no reason.
        why_not: why it cannot run in this installation, None where it can.
        devices: the types of device whose tensors it takes here, None for all.
        dtypes: those that it takes.
        automatic: when ``auto`` takes it.
        suffix: of the registered operations that run on it; None where the formula itself runs.
        planner: what ``explain`` asks.
        fused: whether it has kernels of its own: one pass, in which nothing is materialised.
        packs: whether it reads weights that were packed.
        refuses: why it does not take a tensor for a reason beyond device and dtype, None where it does.
        facts: what its build says of itself, for ``doctor``.
    """

    name: str
    absent: Callable[[], str | None] = lambda: None
    why_not: Callable[[], str | None] = lambda: None
    devices: Callable[[], Sequence[str] | None] = lambda: None
    dtypes: Sequence[torch.dtype] = DTYPES
    automatic: Automatic = Automatic.NEVER
    suffix: str | None = ""
    planner: Planner = field(default_factory=Planner)
    fused: bool = False
    packs: bool = False
    refuses: Callable[[Tensor], str | None] = lambda tensor: None
    facts: Callable[[], str] = lambda: ""

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is here and takes the tensor."""
        devices = self.devices()
        if tensor.dtype not in self.dtypes or (devices is not None and tensor.device.type not in devices):
            return False
        return self.absent() is None and self.refuses(tensor) is None

    @property
    def is_reference(self) -> bool:
        """Whether it is the formula term by term, which shares and plans nothing."""
        return self.suffix is None


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    _BACKENDS[backend.name] = backend
    return backend


def get(name: str) -> Backend:
    """The record of a backend.

    Raises ValueError: there is none of this name.
    """
    found = _BACKENDS.get(name)
    if found is None:
        raise ValueError(f"mi_kernels: backend: expected one of {', '.join(_BACKENDS)}, got {name!r}")
    return found


def registered() -> list[Backend]:
    return list(_BACKENDS.values())


def suffixes() -> dict[str, str]:
    """By backend, the suffix of its registered operations."""
    return {name: one.suffix for name, one in _BACKENDS.items() if one.suffix is not None}
