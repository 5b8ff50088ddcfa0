"""On which GPUs the test suite has passed: what ``auto`` may choose there, before it asks the user's record.

An entry is added by whoever has run ``make gpu-check`` on the hardware and has seen it pass. It says what
ran, so that it can be run again. Nothing is listed from compilation or interpretation.
"""

from dataclasses import dataclass
from functools import cache

import torch

from mi_kernels.records import FAMILIES, NEEDED, installed


@dataclass(frozen=True)
class Verified:
    """One run of the suite: backend, what it was allowed to choose from it, and where and when it ran.

    Attributes:
        backend: ``"cuda"`` or ``"triton"``.
        capability: compute capability of the device, such as (9, 0). Other devices of it count as the same.
        dtypes: of the operands.
        device: the name that the driver gives it.
        date: as in 2026-11-25.
        versions: of torch, CUDA and (of a Triton backend) triton. Triton's counts, for it is the compiler.
        results: the file that ``make gpu-check`` wrote, from the root of the repository.
        families: of kernels; all of them, where the whole suite passed.
    """

    backend: str
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    device: str
    date: str
    versions: dict[str, str]
    results: str
    families: tuple[str, ...] = FAMILIES

    def __post_init__(self) -> None:
        """Raises ValueError: an entry that could be chosen wrongly, or never."""
        fault = self._fault()
        if fault is not None:
            raise ValueError(f"verified: {self.backend} on {self.device} ({self.date}): {fault}")

    def _fault(self) -> str | None:
        if self.backend not in ("cuda", "triton"):
            return f"backend: expected 'cuda' or 'triton', got {self.backend!r}"
        pair = self.capability
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(n, int) for n in pair):
            return f"capability: expected a tuple of two integers, got {pair!r}"
        of_torch = isinstance(self.dtypes, tuple) and all(isinstance(d, torch.dtype) for d in self.dtypes)
        if not of_torch or not self.dtypes:
            return f"dtypes: expected a tuple of torch.dtype, got {self.dtypes!r}"
        if not isinstance(self.families, tuple) or not set(self.families) <= set(FAMILIES):
            return f"families: expected a tuple of {', '.join(FAMILIES)}, got {self.families!r}"
        missing = {"torch"} | ({"triton"} if self.backend == "triton" else set())
        missing -= self.versions.keys()
        return f"versions: no {', '.join(sorted(missing))}" if missing else None


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
        if entry.backend != "triton" or _release(entry.versions["triton"]) == _release(_triton()):
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
