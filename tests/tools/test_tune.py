"""The tuner with made-up times; the kernels run in the interpreter of another test, not here."""

import json
import re
from dataclasses import replace

import pytest
import torch

from mi_kernels import backends, cli, doctor, records, tune

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources, PTXASError

from mi_kernels.ops import user_files
from mi_kernels.ops.triton import tile_limits, tiles
from mi_kernels.ops.triton.launch import recording

pytestmark = pytest.mark.tools

SIZES = (65536, 32, 256, 256)  # rows enough for one product in one part


@pytest.fixture(autouse=True)
def place_of_tables(monkeypatch, tmp_path):
    """The user's cache directory, with no table in it."""
    monkeypatch.setenv("MI_KERNELS_CACHE", str(tmp_path / "cache"))
    tiles.table.cache_clear()
    yield tmp_path / "cache"
    tiles.table.cache_clear()
    records.fingerprint.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    output = tmp_path / "table.json"
    assert cli.main(["tune", "--sizes", "64,8,32,32", "--output", str(output)]) == 1
    assert "tune: there is no GPU that Triton reaches" in capsys.readouterr().err and not output.exists()


def test_the_interpreter_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    assert cli.main(["tune", "--sizes", "64,8,32,32"]) == 1
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["1,2,3", "1,2,3,x", "1,2,3,0"])
def test_wrong_sizes(sizes, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--sizes", sizes])
    assert f"expected four positive numbers B,Z,X,O, got '{sizes}'" in capsys.readouterr().err


@pytest.fixture
def hopper(monkeypatch):
    """Calls are recorded as on compute capability 9.0; results are meta tensors, all of them right."""
    monkeypatch.setattr(tune, "_error", lambda results, exact: 0.0)
    with recording((9, 0)) as launches:
        yield launches


def _forward():
    call, truth = tune.calls(SIZES, torch.bfloat16, "meta")["forward"]
    return call, truth


def _tile(launch):
    a = launch.arguments
    return tile_limits.TileConfig(
        a["BM"], a["BN"], a["BK"], launch.options["num_warps"], launch.options["num_stages"], a["STYLE"]
    )


def test_the_fastest_tile_of_each_product_is_taken(hopper):
    call, _ = _forward()

    def measure(call):  # as if four warps and small tiles were best
        call()
        tile = _tile(hopper[-1])
        return tile.BM * tile.BN * tile.warps * 1e-6

    lines = []
    found = tune.tune(call, lambda: (), measure, 20, lines.append)
    ((key, tile),) = found.items()
    assert key.startswith("sm90 forward bfloat16") and "best" in lines[0]
    call()
    heuristic = _tile(hopper[-1])
    assert tile.BM * tile.BN * tile.warps < heuristic.BM * heuristic.BN * heuristic.warps
    with tiles.overriding(found):
        call()
        assert _tile(hopper[-1]) == tile
    call()
    assert _tile(hopper[-1]) == heuristic


def test_the_heuristic_stays_where_nothing_is_faster(hopper):
    times = iter(range(1, 100))
    found = tune.tune(_forward()[0], lambda: (), lambda call: next(times), 20, lambda text: None)
    ((key, tile),) = found.items()
    assert key.startswith("sm90 forward") and tile is None
    slow, other = (
        tile_limits.TileConfig(16, 16, 16, 4, 1, "promoted"),
        tile_limits.TileConfig(64, 64, 32, 4, 2, "promoted"),
    )
    assert tune.merged({key: slow, "other": other}, found) == {"other": other}
    assert tune.merged({key: slow}, {key: other}) == {key: other}


def test_wrong_and_failing_tiles_are_not_taken(hopper, monkeypatch):
    errors = iter([1.0, *[2.1] * 100])  # of the heuristic, then of every tile
    monkeypatch.setattr(tune, "_error", lambda results, exact: next(errors))
    found = tune.tune(_forward()[0], lambda: (), lambda call: 1.0, 5, lambda text: None)
    assert set(found.values()) <= {None}


@pytest.mark.parametrize(
    "error", [OutOfResources(300000, 232448, "shared memory"), PTXASError("refused"), RuntimeError()]
)
def test_a_tile_that_does_not_run_costs_no_other(error, hopper):
    """As Triton raises them: neither of its classes is a RuntimeError. Here it is the heuristic's."""
    failing = iter([True, False, False])

    def measure(call):
        if next(failing):
            raise error
        return 1.0

    lines = []
    (tile,) = tune.tune(_forward()[0], lambda: (), measure, 3, lines.append).values()
    assert isinstance(tile, tile_limits.TileConfig)
    assert type(error).__name__ in lines[0] and str(error)[:40] in lines[0] and "best of 2" in lines[-1]

    def never(call):
        raise error

    assert tune.tune(_forward()[0], lambda: (), never, 2, lines.append) == {}
    assert lines[-1].endswith("no tile runs")


def test_a_mistake_in_a_kernel_is_not_taken_for_a_tile_that_does_not_run(hopper):
    with pytest.raises(ZeroDivisionError):
        tune.tune(_forward()[0], lambda: (), lambda call: 1 / 0, 2, lambda text: None)


TILE = tile_limits.TileConfig(64, 64, 32, 4, 2, "promoted")
ENTRY = {"BM": 64, "BN": 64, "BK": 32, "warps": 4, "stages": 2, "style": "promoted"}


def test_what_is_written_is_read(tmp_path, monkeypatch):
    (tmp_path / "table.json").write_text(tiles.to_json({"a key": TILE}))
    assert json.loads((tmp_path / "table.json").read_text()) == {"a key": ENTRY}
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "table.json")
    assert tiles.table.__wrapped__() == {"a key": TILE}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no table of tiles: Expecting value"),
        ("{", "is no table of tiles"),
        ("[]", "is no table of tiles: expected an object, got []"),
        ('{"a key": 3}', "entry 'a key': expected BM, BN, BK, warps, stages, style, got 3"),
        (json.dumps({"a key": {"BM": 64}}), "entry 'a key': expected BM, BN"),
        (json.dumps({"a key": ENTRY | {"extra": 1}}), "entry 'a key': expected BM, BN"),
        (json.dumps({"a key": ENTRY | {"BM": "64"}}), "entry 'a key': expected BM, BN"),
        (json.dumps({"a key": ENTRY | {"warps": True}}), "entry 'a key': expected BM, BN"),
        (json.dumps({"a key": ENTRY | {"BM": 48}}), "entry 'a key': there is no TileConfig(BM=48"),
        (json.dumps({"a key": ENTRY | {"style": "new"}}), "entry 'a key': there is no TileConfig"),
    ],
)
def test_a_file_that_is_no_table_is_named(text, words, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "table.json")
    tiles.TABLE.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tiles.TABLE)) + ".*" + re.escape(words)):
        tiles.table.__wrapped__()


