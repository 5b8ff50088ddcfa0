"""The user's record of `verify`: when it is believed, what `auto` makes of it. Devices are made up here."""

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import mi_kernels as mi
from mi_kernels import backends, doctor, records, verified
from mi_kernels.records import FAMILIES, Record

DEVICE = ("Made Up", "9.0")


def forget():
    backends._auto_choice.cache_clear()
    records.here.cache_clear()
    backends._warned = False


def record(**changes):
    facts = {
        "backend": "triton",
        "family": "interaction",
        "dtype": "bfloat16",
        "device": DEVICE[0],
        "capability": DEVICE[1],
        "versions": records.versions("triton"),
        "kernels": records.fingerprint("triton"),
        "date": "2026-01-02",
        "fault": None,
        "checks": 40,
        "error": 0.5,
    }
    return replace(Record(**facts), **changes)


def all_families(**changes):
    return [record(family=family, **changes) for family in FAMILIES]


class Described:
    """As much of a tensor as the choice looks at."""

    def __init__(self, dtype=torch.bfloat16):
        self.device, self.dtype = torch.device("cuda", 0), dtype


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache directory of the user's, a GPU of 9.0 on which both backends run, and no memory of the past."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MI_KERNELS_CACHE", str(folder))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(records, "device_of", lambda index: DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    forget()
    yield folder
    forget()


def chosen(family="interaction", dtype=torch.bfloat16):
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return backends.choose(Described(dtype), family)


