"""Shapes drawn from a seed (benchmarks/suites/drawn.py); no time here means anything."""

import math
import random
import statistics
from collections import Counter

import pytest

from benchmarks.harness import cases, environment, measure, results
from benchmarks.suites import drawn

pytestmark = pytest.mark.tools

COUNT = 12


def options(*arguments):
    """Those of the command, as main() parses them."""
    seen = []

    def jobs(options):
        seen.append(options)
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "jobs", jobs)
        assert drawn.main([*arguments]) == 0
    return seen[0]


def drawn_cases(*arguments):
    return [(job.family, sizes_of(job.drawn), job.name) for job in drawn.jobs(options(*arguments))]


def sizes_of(case):
    return case.shape.sizes() if isinstance(case, measure.Entry) else case.sizes


@pytest.fixture(scope="module", params=drawn.FAMILIES)
def family(request):
    return request.param


def of_family(family, seed, count=COUNT):
    one = "--pass forward --dtype float32".split()
    return drawn_cases("--family", family, "--seed", str(seed), "--count", str(count), *one)


def test_a_seed_draws_the_same_cases_and_another_others(family):
    first, again, other = (of_family(family, seed) for seed in (5, 5, 6))
    assert first == again
    assert len(first) == len(other) == COUNT
    assert sum(a == b for a, b in zip(first, other, strict=True)) <= 1
    assert len({name for _, _, name in first}) >= COUNT - 1


def test_more_cases_begin_with_the_same(family):
    """And what is drawn of one family does not depend on which others are asked for."""
    assert of_family(family, 5, 2 * COUNT)[:COUNT] == of_family(family, 5)
    one = ("--seed", "5", "--count", str(COUNT), "--pass", "forward", "--dtype", "float32")
    everything = [case for case in drawn_cases(*one) if case[0] == family]
    assert everything == of_family(family, 5)


def test_each_case_in_each_dtype_and_pass():
    everything = list(drawn.jobs(options("--count", "3", "--pass", *cases.PASSES, "double-backward")))
    found = Counter((job.family, job.dtype, job.work) for job in everything)
    assert set(found.values()) == {3}
    # Second derivatives are of the dense form alone.
    passes = {family: {work for name, _, work in found if name == family} for family in drawn.FAMILIES}
    assert passes.pop("dense") == {*cases.PASSES, "double-backward"}
    assert all(works == {*cases.PASSES} for works in passes.values())
    assert {dtype for _, dtype, _ in found} == {"float32", "bfloat16"}


def operations(family, sizes, name):
    """Of a forward pass, by the sizes of the arguments."""
    if family == "dense":
        (rows, width), (_, context), (out, *_) = sizes[:3]
        return 2 * rows * context * width * out
    if family == "layouts":
        (rows, width), (_, context), weight = sizes
        return 2 * rows * math.prod(weight)
    if family == "biaffine":
        (batch, length, features), _, (out, *_) = sizes
        return 2 * batch * length * out * features * (features + length)
    return None


@pytest.mark.parametrize("most", ["1e6", "1e8", "4e9"])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_sizes_keep_to_the_limits(family, seed, most):
    arguments = ["--family", family, "--seed", str(seed), "--most", most]
    one = ["--pass", "forward", "--dtype", "float32"]
    for _, sizes, name in drawn_cases(*arguments, *one):
        assert all(0 < math.prod(size) <= drawn.LARGEST for size in sizes), name
        done = operations(family, sizes, name)
        assert done is None or done <= float(most), name
        if family == "layouts":
            assert sizes[0][0] * sizes[0][1] * sizes[1][1] <= drawn.OUTER, name


@pytest.mark.parametrize("most", [1e6, 1e8, 4e9])
def test_groups_keep_to_the_limits(most):
    source = random.Random(3)
    for _ in range(200):
        groups, rows, context, width, out = drawn._groups(source, most)
        assert 2 * groups * width * out * (rows + context) <= most
        assert groups * max(width * out, 2 * rows * width, 2 * rows * out) <= drawn.LARGEST // 2


def test_a_large_w_is_drawn_again():
    source, largest = random.Random(3), 0
    for _ in range(1000):
        rows, *sizes = drawn.dense_sizes(source, 4e9)
        assert 2 * rows * math.prod(sizes) <= 4e9
        largest = max(largest, math.prod(sizes))
    assert drawn.LARGEST / 2 < largest <= drawn.LARGEST


@pytest.mark.parametrize(("least", "most"), [(1, 8192), (4, 512), (9, 16384), (16, 16)])
def test_sizes_are_spread_evenly_on_a_logarithmic_scale(least, most):
    source = random.Random(0)
    found = [drawn.size(source, least, most) for _ in range(4000)]
    assert least <= min(found) and max(found) <= most
    if most == least:
        return
    # Half below the geometric middle, two of five usual: up to 5 deviations, and what rounding moves.
    share = sum(value <= math.sqrt(least * most) for value in found) / len(found)
    assert abs(share - 0.5) < 0.1
    usual = {2**n for n in range(15)} | {3 * 2**n for n in range(14)}
    assert sum(value in usual for value in found) / len(found) > 0.37
    assert len(set(found)) > 50


