"""tools/tag_wheel.py: what a wheel for another processor asks for decides about its tag."""

import base64
import hashlib
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import symbols, tag_wheel

LIBRARY = Path(__file__).parents[2] / "mi_kernels" / "libmi_kernels_cpu.so"
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(not LIBRARY.exists(), reason="the checkout has no compiled library"),
    pytest.mark.skipif(symbols.NM is None, reason="binutils are not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="manylinux is for Linux"),
]
NAME = "mi_kernels-0.1.0-py3-none-linux_aarch64.whl"
INFO = "mi_kernels-0.1.0.dist-info"


def wheel(folder: Path) -> Path:
    path = folder / NAME
    tags = "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: false\nTag: py3-none-linux_aarch64\n"
    files = {
        "mi_kernels/libmi_kernels_cpu.so": LIBRARY.read_bytes(),
        f"{INFO}/WHEEL": tags.encode(),
        f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: mi_kernels\nVersion: 0.1.0\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            record += f"{name},sha256={digest},{len(data)}\n"
        archive.writestr(f"{INFO}/RECORD", record + f"{INFO}/RECORD,,\n")
    return path


@pytest.mark.skipif(find_spec("wheel") is None, reason="wheel is not installed")
def test_a_wheel_that_asks_for_no_more_is_tagged(tmp_path):
    made = wheel(tmp_path)
    assert tag_wheel.faults(made) == []
    tag_wheel.main([str(made), str(tmp_path / "dist")])
    (tagged,) = (tmp_path / "dist").iterdir()
    assert tagged.name == "mi_kernels-0.1.0-py3-none-manylinux_2_28_aarch64.whl"
    with zipfile.ZipFile(tagged) as archive:
        assert "Tag: py3-none-manylinux_2_28_aarch64" in archive.read(f"{INFO}/WHEEL").decode()
    assert made.exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("foreign", {"_ZN3c105ErrorE"}, "_ZN3c105ErrorE is of no stable ABI"),
        ("too_new", {"exp2@GLIBC_2.29"}, "exp2@GLIBC_2.29 is newer"),
        ("needed", {"libgomp.so.1", "libc.so.6"}, "libgomp.so.1 is a library of its own"),
    ],
)
def test_a_wheel_that_asks_for_more_is_refused(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setattr(symbols, name, lambda library: set(value))
    with pytest.raises(SystemExit, match=message):
        tag_wheel.main([str(wheel(tmp_path)), str(tmp_path / "dist")])
    assert not (tmp_path / "dist").exists()
