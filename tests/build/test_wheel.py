"""The wheel that `make test-wheel` installs: it is what is tested there, and it holds the whole package."""

import os
from pathlib import Path

import pytest

import mi_kernels as mi

CHECKOUT = Path(__file__).parents[2] / "mi_kernels"
INSTALLED = Path(mi.__file__).parent

pytestmark = pytest.mark.skipif(
    "MI_KERNELS_TEST_WHEEL" not in os.environ, reason="the package of the checkout is tested"
)


def files(package: Path) -> set[Path]:
    found = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    # A checkout that is installed without its native part has the mark of that; the wheel has that part.
    return {p for p in found if p.suffix not in (".so", ".pyc") and p.name != "native_skipped.txt"}


def test_the_installed_package_is_tested():
    assert CHECKOUT != INSTALLED and INSTALLED.parent.name == "site-packages"


def test_nothing_is_missing():
    assert files(INSTALLED) == files(CHECKOUT)
    libraries = sorted(path.name.split(".")[0] for path in INSTALLED.glob("*.so"))
    assert libraries == ["_C", "libmi_kernels_cpu"] and not (INSTALLED / "native_skipped.txt").exists()
