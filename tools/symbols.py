"""What a compiled library asks of others, as binutils list it."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# manylinux_2_28: glibc, and the libstdc++ and libgcc of GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
STABLE_ABI = (ROOT / "csrc" / "stable_abi.txt").read_text().splitlines()
STABLE_ABI = frozenset(name for name in STABLE_ABI if not name.startswith("#"))
NM, READELF = shutil.which("nm"), shutil.which("readelf")
# Weak ones that every shared library has, for profilers and transactional memory: nobody has to define them.
WEAK = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}


@cache
def symbols(library: Path, which: str) -> frozenset[str]:
    """Dynamic symbols, `name` or `name@version`; `which` is an option of nm."""
    command = [NM, "-D", which, "-P", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return frozenset(line.split()[0].replace("@@", "@") for line in lines)


def undefined(library: Path) -> frozenset[str]:
    return symbols(library, "--undefined-only")


def exported(library: Path) -> frozenset[str]:
    return symbols(library, "--defined-only")


def foreign(library: Path) -> set[str]:
    """What is neither of the stable ABI nor has a version, as everything of libc, libm and libstdc++ has."""
    return {name for name in undefined(library) if "@" not in name} - STABLE_ABI - WEAK


def too_new(library: Path) -> set[str]:
    """What manylinux_2_28 does not have; with NVIDIA's static runtime, linked here, 2_34."""
    newest = NEWEST | ({"GLIBC": (2, 34)} if "cuda" in library.name else {})
    found = set()
    for name in undefined(library):
        version = re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)$", name)
        if version and tuple(map(int, version[2].split("."))) > newest[version[1]]:
            found.add(name)
    return found


def needed(library: Path) -> set[str]:
    """The libraries that the loader brings with it."""
    listing = subprocess.run([READELF, "-d", library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", listing))
