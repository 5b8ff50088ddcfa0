"""What the compiled libraries ask of the machine: torch's stable ABI and manylinux_2_28, and no more."""

import ctypes
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mi_kernels import backends, doctor, libraries
from mi_kernels.ops.namespace import NAMESPACE
from tools import symbols

ROOT = Path(__file__).parents[2]
PACKAGE = Path(libraries.__file__).parent
BUILT = sorted(PACKAGE.glob("libmi_kernels_*.so"))
WHEELS = sorted((ROOT / "dist").rglob("*.whl"))
# Bytes: without CUDA, and with CUDA for 80, 90a, 100 and 120.
LIMITS = {"cpu": 5_000_000, "cuda": 25_000_000}

SYSTEM = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1"}
SYSTEM |= {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(symbols.NM is None or symbols.READELF is None, reason="no binutils"),
]
no_libraries = pytest.mark.skipif(not BUILT, reason="no compiled library in the package")
no_wheels = pytest.mark.skipif(not WHEELS, reason="no wheel in dist/: `make wheel` builds it")


def check(library: Path) -> None:
    assert symbols.undefined(library) & symbols.STABLE_ABI, "nothing of torch is asked for at all?"
    assert symbols.foreign(library) == set()
    assert symbols.too_new(library) == set()
    system = {name for name in symbols.needed(library) if not name.startswith("ld-linux-")}
    assert system <= {
        "libtorch_cpu.so",
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libdl.so.2",
    } | ({"libpthread.so.0", "librt.so.1"} if "cuda" in library.name else set())


@no_libraries
@pytest.mark.parametrize("library", BUILT, ids=lambda path: path.name)
def test_libraries_ask_for_the_stable_abi_and_an_old_system(library):
    check(library)


@no_libraries
@pytest.mark.parametrize("library", BUILT, ids=lambda path: path.name)
def test_libraries_export_nothing(library):
    """Two builds in one process cannot take each other's functions."""
    assert symbols.exported(library) == set()


def test_the_stand_in_lists_what_this_torch_has():
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert symbols.STABLE_ABI and [name for name in symbols.STABLE_ABI if not hasattr(torch_cpu, name)] == []


@no_libraries
def test_the_stand_in_lists_what_is_used_and_no_more():
    used = frozenset().union(*map(symbols.undefined, BUILT))
    if len(BUILT) == 2:
        assert used & symbols.STABLE_ABI == symbols.STABLE_ABI
    assert {name for name in used if re.match("aoti_torch_|torch_", name)} <= symbols.STABLE_ABI


@no_libraries
def test_no_path_of_the_machine_is_in_the_library():
    for library in BUILT:
        assert str(ROOT).encode() not in library.read_bytes()


@no_libraries
def test_doctor_shows_how_the_library_was_built():
    facts = libraries.build_info()
    assert facts is not None
    assert facts["namespace"] == NAMESPACE and facts["processor"] == platform.machine()
    assert facts["instruction_sets"] and set(facts["instruction_sets"]) == set(
        libraries.cpu_isa()["compiled"]
    )
    text = doctor.as_text()
    assert re.search(rf"^  compiler +{re.escape(facts['compiler'])}$", text, re.MULTILINE)
    assert re.search(r"^  torch_target +2\.11$", text, re.MULTILINE)


def test_facts_that_are_not_there_are_none(monkeypatch):
    monkeypatch.setattr(libraries, "_facts", None)
    assert libraries.build_info() is None
    monkeypatch.setattr(backends, "cpu_library_error", lambda: None)
    assert "build_facts.py, which says how they were built, is not there" in doctor.as_text()


def test_no_python_is_compiled_in():
    """Neither pybind11 nor Python's headers: a build needs a compiler, CMake and torch's headers."""
    for path in (
        *ROOT.glob("csrc/**/*.*"),
        ROOT / "CMakeLists.txt",
        ROOT / "setup.py",
        ROOT / "pyproject.toml",
    ):
        assert not re.search(r"pybind11|Python\.h|Development\.Module", path.read_text()), path


@no_wheels
@pytest.mark.parametrize("path", WHEELS, ids=lambda path: path.relative_to(ROOT / "dist").as_posix())
def test_wheels(path, tmp_path):
    """Their names, sizes, files and symbols."""
    assert re.fullmatch(r"mi_kernels-[\w.]+-py3-none-manylinux_2_(28|34)_(x86_64|aarch64)\.whl", path.name)
    assert ("2_34" in path.name) == (path.parent.name == "cuda")
    assert path.stat().st_size <= LIMITS["cuda" if path.parent.name == "cuda" else "cpu"]
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        found = [name for name in names if not name.endswith(".py")]
        found = [wheel.extract(name, tmp_path) for name in found if ".so" in name]
    assert not [name for name in names if not name.startswith("mi_kernels/")], "libraries of others are in it"
    expected = {"libmi_kernels_cpu.so"} | ({"libmi_kernels_cuda.so"} if path.parent.name == "cuda" else set())
    assert {Path(name).name for name in found} == expected
    for name in found:
        check(Path(name))


@no_libraries
@pytest.mark.subprocess
def test_errors_of_the_library_are_errors_of_python():
    """They are thrown there and caught by torch: both have to share one C++ runtime."""
    script = (
        "import torch, mi_kernels\n"
        f"OPS = torch.ops.{NAMESPACE}\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        OPS.interaction(torch.ones(4, 5), torch.ones(3, 3), torch.ones(2, 3, 5), None, None, None)\n"
        "    except RuntimeError as error:\n"
        "        print(str(error).splitlines()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(.*interaction: z: expected .*\n){3}", done.stdout), done.stdout
