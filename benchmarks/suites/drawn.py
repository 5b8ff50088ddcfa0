"""Shapes drawn from a seed, as users may have them, instead of shapes that someone chose.

    python benchmarks/suites/drawn.py --threads 2 --seed 7 --output benchmarks/results/NAME.json

Each family draws --count cases: sizes are log-uniform, many of them powers of two or round numbers as in real
models, the others arbitrary, up to --most operations of a forward pass. The rivals are those of the family's
own suite (not compiled), interleaved with ours in one process. The first table has the distribution of the
best rival's time by ours: 5 %, 50 % and 95 % of the cases, geometric mean, worst case; for the dense form
also of `torch.mm` of equal work. The second lists every case that some rival wins, with that rival.
Other seeds draw other cases: a kernel that is tuned to those of one seed is found out by the next.
"""

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import mi_kernels as mi
from benchmarks.harness import cases, environment, measure, peers, results, summary, timing
from benchmarks.harness.cases import OURS, Case
from benchmarks.harness.tables import format_ratio, text_table
from benchmarks.suites import biaffine, gates, glu, hyper, layouts
from mi_kernels.testing.samples import Shape

LARGEST = 1 << 26  # elements of a tensor: 256 MiB in float32
OUTER = 1 << 24  # elements of the outer product, which a rival makes
# Of the dense form, seconds of all samples of a candidate, and of a call from which on a rival is left out.
LONGEST, SLOW = 0.5, 0.3


def size(random: random.Random, least: int, most: int) -> int:
    """Log-uniform; two of five are 2^n or 3 * 2^n, two of five round, the others arbitrary."""
    drawn = math.exp(random.uniform(math.log(least), math.log(most)))
    kind = random.random()
    if kind < 0.4:
        power = 2 ** math.floor(math.log2(drawn))
        drawn = min((power, 1.5 * power, 2 * power), key=lambda near: abs(near - drawn))
    elif kind < 0.8 and drawn >= 10:
        step = 10 ** math.floor(math.log10(drawn)) // (1 if drawn < 100 else 2)
        drawn = step * round(drawn / step)
    return min(max(round(drawn), least), most)


def outputs(random: random.Random, most: int = 1024) -> int:
    """One to eight in a third of the cases: scores, relations, slices of a tensor network."""
    return random.randint(1, 8) if random.random() < 1 / 3 else size(random, 9, most)


def drawn_until(draw: Callable[[], tuple], operations: Callable[[tuple], int], most: int) -> tuple:
    """Sizes that are drawn again until the forward pass has at most so many operations."""
    while operations(found := draw()) > most:
        pass
    return found


def dense_sizes(random: random.Random, most: int) -> tuple[int, ...]:
    """B, Z, X, O."""

    def draw() -> tuple[int, ...]:
        rows = random.randint(1, 8) if random.random() < 0.2 else size(random, 9, 8192)
        sizes = rows, size(random, 4, 512), size(random, 8, 1024), outputs(random)
        return sizes if math.prod(sizes[1:]) <= LARGEST else draw()

    return drawn_until(draw, lambda sizes: 2 * math.prod(sizes), most)


def dense(random: random.Random, most: int) -> measure.Entry:
    rows, context, width, out = dense_sizes(random, most)
    shape = Shape(f"{rows} rows, {context}x{width} -> {out}", (rows,), context, width, out)
    return measure.Entry(shape, "drawn")


def gate(random: random.Random, most: int) -> Case:
    kind = random.choice(("modulate", "diagonal", "glu"))
    if kind == "modulate":
        x, scale = _modulated(random)
        name = f"{'x'.join(map(str, x))} by {'x'.join(map(str, scale))}"
        return next(gates.modulations([(f"modulate {name}", x, scale)]))

    def draw() -> tuple[int, ...]:
        return size(random, 1, 16384), size(random, 8, 1024), size(random, 16, 2048)

    sizes = drawn_until(draw, lambda sizes: 4 * math.prod(sizes), most)
    if kind == "glu":
        return glu.glu("glu", *sizes)
    rows, context, width = sizes
    return next(gates.diagonals([(f"diagonal {rows} rows, {context} -> {width}", rows, context, width)]))


