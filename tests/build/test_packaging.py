"""What is built of a checkout: the sdist, a pure wheel, and what a build says that lacks something."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of the files in git, those that an sdist has no use for: none so far.
LEFT_OUT: set[str] = set()


def _files() -> list[str]:
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except OSError:
        return []
    names = done.stdout.split("\0") if done.returncode == 0 else []
    return [name for name in names if name and (ROOT / name).is_file() and not name.startswith("shared/")]


FILES = _files() if (ROOT / ".git").exists() else []  # .git is a file in a worktree
pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(not FILES, reason="no git checkout to build from"),
    pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools is not installed"),
]
FACTS = "mi_kernels/ops/build_facts.py"
PACKAGE = {name for name in FILES if name.startswith("mi_kernels/")}
BUILD = "import sys\nfrom setuptools import build_meta\nprint(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A copy of what git has, or would have."""
    checkout = tmp_path_factory.mktemp("pristine") / "checkout"
    for name in FILES:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    return checkout


@pytest.fixture
def checkout(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkout")


@pytest.fixture(scope="module")
def setuptools_alone(tmp_path_factory):
    """A folder for PYTHONPATH: with -S, Python finds setuptools there and no torch."""
    site = tmp_path_factory.mktemp("site")
    where = Path(find_spec("setuptools").origin).parents[1]
    for found in (*where.glob("setuptools*"), where / "_distutils_hack", where / "pkg_resources"):
        if found.exists():
            (site / found.name).symlink_to(found)  # the metadata too: they name setuptools' commands
    return site


def environment(**variables):
    kept = ("MI_KERNELS_", "CMAKE_", "PYTHONPATH", "CXX")
    return {k: v for k, v in os.environ.items() if not k.startswith(kept)} | variables


def run(checkout, *command, **variables):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, cwd=checkout, env=environment(**variables), capture_output=True, text=True, timeout=300
    )


def test_the_sdist_needs_no_torch_and_has_everything(checkout, setuptools_alone, tmp_path):
    for name in (
        "mi_kernels/libmi_kernels_cpu.so",
        "mi_kernels/ops/build_facts.py",
        "tests/__pycache__/a.pyc",
    ):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("built")
    alone = {"PYTHONPATH": str(setuptools_alone)}
    absent = run(checkout, "-S", "-c", "import setuptools, torch", **alone)
    assert "No module named 'torch'" in absent.stderr
    required = run(checkout, "-S", "-c", BUILD, "get_requires_for_build_sdist", "", **alone)
    assert required.returncode == 0, required.stderr
    done = run(checkout, "-S", "-c", BUILD, "build_sdist", tmp_path, **alone)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    names = {name for name in names if not name.startswith("mi_kernels.egg-info/")}
    assert names - {"PKG-INFO", "setup.cfg"} == set(FILES) - LEFT_OUT


def test_a_pure_wheel_has_what_the_checkout_has_and_does_not_warn(checkout, setuptools_alone, tmp_path):
    """Not what an earlier build left behind; the build is not run, but copied from its directory."""
    for stale in ("build/lib/mi_kernels/deleted.py", "build/lib/mi_kernels/libmi_kernels_cpu.so"):
        (checkout / stale).parent.mkdir(parents=True, exist_ok=True)
        (checkout / stale).write_text("stale")
    pure = {"PYTHONPATH": str(setuptools_alone), "MI_KERNELS_SKIP_NATIVE": "1"}
    done = run(checkout, "-S", "-c", BUILD, "build_wheel", tmp_path, **pure)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        wheel.extractall(site)
    assert names == PACKAGE | {FACTS}
    script = (
        "import mi_kernels as mi, torch\nfrom mi_kernels import doctor\nprint(doctor.as_text())\n"
        "x = torch.ones(2, 3)\nprint(mi.__file__, mi.interaction(x, x, None, x))"
    )
    used = run(tmp_path, "-W", "error::RuntimeWarning", "-c", script, PYTHONPATH=str(site))
    assert used.returncode == 0, used.stderr
    assert str(site) in used.stdout and "MI_KERNELS_SKIP_NATIVE" in used.stdout
    (site / FACTS).unlink()
    warned = run(tmp_path, "-W", "error::RuntimeWarning", "-c", script, PYTHONPATH=str(site))
    assert "RuntimeWarning: mi_kernels runs on its portable backend" in warned.stderr


