"""The namespace of the operations is an option of the build, so that two builds can be in one process."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
PROGRAMS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
MISSING = [name for name in ("cmake", "ninja", "c++") if shutil.which(name, path=PROGRAMS) is None]

pytestmark = pytest.mark.build


def test_no_registration_names_it():
    registrations = 0
    for path in SOURCES:
        text = path.read_text()
        names = re.findall(r"\bSTABLE_TORCH_LIBRARY\w*\(\s*(\w+)", text)
        registrations += len(names)
        assert set(names) <= {"MI_NAMESPACE"}, path
        assert not re.search(r'"mi_\w*::', text), f"{path}: expected MI_OPERATION(name)"
    assert registrations > 10


BOTH = """
import importlib.util
import json
import sys
from pathlib import Path

import torch
import mi_kernels as first

folder = Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
second = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(second)
assert second.libraries.build_info()["namespace"] == name
torch.manual_seed(0)
arguments = [torch.randn(size) for size in ((4, 5), (4, 3), (2, 3, 5))]
found = []
for package in (first, second):
    assert package.libraries.cpu_error is None, package.libraries.cpu_error
    leaves = [one.clone().requires_grad_() for one in arguments]
    with package.backend("cpu"):
        y = package.interaction(*leaves)
        y.square().sum().backward()
    found.append((y.detach(), *(leaf.grad for leaf in leaves)))
for one, other in zip(*found, strict=True):
    torch.testing.assert_close(one, other)
for namespace in ("mi_kernels", name):
    assert "CPU: registered" in torch._C._dispatch_dump(f"{namespace}::interaction")
"""


def run(command, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.skipif(
    not (ROOT / "mi_kernels" / "libmi_kernels_cpu.so").exists(), reason="the checkout has no compiled library"
)
def test_two_compiled_builds_compute_in_one_process(tmp_path):
    """The second is the compiled variant of the kernels hub, here for one instruction set alone."""
    layout = tmp_path / "layout"
    command = [
        sys.executable,
        ROOT / "tools" / "hub.py",
        layout,
        "--compile",
        "--scratch",
        tmp_path / "scratch",
    ]
    command += ["--cmake", "-DMI_ISAS= -DCMAKE_BUILD_TYPE=MinSizeRel"]
    run(command, tmp_path)
    (folder,) = layout.glob("build/torch-stable-abi*")
    run([sys.executable, "-c", BOTH, folder], tmp_path)


@pytest.mark.skipif("cmake" in MISSING or "ninja" in MISSING, reason=f"not installed: {', '.join(MISSING)}")
def test_a_namespace_that_is_no_name_is_refused(tmp_path):
    cmake = [shutil.which("cmake", path=PROGRAMS), "-S", ROOT, "-B", tmp_path, "-G", "Ninja"]
    cmake += [f"-DPython_EXECUTABLE={sys.executable}", "-DMI_NAMESPACE=two words"]
    done = subprocess.run(cmake, capture_output=True, text=True, env=os.environ | {"PATH": PROGRAMS})
    assert done.returncode != 0
    assert "MI_NAMESPACE: expected a name of letters, digits and underscores, got 'two words'" in " ".join(
        done.stderr.split()
    )
