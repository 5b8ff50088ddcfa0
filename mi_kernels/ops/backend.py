"""The type of a backend's record and the registry of records.

The records are created in mi_kernels/backends.py and registered here, so that operations depend on no
particular backend. Registered operations take the backend as an argument, by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import DTYPES


class Automatic(Enum):
    """When ``auto`` selects a backend."""

    ALWAYS = "wherever it supports device and dtype"
    VERIFIED = "where its suite has passed on that device and dtype"
    OTHERWISE = "where no other backend is selected"
    NEVER = "never"


class Answer(NamedTuple):
    """How a primitive runs: algorithm, bytes of scratch (None: unknown), and the reason in one sentence."""

    algorithm: str
    scratch: int | None
    why: str


class DenseCall(NamedTuple):
    """A primitive of the dense interaction to be planned; every row has a context of its own."""

    primitive: str  # "forward", "input_grads" or "weight_grads"
    sizes: tuple[int, int, int, int]  # B, Z, X, O
    x: Tensor
    z: Tensor
    weights: Sequence[Tensor | None]  # W, U, V, c
    terms: tuple[bool, ...]  # of W, U, V, c: those present, or whose gradients are wanted
    wanted: Sequence[bool]  # gradients, of x, z, W, U, V, c


class GateCall(NamedTuple):
    """The forward pass of a gate to be planned."""

    rows: int
    context: int
    x: Tensor
    terms: tuple[bool, ...]  # whether there are W, U, V, a shift, and a shift matrix
    activation: str
    weight: Tensor | None = None  # W


class DualCall(NamedTuple):
    """The forward pass of the product of two linear maps to be planned."""

    rows: int
    widths: tuple[int, int]  # X, Z
    out: int
    ranks: int
    dtype: torch.dtype
    device: torch.device
    k_major: bool  # whether a weight is contiguous along X or Z
    keep: bool  # whether both products are kept for the backward pass


class Planner:
    """A backend's answers to ``explain``; the defaults are those of a backend without kernels."""

    gate = "elementwise"  # how an activation is applied
    ragged = False  # whether groups of rows of unequal length are one call of a kernel

    def dense(self, call: DenseCall) -> Answer:
        raise NotImplementedError

    def gate_algorithm(self, activation: str) -> str:
        return self.gate

    def gate_scratch(self, call: GateCall) -> int | None:
        return None

    def dual_linear(self, call: DualCall) -> Answer:
        """One pass with both sums on chip, unless the backend does otherwise."""
        why = "both products are summed tile by tile, and multiplied while the tiles are on chip"
        return Answer("one_pass", None, why)

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
        """Bytes for a product without W; ``major``: whether the matrix is contiguous along K, and along N."""
        return None


@dataclass(frozen=True)
class Backend:
    """One backend.

    Attributes:
        name: its name for users.
        absent: why its kernels are missing, None where they are present; a wrong setting does not count.
        why_not: why it cannot run in this installation, None where it can.
        devices: the device types that it supports here, None for all.
        dtypes: the supported dtypes.
        automatic: when ``auto`` selects it.
        suffix: suffix of its registered operations; None where the formula itself runs.
        planner: answers ``explain``.
        fused: whether it has kernels of its own, which make one pass and materialise no operand.
        packs: whether it reads packed weights.
        refuses: why it does not support a tensor beyond device and dtype, None where it does.
        facts: facts about its build, for ``doctor``.
        lacks: families that it has no kernels of.
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
    lacks: Sequence[str] = ()

    def takes(self, tensor: Tensor) -> bool:
        """Whether its kernels are present and support the tensor."""
        devices = self.devices()
        if tensor.dtype not in self.dtypes or (devices is not None and tensor.device.type not in devices):
            return False
        return self.absent() is None and self.refuses(tensor) is None

    @property
    def is_reference(self) -> bool:
        """Whether it evaluates the formula term by term, without plans or shared contexts."""
        return self.suffix is None


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    _BACKENDS[backend.name] = backend
    return backend


def get(name: str) -> Backend:
    """The record of a backend.

    Raises ValueError: the name is unknown.
    """
    found = _BACKENDS.get(name)
    if found is None:
        raise ValueError(
            f"mi_kernels: backend: expected one of {', '.join(sorted(suffixes()))}, got {name!r}"
        )
    return found


def registered() -> list[Backend]:
    return list(_BACKENDS.values())


def verifiable() -> tuple[str, ...]:
    """The backends that ``auto`` takes where their suite has passed, in order of preference."""
    return tuple(name for name, one in _BACKENDS.items() if one.automatic == Automatic.VERIFIED)


def suffixes() -> dict[str, str]:
    """The suffix of registered operations by backend."""
    return {name: one.suffix for name, one in _BACKENDS.items() if one.suffix is not None}
