"""GPUs on which the test suite has passed: what ``auto`` may select there without the user's record.

Add an entry after ``make gpu-check`` has passed on the hardware. It records the run, so that it can be
repeated. Compilation or interpretation alone is no reason for an entry.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from .records import FAMILIES, installed


@dataclass(frozen=True)
class Verified:
    """One run of the suite: backend, what ``auto`` may select because of it, where and when it ran.

    Attributes:
        capability: compute capability of the device, such as (9, 0); stands for all devices that have it.
        dtypes: of the operands.
        device: its name, as the driver reports it.
        date: as in 2026-11-25.
        versions: of torch, CUDA and triton. Triton is the compiler, so its version is compared: an entry of
            the Triton backend without it is never selected.
        results: the file written by ``make gpu-check``, relative to the root of the repository.
        families: of kernels; None for all of them, if the whole suite passed.
    """

    backend: Literal["cuda", "triton"]
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    device: str
    date: str
    versions: dict[str, str]
    results: str
    families: tuple[str, ...] | None = None


# In order of preference. Empty: the kernels have not run on a GPU.
VERIFIED: tuple[Verified, ...] = ()


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _triton() -> str | None:
    return installed("triton")


def _release(number: str | None) -> list[str] | None:
    return None if number is None else number.split(".")[:2]


def backend_for(device: torch.device, dtype: torch.dtype, family: str) -> str | None:
    """The backend that has passed the suite of a family on such a GPU in this dtype, or None.

    Triton's code depends on its release, so an entry counts only for the tested release. AMD GPUs never
    match: their capability has another meaning.
    """
    if torch.version.hip is not None:
        return None
    for entry in VERIFIED:
        if dtype not in entry.dtypes or entry.capability != _capability(device.index):
            continue
        if entry.families is not None and not set(FAMILIES[family]) <= set(entry.families):
            continue
        if entry.backend != "triton" or _release(entry.versions.get("triton")) == _release(_triton()):
            return entry.backend
    return None


def as_rows() -> list[dict[str, str]]:
    """The table as strings, for ``doctor``."""
    return [
        {
            "backend": entry.backend,
            "capability": ".".join(map(str, entry.capability)),
            "dtypes": ", ".join(str(dtype).removeprefix("torch.") for dtype in entry.dtypes),
            "device": entry.device,
            "date": entry.date,
            "versions": ", ".join(f"{name} {number}" for name, number in entry.versions.items()),
            "results": entry.results,
        }
        for entry in VERIFIED
    ]
