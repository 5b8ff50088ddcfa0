"""The tuner with made-up times; the kernels run in the interpreter of another test, not here."""

import json

import pytest
import torch

from mi_kernels import backends, cli, tune

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources, PTXASError

from mi_kernels.ops.triton import tiles
from mi_kernels.ops.triton.launch import recording

SIZES = (65536, 32, 256, 256)  # rows enough for one product in one part


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
    return tiles.Tile(
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
    with tiles.using(found):
        call()
        assert _tile(hopper[-1]) == tile
    call()
    assert _tile(hopper[-1]) == heuristic


def test_the_heuristic_stays_where_nothing_is_faster(hopper):
    times = iter(range(1, 100))
    assert tune.tune(_forward()[0], lambda: (), lambda call: next(times), 20, lambda text: None) == {}


def test_wrong_and_failing_tiles_are_not_taken(hopper, monkeypatch):
    errors = iter([1.0, *[2.1] * 100])  # of the heuristic, then of every tile
    monkeypatch.setattr(tune, "_error", lambda results, exact: next(errors))
    assert tune.tune(_forward()[0], lambda: (), lambda call: 1.0, 5, lambda text: None) == {}


@pytest.mark.parametrize(
    "error", [OutOfResources(300000, 232448, "shared memory"), PTXASError("refused"), RuntimeError()]
)
def test_a_tile_that_does_not_run_costs_no_other(error, hopper):
    """As Triton raises them: neither of its classes is a RuntimeError."""
    failing = iter([True, False, False])

    def measure(call):
        if next(failing):
            raise error
        return 1.0

    lines = []
    assert tune.tune(_forward()[0], lambda: (), measure, 3, lines.append) == {}
    assert type(error).__name__ in lines[0] and str(error)[:40] in lines[0] and "best of 2" in lines[-1]

    def never(call):
        raise error

    assert tune.tune(_forward()[0], lambda: (), never, 2, lines.append) == {}
    assert lines[-1].endswith("no tile runs")


def test_a_mistake_in_a_kernel_is_not_taken_for_a_tile_that_does_not_run(hopper):
    with pytest.raises(ZeroDivisionError):
        tune.tune(_forward()[0], lambda: (), lambda call: 1 / 0, 2, lambda text: None)


def test_what_is_written_is_read(tmp_path, monkeypatch):
    tile = tiles.Tile(64, 64, 32, 4, 2, "promoted")
    tune._write(tmp_path / "table.json", {"a key": tile})
    assert json.loads((tmp_path / "table.json").read_text())["a key"]["BM"] == 64
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "table.json")
    assert tiles.table.__wrapped__() == {"a key": tile}
