"""A wheel compiled for another processor gets the tag of manylinux, if it asks for no more than that has.

    python tools/tag_wheel.py build/wheel/dist/mi_kernels-0.1.0-py3-none-linux_aarch64.whl dist

auditwheel takes wheels of the processor that it runs on alone; it would check the same.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import symbols

SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0", "libdl.so.2"}
TORCH = {"libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so"}  # loaded before


def faults(wheel: Path) -> list[str]:
    found = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for name in (name for name in archive.namelist() if name.endswith(".so")):
            library = Path(archive.extract(name, folder))
            loader = {one for one in symbols.needed(library) if one.startswith("ld-linux")}
            others = symbols.needed(library) - SYSTEM - TORCH - loader
            found += [f"{name}: {one} is of no stable ABI" for one in sorted(symbols.foreign(library))]
            found += [f"{name}: {one} is newer" for one in sorted(symbols.too_new(library))]
            found += [f"{name}: {one} is a library of its own" for one in sorted(others)]
    return found


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path, help="a folder")
    options = parser.parse_args(argv)
    if found := faults(options.wheel):
        sys.exit("\n".join(["tag_wheel: no wheel of manylinux_2_28:", *found]))
    processor = options.wheel.stem.rpartition("linux_")[2]
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(options.wheel, folder)
        tags = [
            sys.executable,
            "-m",
            "wheel",
            "tags",
            "--remove",
            f"--platform-tag=manylinux_2_28_{processor}",
        ]
        subprocess.run([*tags, copy], check=True)
        (tagged,) = Path(folder).glob("*.whl")
        shutil.copy(tagged, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
