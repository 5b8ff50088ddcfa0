"""The wheel that `make check-wheel` installs: it is what is tested there, and it holds the whole package."""

import os
from pathlib import Path

import pytest

import mi_kernels as mi
from mi_kernels import libraries as native

CHECKOUT = Path(__file__).parents[2] / "mi_kernels"
INSTALLED = Path(mi.__file__).parent

pytestmark = pytest.mark.skipif(
    "MI_KERNELS_TEST_WHEEL" not in os.environ, reason="the package of the checkout is tested"
)


def files(package: Path) -> set[Path]:
    found = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    return {p for p in found if p.suffix not in (".so", ".pyc") and p.name != "build_facts.py"}


def test_the_installed_package_is_tested():
    assert CHECKOUT != INSTALLED and INSTALLED.parent.name == "site-packages"


def test_nothing_is_missing():
    assert files(INSTALLED) == files(CHECKOUT)
    libraries = {path.name for path in INSTALLED.rglob("*.so*")}
    assert "libmi_kernels_cpu.so" in libraries <= {"libmi_kernels_cpu.so", "libmi_kernels_cuda.so"}
    facts = native.build_info()
    assert facts is not None and facts["mi_kernels"] == mi.__version__ and facts["torch_target"] == "2.11"
