"""What is installed, what runs here and why the rest does not."""

import importlib
import json
import platform
from typing import Any

import torch

from mi_kernels import backends, verified
from mi_kernels._version import __version__


def report() -> dict[str, Any]:
    """All the facts, as a dict that `json` can write.

    Keys: `versions` (None where a package cannot be imported), `machine`, `build` and `instruction_sets`
    (None without compiled libraries), `cpu_library_error`, `backends`: for each name, None if it runs here,
    else the reason why it does not; and `verified`: the GPUs on which the test suite has passed, which are
    those where `auto` takes compiled kernels.
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
        "build": backends.build_info(),
        "instruction_sets": backends.cpu_isa(),
        "cpu_library_error": backends.cpu_library_error(),
        "backends": {name: backends.why_not(name) for name in backends.NAMES if name != "auto"},
        "verified": verified.as_rows(),
    }


def as_json() -> str:
    return json.dumps(report(), indent=2)


def as_text() -> str:
    facts = report()
    sections = {
        "versions": {name: version or "not installed" for name, version in facts["versions"].items()},
        "machine": facts["machine"] | {"gpu": facts["machine"]["gpu"] or "none"},
        "build": facts["build"] or {"native": "not built"},
        "instruction sets": facts["instruction_sets"] or {"not loaded": facts["cpu_library_error"]},
        "backends": {
            name: "runs" if why_not is None else f"does not run: {why_not}"
            for name, why_not in facts["backends"].items()
        },
        "auto on GPUs": {
            f"{row['backend']} on {row['capability']}": f"{row['dtypes']} ({row['device']}, {row['date']})"
            for row in facts["verified"]
        }
        or {"portable": "no compiled backend has passed the test suite on a GPU"},
    }
    width = max(len(key) for entries in sections.values() for key in entries)
    lines = []
    for title, entries in sections.items():
        lines.append(title)
        lines += [f"  {key:<{width}}  {_shown(value)}" for key, value in entries.items()]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return None
