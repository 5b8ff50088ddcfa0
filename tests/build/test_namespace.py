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
import sys
import torch
import mi_kernels as first
import twin_kernels as second
from mi_kernels import libraries as of_first
from twin_kernels import libraries as of_second

assert second.__file__.startswith(sys.argv[1]), second.__file__
assert of_second.build_info()["namespace"] == "twin_kernels" != of_first.build_info()["namespace"]
torch.manual_seed(0)
arguments = [torch.randn(size) for size in ((4, 5), (4, 3), (2, 3, 5))]
found = []
for package, libraries in ((first, of_first), (second, of_second)):
    assert libraries.cpu_error is None, libraries.cpu_error
    leaves = [one.clone().requires_grad_() for one in arguments]
    with package.backend("cpu"):
        y = package.interaction(*leaves)
        y.square().sum().backward()
    found.append((y.detach(), *(leaf.grad for leaf in leaves)))
for one, other in zip(*found, strict=True):
    torch.testing.assert_close(one, other)
for namespace in ("mi_kernels", "twin_kernels"):
    assert "CPU: registered" in torch._C._dispatch_dump(f"{namespace}::interaction")
"""


def run(command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.skipif(
    not (ROOT / "mi_kernels" / "libmi_kernels_cpu.so").exists(), reason="the checkout has no compiled library"
)
def test_two_builds_compute_in_one_process(tmp_path):
    """The second is compiled for one instruction set, by CMake alone, and its package has another name."""
    path = {"env": os.environ | {"PATH": PROGRAMS}}
    options = ("-DMI_NAMESPACE=twin_kernels", "-DMI_CUDA=OFF", "-DMI_ISAS=", "-DCMAKE_BUILD_TYPE=MinSizeRel")
    cmake = shutil.which("cmake", path=PROGRAMS)
    run(
        [
            cmake,
            "-S",
            ROOT,
            "-B",
            tmp_path / "b",
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            *options,
        ],
        **path,
    )
    run([cmake, "--build", tmp_path / "b", "--parallel", "2"], **path)
    run([cmake, "--install", tmp_path / "b", "--prefix", tmp_path / "installed"], **path)
    twin = tmp_path / "site" / "twin_kernels"
    shutil.copytree(ROOT / "mi_kernels", twin, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(tmp_path / "installed" / "mi_kernels", twin, dirs_exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(twin.parent)])}
    run(sys.executable, "-c", BOTH, twin, env=environment, cwd=tmp_path)


@pytest.mark.skipif("cmake" in MISSING or "ninja" in MISSING, reason=f"not installed: {', '.join(MISSING)}")
def test_a_namespace_that_is_no_name_is_refused(tmp_path):
    cmake = [shutil.which("cmake", path=PROGRAMS), "-S", ROOT, "-B", tmp_path, "-G", "Ninja"]
    cmake += [f"-DPython_EXECUTABLE={sys.executable}", "-DMI_NAMESPACE=two words"]
    done = subprocess.run(cmake, capture_output=True, text=True, env=os.environ | {"PATH": PROGRAMS})
    assert done.returncode != 0
    assert "MI_NAMESPACE: expected a name of letters, digits and underscores, got 'two words'" in " ".join(
        done.stderr.split()
    )
