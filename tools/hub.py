"""Lay out this package as the kernels hub takes it: a project for its builder, and variants that it can load.

python tools/hub.py build/hub              the variants without compiled kernels (pure Python and Triton)
python tools/hub.py build/hub --compile    those and the one with the CPU kernels, built in their namespace

A variant is loaded under a name of its own, several in one process, so its imports are relative and its
operations in the namespace of that name: <https://huggingface.co/docs/kernels/kernel-requirements>.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME, VERSION = "mi-kernels", 0  # of build.toml; version 0 is for kernels whose interface may change
PACKAGE = NAME.replace("-", "_")
NOARCH = ("cpu", "cuda", "rocm", "xpu")
STABLE_ABI = "211"
MARK = ".written-by-hub"
BUILT = (
    "*.so",
    "build_facts.py",
    "__pycache__",
)  # lies in a checkout, and is not of this build


def unique(folder: Path = ROOT) -> str:
    """Some digits that change with the sources."""
    digest = hashlib.sha256()
    for part in ("mi_kernels", "csrc", "CMakeLists.txt"):
        top = folder / part
        for path in sorted(p for p in (top.rglob("*") if top.is_dir() else [top]) if p.is_file()):
            if not any(path.match(pattern) or pattern in path.parts for pattern in BUILT):
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:7]


def identity(backend: str, digits: str) -> str:
    """The name of the module and of the operations' namespace."""
    return f"_{PACKAGE}_{backend}_{digits}"


def sources(target: Path) -> None:
    """The files of the package that git has; all but what is built where there is no git."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--", PACKAGE]
    listed = subprocess.run(git, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    if listed.returncode != 0 or not names:
        shutil.copytree(ROOT / PACKAGE, target, ignore=shutil.ignore_patterns(*BUILT))
        return
    for name in names:
        file = target / Path(name).relative_to(PACKAGE)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, file)


def metadata(folder: Path, name: str, backend: str) -> dict:
    files = {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {
        "id": name,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }


# Releases of `kernels` before 0.10 look for the package in a folder of its name.
FOLDER = '''\
    """The package around this folder, for loaders that look here."""

    import importlib.util
    import sys
    from pathlib import Path

    NAME = "{name}"
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, Path(__file__).parents[1] / "__init__.py")
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    globals().update({{k: v for k, v in vars(sys.modules[NAME]).items() if not k.startswith("__")}})
    '''

BUILDER = '''\
"""Nothing was compiled; the namespace is that of the builder of the kernels hub."""

from .._ops import ops

NAMESPACE = ops.__name__.removeprefix("torch.ops.")
SKIPPED = True  # a variant of Python alone
'''


def finish(folder: Path, name: str, backend: str) -> None:
    """What every variant has: the folder of its name, and the description."""
    (folder / PACKAGE).mkdir()
    (folder / PACKAGE / "__init__.py").write_text(textwrap.dedent(FOLDER).format(name=name))
    described = json.dumps(metadata(folder, name, backend), indent=2) + "\n"
    (folder / "metadata.json").write_text(described)


def noarch(output: Path, backend: str, digits: str) -> Path:
    """A variant of Python alone, for every version of torch."""
    folder, name = output / "build" / f"torch-{backend}", identity(backend, digits)
    sources(folder)
    facts = (
        f'"""Nothing was compiled."""\n\nNAMESPACE = "{name}"\nSKIPPED = True  # a variant of Python alone\n'
    )
    (folder / "ops" / "build_facts.py").write_text(facts)
    finish(folder, name, backend)
    return folder


def compiled(output: Path, digits: str, scratch: Path, arguments: list[str]) -> Path:
    """The variant of this machine's processor with the CPU kernels, for every torch from 2.11."""
    name = identity("cpu", f"{digits}_native")
    folder = output / "build" / f"torch-stable-abi{STABLE_ABI}-cpu-{platform.machine()}-linux"
    cmake = [shutil.which("cmake", path=_search()), "-S", ROOT, "-B", scratch, "-G", "Ninja", *arguments]
    run = {"check": True, "env": {**os.environ, "PATH": _search()}, "stdout": sys.stderr}
    subprocess.run(
        [*cmake, f"-DPython_EXECUTABLE={sys.executable}", "-DMI_CUDA=OFF", f"-DMI_NAMESPACE={name}"], **run
    )
    subprocess.run(
        [cmake[0], "--build", scratch, "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count()))], **run
    )
    sources(folder)
    installed = scratch / "installed"
    subprocess.run([cmake[0], "--install", scratch, "--strip", "--prefix", installed], **run)
    shutil.copytree(installed / PACKAGE, folder, dirs_exist_ok=True)
    finish(folder, name, "cpu")
    return folder


def _search() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def project(output: Path) -> None:
    """What the hub's own builder takes."""
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(ROOT / "hub" / name, output / name)
    shutil.copy(ROOT / "LICENSE", output)
    package = output / "torch-ext" / PACKAGE
    sources(package)
    # The builder writes `_ops.py` beside it, with the namespace of each build.
    (package / "ops" / "build_facts.py").write_text(BUILDER)
    (output / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "benchmark.py", output / "benchmarks")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tools/hub.py", description="Lay out this package for the kernels hub.", allow_abbrev=False
    )
    parser.add_argument("output", type=Path, help="a folder, which is replaced")
    parser.add_argument("--compile", action="store_true", help="also the variant with the CPU kernels")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "hub-cmake", help="where to compile")
    parser.add_argument("--cmake", default="", metavar="ARGUMENTS", help="more of CMake's arguments")
    options = parser.parse_args(argv)
    if options.output.exists() and not (options.output / MARK).is_file():
        if not options.output.is_dir() or any(options.output.iterdir()):
            parser.error(f"output: expected a new folder, or one that this has written, got {options.output}")
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    (options.output / MARK).write_text("python tools/hub.py writes this folder anew.\n")
    project(options.output)
    digits = unique()
    built = [noarch(options.output, backend, digits) for backend in NOARCH]
    if options.compile:
        built.append(compiled(options.output, digits, options.scratch, options.cmake.split()))
    for folder in built:
        print(folder.relative_to(options.output), json.loads((folder / "metadata.json").read_text())["id"])


if __name__ == "__main__":
    main()