def _modulated(random: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of x and scale: tokens, rows or feature maps, of 16 thousand to 16 million elements."""
    kind = random.choice(("tokens", "rows", "maps"))
    while True:
        if kind == "rows":
            x = size(random, 64, 65536), size(random, 16, 2048)
            scale: tuple[int, ...] = random.choice(((x[1],), x))
        elif kind == "tokens":
            x = size(random, 1, 64), size(random, 16, 1024), size(random, 32, 1536)
            scale = x[0], 1, x[2]
        else:
            side = random.choice((7, 8, 14, 16, 28, 32, 56, 64))
            x = size(random, 1, 64), size(random, 32, 1024), side, side
            scale = x[0], x[1], 1, 1
        if 1 << 14 <= math.prod(x) <= 1 << 24:
            return x, scale


def _groups(random: random.Random, most: int) -> tuple[int, ...]:
    """G, T, Z, X, O."""

    def draw() -> tuple[int, ...]:
        groups, rows = size(random, 1, 1024), size(random, 2, 1024)
        sizes = groups, rows, size(random, 4, 256), size(random, 8, 512), size(random, 8, 512)
        largest = groups * max(sizes[3] * sizes[4], 2 * rows * max(sizes[3:]))
        return sizes if largest <= LARGEST // 2 else draw()

    return drawn_until(draw, lambda s: 2 * s[0] * s[3] * s[4] * (s[1] + s[2]), most)


def _grouped(family: Callable[[Sequence[tuple]], Iterator[Case]], *sizes: int) -> Case:
    groups, rows, context, width, out = sizes
    name = f"{groups} x {rows} rows, {context}x{width} -> {out}"
    return next(family([(name, *sizes)]))


def hypernetwork(random: random.Random, most: int) -> Case:
    family = random.choice((hyper.shared, hyper.generated, hyper.applied))
    return _grouped(family, *_groups(random, most))


def ragged(random: random.Random, most: int) -> Case:
    return _grouped(lambda shapes: hyper.ragged(shapes=shapes), *_groups(random, most))


def pairs(random: random.Random, most: int) -> Case:
    """Scores of all pairs of two sequences of a length."""

    def draw() -> tuple[int, ...]:
        batch, length = size(random, 1, 128), size(random, 8, 150)
        return batch, length, size(random, 32, 600), outputs(random, 64)

    batch, length, features, out = drawn_until(
        draw, lambda s: 2 * s[0] * s[1] * s[3] * s[2] * (s[2] + s[1]), most
    )
    ones = random.random() < 0.5, random.random() < 0.5
    made = biaffine.case("pairs", features, out, length, ones, random.random() < 0.5, batch)
    name = f"{batch} x {length} words, {features} features -> {out}"
    return Case("pairs", name, made.sizes, made.functions, made.oracle, scaled=made.scaled)


def layout(random: random.Random, most: int) -> Case:
    while True:
        rows, context, width, out = sizes = dense_sizes(random, most)
        if rows * context * width <= OUTER:
            break
    case = layouts.Case(sizes, random.choice(list(layouts.LAYOUTS)), torch.float32)
    functions = {
        OURS: lambda x, z, stored: mi.interaction(x, z, case.view(stored)),
        **case.rivals(),
    }
    arguments = (rows, width), (rows, context), tuple(case.stored().shape)
    name = f"{case.layout} {rows} rows, {context}x{width} -> {out}"
    return Case("layouts", name, arguments, functions, "einsum", scaled=2)


FAMILIES: dict[str, Callable[[random.Random, int], Any]] = {
    "dense": dense,
    "gates": gate,
    "hyper": hypernetwork,
    "ragged": ragged,
    "biaffine": pairs,
    "layouts": layout,
}


class Job(NamedTuple):
    """A case that is to be measured."""

    family: str
    drawn: Any
    dtype: str
    work: str

    @property
    def name(self) -> str:
        return self.drawn.shape.name if isinstance(self.drawn, measure.Entry) else self.drawn.name

    def measure(self, options: argparse.Namespace) -> dict[str, Any]:
        """Its name, the best rival and the ratio to it, and that of torch.mm where there is one."""
        dtype = getattr(torch, self.dtype)
        clock = timing.cpu if options.cpu_time else timing.wall
        record = {"family": self.family, "name": self.name, "dtype": self.dtype, "pass": self.work}
        if isinstance(self.drawn, measure.Entry):
            limits = measure.Limits(options.rounds, options.shortest, LONGEST, SLOW, 2 << 30, options.seed)
            rivals = [name for name, peer in peers.PEERS.items() if peer.missing() is None]
            place = measure.Environment(clock=clock)
            found = measure.measure(self.drawn, dtype, self.work, rivals, limits, place)
            best, ratios = summary.fastest(found, "rival"), summary.ratios(found)
            name = best["name"] if best else "none"
            return record | {"rival": name, "ratio": ratios["rival"], "mm": ratios["gemm"]}
        found = cases.measure(self.drawn, dtype, self.work, options, clock=clock)
        ratios = cases.ratios(found["candidates"])
        rivals = {name: ratio for name, ratio in ratios.items() if name not in cases.YARDSTICKS}
        rival = min(rivals, key=rivals.__getitem__)
        return record | {"rival": rival, "ratio": rivals[rival], "mm": None}


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    for family in options.family:
        source = random.Random(f"{family} {options.seed}")
        for _ in range(options.count):
            drawn = FAMILIES[family](source, options.most)
            for dtype in options.dtype:
                for work in options.passes:
                    if work in cases.PASSES or family == "dense":
                        yield Job(family, drawn, dtype, work)


COLUMNS = ["family", "dtype", "pass", "cases", "5 %", "50 %", "95 %", "mean", "worst", "lost"]
LOSERS = ["case", "family", "dtype", "pass", "best rival", "best rival / ours"]


def distribution(values: Sequence[float]) -> list[str]:
    """5 %, 50 %, 95 %, geometric mean and least of ratios, and how many are below 1."""
    ordered = sorted(values)
    shares = [ordered[round(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95)]
    found = [*shares, statistics.geometric_mean(ordered), ordered[0]]
    return [*map(format_ratio, found), str(sum(value < 1 for value in ordered))]


def rows_of(records: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for key in dict.fromkeys((r["family"], r["dtype"], r["pass"]) for r in records):
        group = [r for r in records if (r["family"], r["dtype"], r["pass"]) == key]
        for ratio, family in (("ratio", key[0]), ("mm", f"{key[0]}, torch.mm")):
            values = [r[ratio] for r in group if r[ratio] is not None]
            if values:
                yield [family, *key[1:], str(len(values)), *distribution(values)]


def losers(records: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    lost = (r for r in records if r["ratio"] is not None and r["ratio"] < 1)
    for r in sorted(lost, key=lambda record: record["ratio"]):
        yield [r["name"], r["family"], r["dtype"], r["pass"], r["rival"], format_ratio(r["ratio"])]


def main(argv: list[str] | None = None) -> int:
    parser = cases.parser("Shapes drawn from a seed.", FAMILIES)
    passes = next(action for action in parser._actions if action.dest == "passes")
    passes.choices = (*cases.PASSES, "double-backward")  # of the dense form alone
    parser.add_argument("--count", type=int, default=40, help="cases of each family (40)")
    parser.add_argument("--most", type=float, default=2e9, help="operations of a product, forward (2e9)")
    parser.add_argument("--show", type=Path, nargs="+", help="the tables of saved results; measures nothing")
    parser.set_defaults(rounds=5, shortest=0.005)
    options = parser.parse_args(argv)
    if options.most < 1e4:
        parser.error(f"--most: expected at least 1e4, got {options.most:g}")
    if options.show:
        show([record for path in options.show for record in results.read(path)["cases"]])
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/drawn.py", *(sys.argv[1:] if argv is None else argv)]
    result = environment.facts(command)
    wanted = [job for job in jobs(options) if not options.shape or job.name in options.shape]
    result["cases"] = records = []
    for job in wanted:
        records.append(job.measure(options))
        _say(records[-1], options, result)
    show(records)
    return 0


def show(records: Sequence[dict[str, Any]]) -> None:
    print(text_table(COLUMNS, list(rows_of(records)), markdown=True))
    if lost := list(losers(records)):
        print(text_table(LOSERS, lost, markdown=True))


def _say(record: dict[str, Any], options: argparse.Namespace, result: dict[str, Any]) -> None:
    names = " ".join(record[key] for key in ("family", "name", "dtype", "pass"))
    print(f"{names}: {record['rival']} {format_ratio(record['ratio'])}", flush=True)
    if options.output is not None:
        results.write(options.output, result)


if __name__ == "__main__":
    sys.exit(main())
