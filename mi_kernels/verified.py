"""On which GPUs the test suite has passed: what ``auto`` may choose there, before it asks the user's record.

An entry is added by whoever has run ``make gpu-check`` on the hardware and has seen it pass. It says what
ran, so that it can be run again. Nothing is listed from compilation or interpretation.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from mi_kernels.records import FAMILIES, NEEDED, installed


@dataclass(frozen=True)
class Verified:
    """One run of the suite: backend, what it was allowed to choose from it, and where and when it ran.

    Attributes:
        capability: compute capability of the device, such as (9, 0). Other devices of it count as the same.
        dtypes: of the operands.
        device: the name that the driver gives it.
        date: as in 2026-11-25.
        versions: of torch, CUDA and triton. Triton's counts, for it is the compiler: an entry of its backend
            without one is never chosen.
        results: the file that ``make gpu-check`` wrote, from the root of the repository.
        families: of kernels; all of them, where the whole suite passed.
    """

    backend: Literal["cuda", "triton"]
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    device: str
    date: str
    versions: dict[str, str]
    results: str
    families: tuple[str, ...] = FAMILIES


# In the order of preference. Empty: the kernels have not run on a GPU.
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
    """The backend that has passed the suite of a family on such a GPU in such a dtype, or None.

    What Triton compiles depends on its release, so one that was not tested does not count. Nor does a GPU of
    AMD, whose capability is a number of another kind.
    """
    if torch.version.hip is not None:
        return None
    for entry in VERIFIED:
        if dtype not in entry.dtypes or entry.capability != _capability(device.index):
            continue
        if not set(NEEDED[family]) <= set(entry.families):
            continue
        if entry.backend != "triton" or _release(entry.versions.get("triton")) == _release(_triton()):
            return entry.backend
    return None


def as_rows() -> list[dict[str, str]]:
    """The table in words, for ``doctor``."""
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