def test_where_the_record_lies(monkeypatch, cache, tmp_path):
    assert records.path() == cache / "verified.json"
    monkeypatch.delenv("MI_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert records.path() == tmp_path / "xdg" / "mi_kernels" / "verified.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.path() == tmp_path / ".cache" / "mi_kernels" / "verified.json"


def test_without_a_record_everything_is_portable():
    assert {chosen(family) for family in FAMILIES} == {"portable"}


def test_what_passed_is_chosen_and_nothing_else():
    records.write(all_families())
    assert {chosen(family) for family in FAMILIES} == {"triton"}
    assert chosen(dtype=torch.float16) == chosen(dtype=torch.int64) == "portable"
    assert oct(records.path().stat().st_mode & 0o777) == "0o600"


def test_an_integer_or_the_interpreter_never_takes_it(monkeypatch):
    records.write(all_families())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen() == "portable"


@pytest.mark.parametrize(
    ("failed", "portable"),
    [
        ("modulate", {"diagonal", "gated_interaction", "modulate", "norm", "glu", "low_rank", "recurrent"}),
        ("interaction", {"interaction", "diagonal", "gated_interaction", "glu", "low_rank", "recurrent"}),
        ("diagonal", {"diagonal"}),
        ("gated_interaction", {"gated_interaction"}),
    ],
)
def test_a_failed_family_stays_portable_with_those_that_take_its_kernels(failed, portable):
    records.write(all_families())
    records.write([record(family=failed, fault="wrong")])
    assert {family for family in FAMILIES if chosen(family) == "portable"} == portable
    assert f"triton on Made Up, {failed} bfloat16" in doctor.as_text() and "failed: wrong" in doctor.as_text()


def test_the_other_backend_serves_where_one_failed():
    cuda = {"backend": "cuda", "versions": records.versions("cuda"), "kernels": records.fingerprint("cuda")}
    records.write([*all_families(), *all_families(**cuda)])
    assert chosen() == "cuda"
    records.write([record(**cuda, fault="wrong")])
    assert chosen() == "triton"


def test_a_backend_that_cannot_run_is_not_chosen(monkeypatch):
    records.write(all_families())
    monkeypatch.setattr(backends, "why_not", lambda name: "a reason")
    assert chosen() == "portable"


@pytest.mark.parametrize("name", [*records.versions("triton"), "kernels"])
def test_a_changed_version_asks_again(name):
    old = {"kernels": "0"} if name == "kernels" else {"versions": records.versions("triton") | {name: "0.0"}}
    records.write(all_families(**old))
    assert chosen() == "portable"
    word = "kernels have changed" if name == "kernels" else f"{name} was 0.0"
    assert word in doctor.as_text()
    forget()
    with pytest.warns(RuntimeWarning, match=word):
        backends.choose(Described())


@pytest.mark.parametrize("other", [{"device": "Another"}, {"capability": "8.0"}])
def test_another_device_was_not_verified(other):
    records.write(all_families(**other))
    assert chosen() == "portable"


def test_the_kernels_have_a_fingerprint(monkeypatch, tmp_path):
    before = records.fingerprint("triton")
    assert before == records.fingerprint("triton") != records.fingerprint("cuda")
    changed = tmp_path / "tiles.py"
    changed.write_text("another tile")
    files = [f if f.name != changed.name else changed for f in records._kernel_files("triton")]
    assert changed in files
    monkeypatch.setattr(records, "_kernel_files", lambda backend: files)
    records.fingerprint.cache_clear()
    assert records.fingerprint("triton") != before
    records.fingerprint.cache_clear()


def test_one_hint_a_process_and_none_where_it_would_not_help():
    with pytest.warns(RuntimeWarning, match=r"on Made Up.*no compiled backend.*python -m mi_kernels verify"):
        backends.choose(Described())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in FAMILIES:
            backends.choose(Described(), family)
            backends.choose(Described(torch.int32), family)


@pytest.mark.parametrize("case", ["failed", "verified", "integers", "cannot run"])
def test_no_hint(case, monkeypatch):
    records.write(all_families(fault="wrong" if case == "failed" else None))
    if case == "cannot run":
        records.path().unlink()
        monkeypatch.setattr(backends, "why_not", lambda name: "a reason")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose(Described(torch.int64 if case == "integers" else torch.bfloat16))


def test_the_hint_names_the_line_that_called():
    with pytest.warns(RuntimeWarning) as caught:
        backends.choose(Described())
    assert caught[0].filename == __file__


def _loosen(path):
    path.chmod(path.stat().st_mode | 0o002)


DISTRUST = {
    "the file is writable by all": (lambda: _loosen(records.path()), "others may write"),
    "the folder is writable by all": (lambda: _loosen(records.folder()), "others may write"),
    "the folder above is writable by all": (lambda: _loosen(records.folder().parent), "others may write"),
    "it is a link": (
        lambda: (
            records.path().rename(records.folder() / "other"),
            records.path().symlink_to(records.folder() / "other"),
        ),
        "no regular file",
    ),
}


@pytest.mark.parametrize("case", DISTRUST)
def test_a_file_that_another_user_could_write_counts_for_nothing(case):
    records.write(all_families())
    assert chosen() == "triton"
    spoil, reason = DISTRUST[case]
    spoil()
    assert records.read() == ([], records.distrust(records.path())) and reason in records.read()[1]
    assert chosen() == "portable" and f"not used: {records.read()[1]}" in doctor.as_text()
    with pytest.raises(PermissionError, match="would not be trusted"):
        records.write([record()])
    forget()
    with pytest.warns(RuntimeWarning, match=reason):
        backends.choose(Described())


@pytest.mark.parametrize("part", ["file", "folder"])
def test_what_belongs_to_another_user_counts_for_nothing(part, monkeypatch):
    records.write(all_families())
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(records.path() if part == "file" else records.folder(), 12345, -1)
    assert "belongs to another user" in records.read()[1] and chosen() == "portable"


def test_folders_are_made_for_the_user_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("MI_KERNELS_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(0o002)
    try:
        records.write(all_families())
    finally:
        os.umask(before)
    assert chosen() == "triton" and oct((tmp_path / "a").stat().st_mode & 0o777) == "0o700"


def test_environments_and_machines_that_share_a_home_keep_their_records(monkeypatch):
    records.write(all_families())
    other = {"versions": records.versions("triton") | {"torch": "9.9"}}
    records.write(all_families(**other))
    records.write(all_families(device="Another"))
    assert chosen() == "triton" and len(records.read()[0]) == 3 * len(FAMILIES)
    monkeypatch.setattr(records, "MAX_RECORDS", 5)
    records.write([record(date="2026-02-02")])
    assert len(records.read()[0]) == 5 and records.read()[0][-1].date == "2026-02-02"


def test_writers_at_the_same_time_lose_nothing():
    dtypes = [str(number) for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda dtype: records.write([record(dtype=dtype)]), dtypes))
    assert {one.dtype for one in records.read()[0]} == set(dtypes)


def test_without_a_home_there_is_no_record_and_no_crash(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MI_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(records.Path, "home", no_home)
    assert chosen() == "portable" and "home directory" in records.read()[1]
    assert "home directory" in doctor.as_text()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    with pytest.raises(RuntimeError):
        records.path()


def test_a_process_that_sees_no_gpu_asks_for_none(monkeypatch):
    """A model is traced without one, on tensors without data, with a record of another machine."""
    records.write(all_families())
    monkeypatch.setattr(backends, "why_not", lambda name: "there is no GPU")
    monkeypatch.setattr(records, "device_of", lambda index: 1 / 0)
    assert chosen() == "portable"


def test_a_failure_of_the_users_overrules_the_table_of_the_package(monkeypatch):
    entry = verified.Verified(
        "triton", (9, 0), (torch.bfloat16,), "made up", "2026-01-02",
        {"torch": "2.11", "triton": records.versions("triton")["triton"]}, "results.json",
    )  # fmt: skip
    monkeypatch.setattr(verified, "VERIFIED", (entry,))
    verified._capability.cache_clear()
    assert chosen() == "triton"
    records.write([record(fault="wrong")])
    assert chosen() == chosen("diagonal") == "portable" and chosen("modulate") == "triton"
    verified._capability.cache_clear()


def test_a_backend_that_passed_and_cannot_run_hides_no_other(monkeypatch):
    cuda = {"backend": "cuda", "versions": records.versions("cuda"), "kernels": records.fingerprint("cuda")}
    records.write([*all_families(), *all_families(**cuda)])
    monkeypatch.setattr(backends, "why_not", lambda name: "a reason" if name == "cuda" else None)
    assert chosen() == "triton"


def test_doctor_names_what_passed_and_is_not_used():
    records.write([record(family="diagonal"), record(family="modulate")])
    text = doctor.as_text()
    assert "diagonal bfloat16 (not used: interaction did not pass), modulate bfloat16" in text


def test_a_directory_for_all_with_the_sticky_bit_is_no_danger(cache):
    records.write(all_families())
    cache.parent.chmod(0o1777)
    assert chosen() == "triton"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ('{"schema": 0}', "another version"),
        ("[]", "another version"),
        ('{"schema": 1, "records": [{}]}', "damaged"),
        ('{"schema": 1, "records": 3}', "damaged"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_file_is_said_to_be_and_written_anew(text, reason):
    records.write([])
    records.path().write_text(text)
    assert records.read()[0] == [] and reason in records.read()[1] and chosen() == "portable"
    records.write(all_families())
    assert chosen() == "triton"


@pytest.mark.parametrize(
    "change", [{"backend": "cpu"}, {"family": "other"}, {"fault": 3}, {"versions": 3}, {"dtype": ["a"]}]
)
def test_a_record_is_checked_when_it_is_read(change):
    records.write([record()])
    found = json.loads(records.path().read_text())
    found["records"][0] |= change
    records.path().write_text(json.dumps(found))
    assert records.read()[0] == [] and "damaged" in records.read()[1]


def test_a_newer_record_takes_the_place_of_an_older_one():
    records.write(all_families())
    records.write([record(fault="wrong")])
    found, _ = records.read()
    assert len(found) == len(FAMILIES)
    assert [one.fault for one in found if one.family == "interaction"] == ["wrong"]


def test_nothing_is_left_where_it_cannot_be_written(monkeypatch):
    records.write([record()])
    before = records.path().read_text()

    def refuse(*names):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        records.write(all_families())
    assert records.path().read_text() == before and not [*records.folder().glob(".verified*")]


def test_a_gpu_of_amd_takes_triton_where_it_was_verified(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    records.versions.cache_clear()
    assert chosen() == "portable"
    records.write(all_families())
    assert chosen() == "triton" and records.versions("triton")["cuda"] in ("7.0", torch.version.cuda)
    records.versions.cache_clear()


@pytest.mark.filterwarnings("ignore:mi_kernels runs")
def test_explain_says_why_a_gpu_has_the_portable_path():
    assert "no compiled backend has been verified on it" in backends.remark(Described(), "interaction")
    assert "takes int64" in backends.remark(Described(torch.int64), "interaction")
    records.write(all_families())
    forget()
    assert backends.remark(Described(), "interaction") is None
    records.write([record(fault="wrong")])
    forget()
    assert "its checks failed here" in backends.remark(Described(), "diagonal")
    with mi.backend("portable"):
        assert backends.remark(Described(), "diagonal") is None
    x = torch.randn(2, 3)
    assert "portable on this GPU" not in mi.explain("interaction", x, x, torch.randn(4, 3, 3)).why
