"""`auto` on GPUs: only what has passed the suite on such hardware. Devices and entries are made up here."""

import importlib.metadata
import importlib.util
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

import mi_kernels as mi
from mi_kernels import backends, doctor, records, verified
from mi_kernels.ops.dtypes import FLOATING
from mi_kernels.verified import Verified

HOPPER = Verified(
    backend="triton",
    capability=(9, 0),
    dtypes=(torch.bfloat16, torch.float32),
    device="made up",
    date="2026-01-02",
    versions={"torch": "2.11.0", "triton": "3.6.0"},
    results="benchmarks/results/made-up.json",
)


class Described(NamedTuple):
    """As much of a tensor as the choice looks at."""

    device: torch.device
    dtype: torch.dtype


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch, tmp_path):
    """And no record of the user's is there."""
    monkeypatch.setenv("MI_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(records, "device_of", lambda index: ("made up", "9.0"))
    monkeypatch.setattr(backends, "_warned", True)
    for remembered in (backends._auto_choice, records.here):
        remembered.cache_clear()
    yield
    for remembered in (backends._auto_choice, records.here):
        remembered.cache_clear()


def tensor(dtype=torch.bfloat16, device="cuda"):
    return Described(torch.device(device, 0), dtype)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of capability 9.0 with Triton 3.6, and both backends able to run."""
    monkeypatch.setattr(verified, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(verified, "_triton", lambda: "3.6.1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    return monkeypatch


def test_nothing_is_verified_yet_and_auto_is_portable():
    """To be replaced by the test of an entry's results, once there is one."""
    assert verified.VERIFIED == ()
    for dtype in FLOATING:
        assert backends.choose(tensor(dtype)) == "portable"


def test_an_entry_is_chosen_for_its_capability_and_dtypes(gpu):
    gpu.setattr(verified, "VERIFIED", (HOPPER,))
    assert backends.choose(tensor()) == backends.choose(tensor(torch.float32)) == "triton"
    assert backends.choose(tensor(torch.float16)) == backends.choose(tensor(torch.int64)) == "portable"
    gpu.setattr(verified, "_capability", lambda index: (10, 0))
    backends._auto_choice.cache_clear()
    assert backends.choose(tensor()) == "portable"


def test_another_release_of_triton_was_not_verified(gpu):
    gpu.setattr(verified, "VERIFIED", (HOPPER,))
    for version in ("3.7.0", "4.6.0", None):
        gpu.setattr(verified, "_triton", lambda version=version: version)
        backends._auto_choice.cache_clear()
        assert backends.choose(tensor()) == "portable"


def test_a_backend_that_cannot_run_is_not_chosen(gpu):
    gpu.setattr(verified, "VERIFIED", (HOPPER,))
    gpu.setattr(backends, "why_not", lambda name: "a reason")
    assert backends.choose(tensor()) == "portable"


def test_the_interpreter_was_not_verified(gpu):
    """It would take the tensors to the CPU, and has garbage for bfloat16."""
    gpu.setattr(verified, "VERIFIED", (HOPPER,))
    gpu.setenv("TRITON_INTERPRET", "1")
    assert backends.choose(tensor()) == "portable"


def test_the_first_entry_wins(gpu):
    gpu.setattr(verified, "VERIFIED", (Verified("cuda", *list(vars(HOPPER).values())[1:]), HOPPER))
    assert backends.choose(tensor()) == "cuda"


def test_other_devices_are_not_asked(gpu):
    gpu.setattr(verified, "VERIFIED", (HOPPER,))
    assert backends.choose(tensor(device="xpu")) == "portable"


@pytest.mark.parametrize(
    "change",
    [
        {"versions": {"torch": "2.11.0"}},
        {"backend": "typo"},
        {"backend": "cpu"},
        {"capability": (9,)},
        {"dtypes": ()},
        {"dtypes": ("bfloat16",)},
        {"families": ()},
        {"families": ("typo",)},
    ],
)
def test_a_wrong_entry_is_never_chosen(change, gpu):
    """mypy, which knows the fields, is the first to see it."""
    gpu.setattr(verified, "VERIFIED", (replace(HOPPER, **change),))
    assert backends.choose(tensor()) == "portable"


@pytest.mark.parametrize(
    ("passed", "chosen"),
    [("interaction modulate diagonal", "interaction modulate diagonal"), ("diagonal", "")],
)
def test_an_entry_may_be_of_some_families(passed, chosen, gpu):
    """A family is chosen where all whose kernels it takes have passed."""
    gpu.setattr(verified, "VERIFIED", (replace(HOPPER, families=tuple(passed.split())),))
    found = [family for family in records.FAMILIES if backends.choose(tensor(), family) == "triton"]
    assert set(found) == set(chosen.split())


def test_gpus_of_amd_were_not_verified(gpu):
    gpu.setattr(verified, "VERIFIED", (HOPPER,))
    gpu.setattr(torch.version, "hip", "6.0")
    assert backends.choose(tensor()) == "portable"


def test_a_name_overrules_the_table(gpu):
    with mi.backend("portable"):
        gpu.setattr(verified, "VERIFIED", (HOPPER,))
        assert backends.choose(tensor()) == "portable"


def test_doctor_shows_the_table(gpu):
    assert doctor.report()["verified"] == []
    assert "no compiled backend has passed the test suite on a GPU" in doctor.as_text()
    gpu.setattr(verified, "VERIFIED", (HOPPER,))
    (row,) = doctor.report()["verified"]
    assert row["capability"] == "9.0" and row["versions"] == "torch 2.11.0, triton 3.6.0"
    assert (
        "triton on 9.0" in doctor.as_text() and "bfloat16, float32 (made up, 2026-01-02)" in doctor.as_text()
    )


def test_torch_compile_takes_the_choice_as_a_constant(monkeypatch, fresh_compiler):
    """Nothing that looks for packages or asks the driver is traced, or done again for each call."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = []

    def why_not(name):
        asked.append(name)
        return None if importlib.util.find_spec(name) else "a reason"

    here = replace(HOPPER, versions={"torch": "2.11.0", "triton": importlib.metadata.version("triton")})
    monkeypatch.setattr(verified, "VERIFIED", (here,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(backends, "why_not", why_not)

    def chosen(x):
        return x + len(backends.choose(tensor(x.dtype)))

    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1, dtype=torch.bfloat16)).item() == len("triton")
    assert compiled(torch.zeros(1, dtype=torch.float16)).item() == len("portable")
    before = list(asked)
    assert "triton" in before and compiled(torch.zeros(2, dtype=torch.bfloat16))[0].item() == len("triton")
    assert backends.choose(tensor()) == "triton" and asked == before
