"""The build stage of gpu_check.py, in its own process: the native libraries for the present GPU.

    python tools/gpu_build.py DEVICE SECONDS [--rebuild]     prints the result as JSON in its last line

Existing libraries are used unchanged if they run here. The package loads its libraries once, at import, so
processes started after this one find them.
"""

import json
import os
import shutil
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the CPU library may not be built yet
    from mi_kernels import backends
from mi_kernels.testing import isolated

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "mi_kernels" / "libmi_kernels_cuda.so"


def environment(device: str) -> dict[str, str]:
    """Compile only for this GPU's architecture unless another is requested."""
    found = dict(os.environ)
    nvcc = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc += [f"{home}/bin/nvcc" for home in homes if home]
    # Without a compiler, naming an architecture would turn a build without CUDA kernels into a failure.
    if not found.get("MI_KERNELS_CUDA_ARCHS") and any(path and Path(path).exists() for path in nvcc):
        major, minor = torch.cuda.get_device_capability(device)
        found["MI_KERNELS_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    return found


def build(device: str, seconds: float, again: bool = False) -> dict[str, Any]:
    """Compile the native libraries in place, unless they exist. Triton does not need them."""
    reason = "asked for by --rebuild" if again else backends.why_not("cuda")
    if reason is None:
        return {"status": "prebuilt", "library_bytes": LIBRARY.stat().st_size}
    missing = [name for name in ("cmake", "ninja") if find_spec(name) is None]
    if missing:
        return {"status": f"left out: {', '.join(missing)} not installed", "reason": reason}
    variables = environment(device)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output = isolated.run(command, seconds, variables, ROOT)
    words = {0: "built", None: "stopped: out of time"}
    return {
        "status": words.get(status, f"failed with status {status}"),
        "archs": variables.get("MI_KERNELS_CUDA_ARCHS"),
        "reason": reason,
        "end": output[-2000:] if status != 0 else "",
    }


def main(argv: list[str]) -> int:
    isolated.end_with_this_process()
    device, seconds, *options = argv
    print(json.dumps(build(device, float(seconds), "--rebuild" in options)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
