"""The results of `python -m mi_kernels verify` on this machine: a per-user file, and when it is trusted.

The file decides which kernels `auto` runs, so it is used only if no other user (except root) could have
written it, and only for the device, the versions and the kernels that it was recorded with. The table of
`tune` is in the same folder, under the same rule (ops/user_files.py).
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .ops.backend import verifiable
from .ops.library import FAMILIES
from .ops.user_files import distrust, folder, make_private_folder, table, write_atomic

SCHEMA = 1
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Record:
    """The result of a family's checks on a backend, in a dtype, on a device.

    Attributes:
        fault: what went wrong, None if all checks passed.
        checks: the number of checks that passed.
        error: the largest error, as a fraction of what the error rule allows.
        kernels: :func:`fingerprint` of the checked kernels.
    """

    backend: str
    family: str
    dtype: str
    device: str
    capability: str
    versions: dict[str, str | None]
    kernels: str
    date: str
    fault: str | None
    checks: int
    error: float

    @property
    def key(self) -> tuple[str, ...]:
        """Distinguishes environments and machines that share a home directory."""
        where = self.device, self.capability, self.kernels
        versions = (f"{name} {number}" for name, number in sorted(self.versions.items()))
        return self.backend, self.family, self.dtype, *where, *versions


def path() -> Path:
    return folder() / "verified.json"


def read(file: Path | None = None) -> tuple[list[Record], str | None]:
    """The records, and why the file is not used (not trusted, or damaged), else None."""
    try:
        file = file or path()
        file = (
            Path(os.path.realpath(file.parent)) / file.name
        )  # resolved, so that the checked file is the one opened
        reason = distrust(file)
        if reason is not None:
            return [], reason
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError, RuntimeError, RecursionError) as error:
        return [], f"{file or 'its file'} cannot be read: {error}"
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return [], f"{file} was written by another version of this package"
    try:
        return [_record(entry) for entry in found["records"]], None
    except (TypeError, KeyError, ValueError) as error:
        return [], f"{file} is damaged: {type(error).__name__}: {error}"


def _record(entry: dict[str, Any]) -> Record:
    record = Record(**{field.name: entry[field.name] for field in fields(Record)})
    if (
        record.backend not in verifiable()
        or record.family not in FAMILIES
        or not isinstance(record.versions, dict)
    ):
        raise ValueError(f"{record.backend} {record.family}")
    texts = record.dtype, record.device, record.capability, record.kernels, record.date, record.fault or ""
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected texts, got {texts}")
    return record


MAX_RECORDS = 400  # in a file; the oldest are dropped


def write(new: Iterable[Record], file: Path | None = None) -> None:
    """Add records, replacing older ones with the same key.

    Raises OSError: the file cannot be written, or others could write it too. RuntimeError: as `folder`.
    """
    file = file or path()
    make_private_folder(file)
    with _locked(file):
        records = {record.key: record for record in read(file)[0]}
        for record in new:
            records.pop(record.key, None)  # reinserted at the end: ordered by age
            records[record.key] = record
        kept = list(records.values())[-MAX_RECORDS:]
        write_atomic(file, json.dumps({"schema": SCHEMA, "records": [asdict(one) for one in kept]}, indent=1))


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Excludes other processes that write the file."""
    import fcntl  # missing on some systems; on those no file is trusted

    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def device_of(index: int | None) -> tuple[str, str]:
    """Name and compute capability."""
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), f"{major}.{minor}"


_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def _driver() -> str | None:
    for file in _DRIVERS:
        try:
            found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path(file).read_text())
        except OSError:
            continue
        if found:
            return found[0]
    return None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def versions(backend: str) -> dict[str, str | None]:
    """Versions of all layers between a backend's kernels and the GPU; any change invalidates a record."""
    found = {
        "mi_kernels": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _driver(),
    }
    return found | ({"triton": installed("triton")} if backend == "triton" else {})


@cache
def fingerprint(backend: str) -> str:
    """A hash of the kernels, which change without a version in a checkout, and through `tune`."""
    digest = hashlib.sha256()
    for file in _kernel_files(backend):
        digest.update(file.name.encode() + b"\0")
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _kernel_files(backend: str) -> Iterator[Path]:
    if backend == "cuda":
        yield from (file for file in [_PACKAGE / "libmi_kernels_cuda.so"] if file.exists())
        return
    yield from sorted(file for file in (_PACKAGE / "ops" / "triton").iterdir() if file.is_file())
    with suppress(RuntimeError):  # no folder for user files
        if table().is_file() and distrust(table()) is None:
            yield table()


def changed(record: Record) -> str | None:
    """What has changed since the record was written, or None."""
    now = versions(record.backend)
    for name, number in now.items():
        if record.versions.get(name) != number:
            return f"{name} was {record.versions.get(name)} and is {number}"
    return None if record.kernels == fingerprint(record.backend) else "the kernels have changed"


@cache
def here(index: int | None) -> tuple[list[Record], str | None]:
    """The records of a device, cached, and why the file is not used, else None."""
    records, reason = read()
    if not records:
        return [], reason
    name, capability = device_of(index)
    return [r for r in records if (r.device, r.capability) == (name, capability)], reason


def _current(index: int | None, dtype: str) -> list[Record]:
    """Records of a device and dtype with the current versions and kernels."""
    return [one for one in here(index)[0] if one.dtype == dtype and changed(one) is None]


def failed(index: int | None, dtype: str, family: str) -> set[str]:
    """The backends on which a family, or one that it needs, has failed on this device."""
    needed = FAMILIES[family]
    return {r.backend for r in _current(index, dtype) if r.fault is not None and r.family in needed}


def backend_for(
    index: int | None, dtype: str, family: str, runs: Callable[[str], bool] = lambda name: True
) -> str | None:
    """The preferred backend that runs and whose kernels for a family have passed on this device, or None."""
    valid = {(r.backend, r.family) for r in _current(index, dtype) if r.fault is None}
    needed = FAMILIES[family]
    passed = (name for name in verifiable() if all((name, one) in valid for one in needed))
    return next((name for name in passed if runs(name)), None)


def why_none(index: int | None, dtype: str, family: str) -> str | None:
    """Why no verified backend is available, in a few words; None if checks have failed."""
    records, reason = here(index)
    if reason is not None:
        return f"the record is not used: {reason}"
    own = [r for r in records if r.dtype == dtype and r.family in FAMILIES[family]]
    if failed(index, dtype, family):
        return None
    stale = next((text for text in map(changed, own) if text is not None), None)
    return f"since it was verified, {stale}" if stale else "no compiled backend has been verified on it"