PROBLEM = tile_limits.GemmProblem(
    "forward", torch.bfloat16, "ieee", (9, 0), False, True, 1, 4096, 256, 32, 256
)


@pytest.mark.parametrize(
    "change",
    [
        {"BM": 48},
        {"BM": 0},
        {"BN": 8},
        {"BK": 4},
        {"warps": 3},
        {"warps": 2},
        {"stages": 0},
        {"style": "new"},
    ],
    ids=str,
)
def test_numbers_that_no_tile_has(change):
    assert tile_limits.valid(TILE, PROBLEM) and not tile_limits.valid(replace(TILE, **change), PROBLEM)


def test_a_tile_for_aligned_operands_is_none_for_others():
    large, unaligned = (
        tile_limits.TileConfig(128, 256, 64, 8, 3, "held"),
        replace(PROBLEM, aligned=False, columns=255),
    )
    assert tile_limits.valid(large, PROBLEM) and not tile_limits.valid(large, unaligned)
    assert tile_limits.valid(TILE, unaligned) and PROBLEM.key != unaligned.key
    before = tiles.choose(unaligned)
    assert before != TILE
    with tiles.overriding({PROBLEM.key: TILE}):
        assert tiles.choose(PROBLEM) == TILE and tiles.choose(unaligned) == before


