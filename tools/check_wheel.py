"""The wheel in fresh environments: installed, asked what runs, and tested.

    python tools/check_wheel.py 2.11.0@3.12 2.14.1@3.13    torch and Python of each environment
    python tools/check_wheel.py --prepare 2.11.0@3.12      only installs torch there, which is gigabytes

An environment is kept in .venv-wheel, by that name; the wheel is installed into it anew each time. What runs
there are the tests that depend on the release of torch: tracing, the choice of a backend, autocast, and some
of the values.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv-wheel"
WHEELS = ROOT / "dist"
TESTS = (
    *("wheel", "compile", "gates_compile", "contexts", "backends", "verified", "autocast", "interaction"),
    *("gradients", "functional_transforms", "engine", "autocast_cache"),
)
CHOICE = (
    "not portable and not bfloat16 and (wheel or compile or backends or verified or autocast"
    " or odd and float32 or jacobian or hessian or gradients_under)"
    " or portable and test_values and (middle and float32 or threaded-W-expanded and bfloat16)"
)


class Environment(NamedTuple):
    torch: str
    python: str

    @classmethod
    def of(cls, text: str) -> "Environment":
        if not re.fullmatch(r"[\w.+]+@\d+\.\d+", text):
            raise argparse.ArgumentTypeError(f"expected TORCH@PYTHON such as 2.11.0@3.12, got {text!r}")
        return cls(*text.split("@"))

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / f"{self.torch}@{self.python}"

    def run(self, *arguments: object, **variables: str) -> None:
        """Of this environment's Python, from its folder: one started in the checkout would import that."""
        command = [str(self.folder / "bin" / "python"), *map(str, arguments)]
        hidden = ("PYTHONPATH", "MI_KERNELS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        status = subprocess.run(command, cwd=self.folder, env=kept | variables).returncode
        if status != 0:
            where = f"torch {self.torch}, Python {self.python}"
            sys.exit(f"check_wheel: {where}: {arguments[1]} ended with {status}")

    def prepare(self) -> None:
        ready = self.folder / "ready"
        if ready.exists():
            return
        print(f"==> torch {self.torch} on Python {self.python}", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([interpreter(self.python), "-m", "venv", self.folder], check=True)
        self.run("-m", "pip", "install", "-q", f"torch=={self.torch}")
        ready.touch()

    def check(self, wheel: Path) -> None:
        print(f"==> {wheel.name} with torch {self.torch} on Python {self.python}", flush=True)
        # What the wheel needs, then the wheel, which pip would not install again under the same version.
        self.run("-m", "pip", "install", "-q", f"{wheel}[test]", f"torch=={self.torch}")
        self.run("-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", wheel)
        self.run("-m", "mi_kernels", "doctor")
        files = [path for name in TESTS for path in sorted((ROOT / "tests").glob(f"*/test_{name}.py"))]
        self.run("-m", "pytest", "-n", "2", *files, "-k", CHOICE, MI_KERNELS_TEST_WHEEL="1")


def interpreter(version: str) -> str:
    """The path of a Python that can make environments: one that is called so, or one of pyenv's."""
    ask = "import ensurepip, sys; print(sys.executable)"
    for name in (f"python{version}", "python3"):
        try:
            found = subprocess.run(
                [name, "-c", f"{ask}; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"],
                env=os.environ | {"PYENV_VERSION": version},
                capture_output=True,
                text=True,
            )
        except OSError:
            continue
        if found.returncode == 0:
            return found.stdout.strip()
    sys.exit(f"check_wheel: there is no Python {version} on PATH, nor in pyenv")


def the_wheel(where: Path = WHEELS) -> Path:
    """The wheel of that path, or the last one that was built into that folder: one that runs here."""
    built = where.glob("mi_kernels-*.whl") if where.is_dir() else [where] if where.is_file() else []
    last = max(built, key=lambda path: path.stat().st_mtime, default=None)
    if last is None:
        sys.exit(f"check_wheel: no wheel in {where}: `make wheel` builds it")
    machine = os.uname().machine
    if not last.stem.endswith((f"_{machine}", "-any")):
        sys.exit(f"check_wheel: {last.name} does not run on this machine, whose processor is {machine}")
    return last


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("environments", nargs="+", type=Environment.of, metavar="TORCH@PYTHON")
    parser.add_argument("--prepare", action="store_true", help="create the environments, and do no more")
    parser.add_argument(
        "--wheel",
        type=Path,
        default=WHEELS,
        help="it, or a folder (dist/), for the last one built there",
    )
    options = parser.parse_args(argv)
    wheel = None if options.prepare else the_wheel(options.wheel).resolve()
    for environment in options.environments:
        environment.prepare()
    if wheel is not None:
        for environment in options.environments:
            environment.check(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