def test_few_outputs_in_a_third_of_the_cases():
    source = random.Random(0)
    found = [drawn.outputs(source, 64) for _ in range(4000)]
    assert abs(sum(value <= 8 for value in found) / len(found) - 1 / 3) < 0.04
    assert {*range(1, 9)} <= set(found) and max(found) <= 64


def test_distribution():
    """Of 41 ratios the third, the middle one and the last but two are 5 %, 50 % and 95 %."""
    values = [0.5 + index / 20 for index in range(41)]
    found = drawn.distribution(values[::-1])
    assert found == ["0.60", "1.50", "2.40", f"{statistics.geometric_mean(values):.2f}", "0.50", "10"]
    assert drawn.distribution([2.0]) == ["2.00"] * 5 + ["0"]
    assert drawn.distribution([0.5, 2.0])[3:] == ["1.00", "0.50", "1"]
    assert drawn.distribution([1.0])[-1] == "0"  # a draw is no loss


def record(family, name, ratio, work="forward", dtype="float32", mm=None):
    return {
        "family": family, "name": name, "dtype": dtype, "pass": work, "rival": f"of {name}", "ratio": ratio,
        "mm": mm,
    }  # fmt: skip


RECORDS = [
    record("dense", "a", 0.9, mm=0.8),
    record("dense", "b", 2.0, mm=0.7),
    record("dense", "none", None, mm=1.5),
    record("dense", "c", 0.5, "forward+backward"),
    record("gates", "d", 0.7, dtype="bfloat16"),
    record("gates", "e", 1.0, dtype="bfloat16"),
]


def test_tables_of_made_up_records():
    """A row for each family, dtype and pass, and one for torch.mm where there is any."""
    assert all(len(row) == len(drawn.COLUMNS) for row in drawn.rows_of(RECORDS))
    assert [row[:4] for row in drawn.rows_of(RECORDS)] == [
        ["dense", "float32", "forward", "2"],
        ["dense, torch.mm", "float32", "forward", "3"],
        ["dense", "float32", "forward+backward", "1"],
        ["gates", "bfloat16", "forward", "2"],
    ]
    assert [row[-2:] for row in drawn.rows_of(RECORDS)] == [
        ["0.90", "1"], ["0.70", "2"], ["0.50", "1"], ["0.70", "1"],
    ]  # fmt: skip


def test_losers_come_worst_first():
    found = list(drawn.losers(RECORDS))
    assert [row[0] for row in found] == ["c", "d", "a"]
    assert found[1] == ["d", "gates", "bfloat16", "forward", "of d", "0.70"]
    assert all(len(row) == len(drawn.LOSERS) for row in found)


def test_tables_of_saved_results(tmp_path, capsys, monkeypatch):
    """Of several files together; nothing is measured."""
    monkeypatch.setattr(drawn, "jobs", lambda _: pytest.fail("measures"))
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    for path, records in zip(paths, (RECORDS[:3], RECORDS[3:]), strict=True):
        results.write(path, environment.facts([]) | {"cases": records})
    assert drawn.main(["--show", *map(str, paths)]) == 0
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == drawn.COLUMNS and lines[2:6] == list(drawn.rows_of(RECORDS))
    assert lines[6] == drawn.LOSERS and lines[8:] == list(drawn.losers(RECORDS))


def test_too_few_operations_for_any_case(capsys):
    with pytest.raises(SystemExit, match="2"):
        drawn.main(["--most", "9999"])
    assert "--most: expected at least 1e4, got 9999" in capsys.readouterr().err


def test_the_smallest_run(family, tmp_path, capsys):
    output = tmp_path / "found.json"
    passes = ["forward", "double-backward"] if family == "dense" else ["forward"]
    short = "--count 1 --rounds 1 --shortest 0.0001 --most 1e6 --dtype float32 --threads 1".split()
    assert drawn.main(["--family", family, *short, "--pass", *passes, "--output", str(output)]) == 0
    found = results.read(output)
    assert [one["pass"] for one in found["cases"]] == passes
    assert found["command"].startswith("python benchmarks/suites/drawn.py --family")
    for one in found["cases"]:
        assert one["family"] == family and one["name"] and one["rival"]
        assert one["ratio"] > 0 and (one["mm"] is not None) == (family == "dense")
    text = capsys.readouterr().out
    assert f"| {family} " in text and "95 %" in text


def test_one_case_by_its_name(capsys):
    names = [name for *_, name in of_family("dense", 0, 3)]
    short = "--count 3 --rounds 1 --shortest 0.0001 --pass forward --dtype float32".split()
    small = [name for *_, name in drawn_cases(*"--family dense --most 1e6".split(), *short)]
    assert len(small) == 3 and small != names
    assert drawn.main(["--family", "dense", "--most", "1e6", *short, "--shape", small[1]]) == 0
    text = capsys.readouterr().out
    assert small[1] in text and small[0] not in text