@pytest.mark.parametrize(
    ("capability", "dtype", "fits"),
    [
        ((8, 0), torch.bfloat16, (64, 64)),
        ((12, 0), torch.float16, (64, 64)),
        ((9, 0), torch.bfloat16, (128, 128)),
        ((10, 0), torch.float32, (64, 128)),
    ],
)
def test_what_spills_is_not_valid(capability, dtype, fits):
    problem = replace(PROBLEM, primitive="input_grads", capability=capability, dtype=dtype, precision="tf32")
    BM, BN = fits
    tile = tile_limits.TileConfig(BM, BN, 16, 8, 1, "promoted")
    assert tile_limits.valid(tile, problem) and not tile_limits.valid(replace(tile, BN=2 * BN), problem)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The command with made-up findings, and the file that it writes."""
    findings = {}
    monkeypatch.setattr(tune, "why_not", lambda: None)
    monkeypatch.setattr(tune, "_first_call", lambda call: 0.0)
    monkeypatch.setattr(tune, "calls", lambda sizes, dtype, device: {"forward": (None, None)})
    monkeypatch.setattr(tune, "tune", lambda *arguments: findings)
    path = tmp_path / "table.json"

    def run(found, output=path):
        findings.clear()
        findings.update(found)
        place = () if output is None else ("--output", str(output))
        return tune.main(["--sizes", "64,8,32,32", *place])

    return run, path


def test_a_second_run_adds_to_the_first(measured):
    run, path = measured
    for found, keys in (({"a": TILE}, {"a"}), ({"b": TILE}, {"a", "b"}), ({"a": None}, {"b"})):
        assert run(found) == 0 and json.loads(path.read_text()).keys() == keys


def test_a_new_file_begins_with_the_table(measured):
    run, path = measured
    with tiles.overriding({"c": TILE}):
        assert run({"a": TILE}) == 0
    assert json.loads(path.read_text()).keys() == {"a", "c"} | tiles.table().keys()


def test_an_output_that_cannot_be_written_or_read_costs_no_time(measured, monkeypatch, capsys, tmp_path):
    run, path = measured
    monkeypatch.setattr(tune, "calls", lambda *arguments: pytest.fail("tuned"))
    assert run({}, tmp_path / "nowhere" / "table.json") == 1
    assert "tune: " in (text := capsys.readouterr().err) and "nowhere" in text
    assert run({}, tmp_path) == 1
    path.write_text("[]")
    assert run({}) == 1 and path.read_text() == "[]"
    assert "is no table of tiles" in capsys.readouterr().err


def test_what_is_found_lies_with_the_user(measured, place_of_tables, monkeypatch):
    """In the cache directory and for the user alone; the package's table stays, and comes after it."""
    run, path = measured
    monkeypatch.setattr(tiles, "TABLE", path)
    other = replace(TILE, stages=1)
    path.write_text(tiles.to_json({"a": TILE, "b": TILE}))
    for found in ({"a": other}, {"c": other}, {"c": None, "d": other}):
        assert run(found, None) == 0
    own = place_of_tables / "tiles.json"
    assert tiles.read(own) == {"a": other, "d": other} and tiles.read(path) == {"a": TILE, "b": TILE}
    assert oct(own.stat().st_mode & 0o777) == "0o600"
    assert tiles.table.__wrapped__() == {"a": other, "b": TILE, "d": other}
    assert f"2 choices in {own}" in doctor.as_text() and doctor.report()["tiles"]["choices"] == 2


@pytest.mark.parametrize("fault", ["others may write", "is no table of tiles", "is a directory"])
def test_a_table_that_is_not_the_users_is_not_used(fault, measured, place_of_tables, capsys):
    run, _ = measured
    assert run({"a": TILE}, None) == 0
    own = place_of_tables / "tiles.json"
    if fault == "others may write":
        own.chmod(0o622)
    elif fault == "is a directory":
        fault = "is no regular file"
        own.unlink()
        own.mkdir()
    else:
        own.write_text("{")
    with pytest.warns(RuntimeWarning, match=f"the table of `tune` is not used: .*{fault}"):
        assert "a" not in tiles.table.__wrapped__()
    assert "not used: " in doctor.as_text()
    assert run({"b": TILE}, None) == 1
    assert fault in capsys.readouterr().err


def test_a_table_of_the_users_is_a_part_of_what_was_verified(measured, place_of_tables):
    run, _ = measured
    records.fingerprint.cache_clear()
    before = records.fingerprint("triton")
    assert run({"a": TILE}, None) == 0
    records.fingerprint.cache_clear()
    assert records.fingerprint("triton") != before
    (place_of_tables / "tiles.json").chmod(0o666)
    records.fingerprint.cache_clear()
    assert records.fingerprint("triton") == before


def test_without_a_place_for_it(measured, monkeypatch, capsys):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(user_files, "folder", nowhere)
    assert tiles.user_table() == ({}, None) and measured[0]({}, None) == 1
    assert "tune: Could not determine home directory." in capsys.readouterr().err
    assert "no place: Could" in doctor.report()["tiles"]["path"]
    records.fingerprint.cache_clear()
    assert records.fingerprint("triton")


@pytest.mark.parametrize("most", ["-1", "0", "x"])
def test_how_many_tiles(most, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--sizes", "1,1,1,1", "--most", most])
    assert f"expected at least 1, got {most}" in capsys.readouterr().err
