"""Builds the native parts by driving CMake and ninja; everything else is declared in pyproject.toml.

Environment variables:
    MI_KERNELS_SKIP_NATIVE=1  build no native part: the package runs on its pure PyTorch backends, and
                              says so to those who ask, not at every import
    CXX                       the compiler, where it is not g++
    FORCE_CUDA=1 | 0          build the CUDA kernels, or leave them out; without it they are built where
                              torch has CUDA and an nvcc is found. No GPU is needed
    MI_KERNELS_CUDA_ARCHS     build them for these architectures, such as "80;89;90a;100;120"
    MAX_JOBS                  number of parallel compiler processes (default: the number of CPUs)
    CMAKE_ARGS                extra arguments for the CMake configure step, such as -DMI_NAMESPACE=my_kernels

The libraries depend on no Python, and of torch on the oldest supported: a wheel is tagged py3-none-PLATFORM.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1: require_build_tools says that it is too old
    bdist_wheel = setuptools.Command

ROOT = Path(__file__).resolve().parent
CPU_LIBRARY = "mi_kernels.libmi_kernels_cpu"
CUDA_LIBRARY = "mi_kernels.libmi_kernels_cuda"
PACKAGE = ROOT / "mi_kernels"
# What mi_kernels/libraries.py reads: written by CMake or, where nothing is compiled, here.
FACTS = os.path.join("ops", "build_facts.py")
PURE_FACTS = '''"""Facts about this build; written by setup.py."""

NAMESPACE = "mi_kernels"
SKIPPED = True  # MI_KERNELS_SKIP_NATIVE
'''
SKIP_NATIVE = os.environ.get("MI_KERNELS_SKIP_NATIVE", "0") not in ("", "0")

# PyPI's cmake and ninja put their programs beside the interpreter, which is not on PATH when a virtual
# environment is used without being activated.
SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def require_build_tools() -> None:
    """Ends the build, in one sentence, where something is missing that compiling takes."""
    if SKIP_NATIVE:
        return
    missing = [module for module in ("torch",) if find_spec(module) is None]
    if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not read pyproject.toml's license
        missing.append(f"setuptools>=77 (it found {setuptools.__version__})")
    missing += [program for program in ("cmake", "ninja") if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        sys.exit(
            "mi_kernels compiles against the headers of an installed torch, and this build cannot find "
            f"{', '.join(missing)}: run `pip install torch ninja cmake 'setuptools>=77'`, then "
            "`pip install . --no-build-isolation` (or set MI_KERNELS_SKIP_NATIVE=1 to install "
            "without compiled kernels)."
        )
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if "CMAKE_CXX_COMPILER" in os.environ.get("CMAKE_ARGS", ""):
        return
    if not any(shutil.which(program, path=SEARCH_PATH) for program in named or ("g++", "c++", "clang++")):
        sys.exit(
            f"mi_kernels compiles its kernels, and this build cannot find {named[0] if named else 'g++'}: "
            "install g++ (or name another compiler in CXX), or set MI_KERNELS_SKIP_NATIVE=1 to install "
            "without compiled kernels."
        )


def cuda_options() -> list[str]:
    """What the environment says of the CUDA kernels, for CMake, which decides where it says nothing."""
    force, archs = os.environ.get("FORCE_CUDA", ""), os.environ.get("MI_KERNELS_CUDA_ARCHS", "")
    wanted = "AUTO" if force == "" else "OFF" if force == "0" else "ON"
    listed = ";".join(archs.replace(",", " ").replace(";", " ").split())
    return [f"-DMI_CUDA={wanted}", f"-DMI_CUDA_ARCHS={listed}"]


class Metadata(dist_info):
    """pip asks for it before it resolves and downloads dependencies (torch, gigabytes of it) and builds."""

    def run(self) -> None:
        require_build_tools()
        super().run()


class Sources(build_py):
    """A wheel gets what lies in the build directory: only what this build put there."""

    def run(self) -> None:
        target = PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE.name)
        if target.resolve() != PACKAGE:
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        facts = target / FACTS
        if target.resolve() == PACKAGE and (PACKAGE / "libmi_kernels_cpu.so").exists():
            return  # compiled in place before, with the facts of that
        facts.unlink(missing_ok=True)  # of a build before, in the checkout; CMake writes its own
        if SKIP_NATIVE:
            facts.parent.mkdir(parents=True, exist_ok=True)
            facts.write_text(PURE_FACTS)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        written = SKIP_NATIVE and not self.editable_mode
        facts = [os.path.join(self.build_lib, PACKAGE.name, FACTS)] if written else []
        return sorted({*super().get_outputs(include_bytecode), *facts})


class Wheel(bdist_wheel):
    """The libraries do not depend on the Python that builds them."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if SKIP_NATIVE else ("py3", "none", platform)


class CMakeBuild(build_ext):
    """One CMake run builds all libraries, for a wheel and in place: what is there is not compiled again."""

    def run(self) -> None:
        require_build_tools()
        super().run()

    def build_extensions(self) -> None:
        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_platform()}"
        configure = [
            *("-S", ROOT, "-B", build_dir, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=SEARCH_PATH)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *cuda_options(),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # CMake decides whether there is a CUDA library; one of an earlier build would be loaded in its place.
        Path(self.build_lib, self.get_ext_filename(CUDA_LIBRARY)).unlink(missing_ok=True)
        self.cmake(*configure)
        self.cmake("--build", build_dir, "--parallel", jobs)
        self.cmake("--install", build_dir, "--strip", "--prefix", Path(self.build_lib).resolve())

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, PACKAGE.name, FACTS), PACKAGE / FACTS)
        cuda = self.get_ext_filename(CUDA_LIBRARY)
        if not Path(self.build_lib, cuda).exists():
            Path(ROOT, cuda).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), os.path.join(self.build_lib, PACKAGE.name, FACTS)]

    def cmake(self, *arguments) -> None:
        command = [shutil.which("cmake", path=SEARCH_PATH), *arguments]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            # The compiler's message stands above; a Python traceback under it would only hide it.
            sys.exit(f"mi_kernels: `{shlex.join(map(str, command))}` failed with status {error.returncode}.")

    def get_ext_filename(self, fullname: str) -> str:
        # Loaded by torch.ops.load_library, not imported: no Python version in its name.
        if fullname in (CPU_LIBRARY, CUDA_LIBRARY):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


# The CUDA library is optional: an extension that may be missing.
EXTENSIONS = [
    Extension(CPU_LIBRARY, []),
    Extension(CUDA_LIBRARY, [], optional=True),
]

setup(
    ext_modules=[] if SKIP_NATIVE else EXTENSIONS,
    cmdclass={"dist_info": Metadata, "build_py": Sources, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
