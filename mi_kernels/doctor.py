"""What is installed, what runs here and why the rest does not."""

import importlib
import json
import platform
from typing import Any

import torch

from . import backends, libraries, records, verified
from ._version import __version__
from .ops.backend import get


def report() -> dict[str, Any]:
    """All facts as a JSON-serialisable dict.

    Keys: `versions` (None where a package cannot be imported), `machine`, `build` and `instruction_sets`
    (None without compiled libraries), `cpu_library_error`, `backends`: for each name, None if it runs here,
    else the reason why not; `verified`: the GPUs on which the test suite has passed, where `auto` selects
    compiled kernels; `record`: the file of `verify`, its result for each family on each device, and why the
    file is not used, else None; `tiles`: likewise for the file of `tune`.
    """
    return {
        "versions": {
            "mi_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "machine": {
            "platform": platform.platform(),
            "torch_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "build": libraries.build_info(),
        "cuda_architectures": libraries.cuda_architectures(),
        "instruction_sets": libraries.cpu_isa(),
        "cpu_library_error": backends.cpu_library_error(),
        "backends": {name: backends.why_not(name) for name in backends.NAMES if name != "auto"},
        "verified": verified.as_rows(),
        "record": _record(),
        "tiles": _tiles(),
    }


def _record() -> dict[str, Any]:
    found, reason = records.read()
    rows = [
        {
            "backend": one.backend,
            "family": one.family,
            "dtype": one.dtype,
            "device": one.device,
            "date": one.date,
            "passed": one.fault is None,
            "fault": one.fault,
            "outdated": records.changed(one),
        }
        for one in found
    ]
    try:
        where = str(records.path())
    except RuntimeError as error:
        where = f"no place: {error}"
    return {"path": where, "not_used": reason, "rows": rows}


def _tiles() -> dict[str, Any]:
    from .ops.triton import tiles

    choices, reason = tiles.user_table()
    try:
        where = str(records.table())
    except RuntimeError as error:
        where = f"no place: {error}"
    return {"path": where, "not_used": reason, "choices": len(choices)}


def _lines_of_record(record: dict[str, Any]) -> dict[str, str]:
    """For each backend on each device, what passed and what is outdated; failures one by one."""
    if record["not_used"] is not None:
        return {"record": f"not used: {record['not_used']}"}
    passed: dict[str, list[str]] = {}
    lines = {}
    for row in record["rows"]:
        where = f"{row['backend']} on {row['device']}"
        if row["outdated"] is not None:
            lines[f"{where}, {row['date']}"] = f"not used: {row['outdated']}; verify again"
        elif row["passed"]:
            passed.setdefault(where, []).append(
                f"{row['family']} {row['dtype']}{_lacks(row, record['rows'])}"
            )
        else:
            lines[f"{where}, {row['family']} {row['dtype']}"] = f"failed: {row['fault']}"
    return {where: ", ".join(found) for where, found in passed.items()} | lines


def as_json() -> str:
    return json.dumps(report(), indent=2)


def as_text() -> str:
    facts = report()
    sections = {
        "versions": {name: version or "not installed" for name, version in facts["versions"].items()},
        "machine": facts["machine"] | {"gpu": facts["machine"]["gpu"] or "none"},
        "build": facts["build"] or {"native": _without_facts(facts["cpu_library_error"])},
        "instruction sets": facts["instruction_sets"] or {"not loaded": facts["cpu_library_error"]},
        "backends": {
            name: "runs" + get(name).facts() if why_not is None else f"does not run: {why_not}"
            for name, why_not in facts["backends"].items()
        },
        "auto on GPUs": {
            f"{row['backend']} on {row['capability']}": f"{row['dtypes']} ({row['device']}, {row['date']})"
            for row in facts["verified"]
        }
        or {"portable": "no compiled backend has passed the test suite on a GPU"},
        "auto, by `verify`": _lines_of_record(facts["record"])
        or {"record": f"none: {facts['record']['path']} is not there"},
        "tiles, by `tune`": {"table": _line_of_tiles(facts["tiles"])},
    }
    width = max(len(key) for entries in sections.values() for key in entries)
    lines = []
    for title, entries in sections.items():
        lines.append(title)
        lines += [f"  {key:<{width}}  {_shown(value)}" for key, value in entries.items()]
    return "\n".join(lines)


def _line_of_tiles(tiles: dict[str, Any]) -> str:
    if tiles["not_used"] is not None:
        return f"not used: {tiles['not_used']}"
    return f"{tiles['choices']} choices in {tiles['path']}" if tiles["choices"] else "none"


def _without_facts(cpu_library_error: str | None) -> str:
    """Libraries that were put there without the file that CMake writes beside them."""
    if cpu_library_error is not None:
        return "not built"
    return "libraries are loaded; mi_kernels/ops/build_facts.py, which says how they were built, is not there"


def _lacks(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """For a family that passed, the other families that its calls need and that did not pass."""
    alike = ("backend", "dtype", "device", "outdated")
    passed = {one["family"] for one in rows if one["passed"] and all(one[k] == row[k] for k in alike)}
    lacking = [family for family in records.FAMILIES[row["family"]] if family not in passed]
    return f" (not used: {', '.join(lacking)} did not pass)" if lacking else ""


def _shown(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return None