PROGRAMS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
MISSING = [name for name in ("torch",) if find_spec(name) is None]
MISSING += [name for name in ("cmake", "ninja") if shutil.which(name, path=PROGRAMS) is None]
needs_build_tools = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
SKIP = "MI_KERNELS_SKIP_NATIVE=1"


@pytest.mark.parametrize("hook", ["prepare_metadata_for_build_wheel", "build_wheel", "build_ext"])
def test_without_torch_a_build_says_so_at_once(hook, checkout, setuptools_alone, tmp_path):
    command = ("-c", BUILD, hook, tmp_path) if hook != "build_ext" else ("setup.py", hook, "--inplace")
    done = run(checkout, "-S", *command, PYTHONPATH=str(setuptools_alone))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "cannot find torch: run" in said and "pip install . --no-build-isolation" in said and SKIP in said


@needs_build_tools
@pytest.mark.parametrize("compiler", [None, "nowhere-g++ -O2"])
@pytest.mark.parametrize("hook", ["prepare_metadata_for_build_wheel", "build_wheel", "build_ext"])
def test_without_a_compiler_a_build_says_so_in_one_sentence(hook, compiler, checkout, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cmake", "ninja"):
        (programs / name).symlink_to(shutil.which(name, path=PROGRAMS))
    command = ("-c", BUILD, hook, tmp_path) if hook != "build_ext" else ("setup.py", hook, "--inplace")
    variables = {"CXX": compiler} if compiler else {}
    done = run(checkout, *command, PATH=str(programs), **variables)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert f"cannot find {'nowhere-g++' if compiler else 'g++'}: install g++" in said and SKIP in said
    assert said.count(". ") == 0 and said.endswith("without compiled kernels.")


# Instead of compiling, libraries are put where CMake would install them.
COMPILED = """
import runpy, subprocess, sys
from pathlib import Path

def cmake(command, check):
    if "--install" in command:
        for name in ("libmi_kernels_cpu.so", "ops/build_facts.py"):
            (Path(command[-1]) / "mi_kernels" / "ops").mkdir(parents=True, exist_ok=True)
            (Path(command[-1]) / "mi_kernels" / name).write_text("compiled = True")

subprocess.run = cmake
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@needs_build_tools
def test_a_compiled_wheel_is_for_every_python(checkout, tmp_path):
    """It has what the checkout has, the library and its facts; nothing that an earlier build left."""
    for stale in ("build/lib/mi_kernels/deleted.py", f"{FACTS}", "mi_kernels/libmi_kernels_cuda.so"):
        (checkout / stale).parent.mkdir(parents=True, exist_ok=True)
        (checkout / stale).write_text("stale")
    done = run(checkout, "-c", COMPILED, "bdist_wheel", "--dist-dir", tmp_path / "dist")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "dist").iterdir()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert path.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert wheel.read(FACTS) == b"compiled = True"
        (metadata,) = (name for name in wheel.namelist() if name.endswith("dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in wheel.read(metadata).decode()
    assert names == PACKAGE | {FACTS, "mi_kernels/libmi_kernels_cpu.so"}


@needs_build_tools
def test_compiling_in_place_replaces_the_facts_of_a_pure_installation(checkout, setuptools_alone, tmp_path):
    """`make` installs the package editable and pure, and compiles it then."""
    pure = {"PYTHONPATH": str(setuptools_alone), "MI_KERNELS_SKIP_NATIVE": "1"}
    done = run(checkout, "-S", "-c", BUILD, "build_editable", tmp_path, **pure)
    assert done.returncode == 0 and "SKIPPED" in (checkout / FACTS).read_text(), done.stderr
    # Later, when what it depends on has changed: the library that is there keeps its facts.
    (checkout / "mi_kernels" / "libmi_kernels_cpu.so").touch()
    (checkout / FACTS).write_text("COMPILED = True")
    done = run(checkout, "-S", "-c", BUILD, "build_editable", tmp_path, **pure)
    assert done.returncode == 0 and (checkout / FACTS).read_text() == "COMPILED = True", done.stderr
    done = run(checkout, "-c", COMPILED, "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert (checkout / "mi_kernels" / "libmi_kernels_cpu.so").is_file()
    assert (checkout / FACTS).read_text() == "compiled = True"
