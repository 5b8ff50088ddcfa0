"""The biaffine form, scores of all pairs of two sequences, against published and hand-written forms.

    python benchmarks/suites/biaffine.py --threads 2 --rounds 15 --output benchmarks/results/NAME.json

How a case is measured stands in cases.py; the candidates run in one process, in turn. `arc` has the sizes of
the scores of heads in dependency parsers (one output; a one for the first sequence), `label` those of the
scores of relations (40 outputs, two ones). `supar` is its einsum of padded inputs, `stanza` its two products
of padded inputs. `first` and `second` make the layers of one sequence and apply them by a batched product,
each with the ones as biases of the products, and (`padded`) with padded inputs. Rivals may return a view in
another order; ours is contiguous. The table has the time of each rival in parts of ours, and memory that a
call needs beyond its results.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case
from benchmarks.harness.tables import text_table
from benchmarks.suites.heads import COLUMNS, rows_of

Ones = tuple[bool, bool]
WORDS = 3000  # of a batch, whose sentences are of one length


def _padded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def padded(x: Tensor, y: Tensor, weight: Tensor, ones: Ones, first: bool) -> Tensor:
        x, y = (
            torch.cat((t, t.new_ones(*t.shape[:-1], 1)), -1) if one else t
            for t, one in zip((x, y), ones, strict=True)
        )
        return function(x, y, weight, (False, False), first)

    return padded


def _generated(x: Tensor, weight: Tensor, one: bool) -> Tensor:
    return F.linear(x, weight[:, :-1], weight[:, -1]) if one else F.linear(x, weight)


def einsum(x: Tensor, y: Tensor, weight: Tensor, _: Ones, first: bool) -> Tensor:
    scores = torch.einsum("bxi,oij,byj->boxy", x, weight, y)
    return scores if first else scores.permute(0, 2, 3, 1)


def of_second(x: Tensor, y: Tensor, weight: Tensor, ones: Ones, first: bool) -> Tensor:
    """Layers [B, L2, O, I1] applied to the first sequence: [B, L1, L2 O]."""
    out, rows, columns = weight.shape
    layers = _generated(y, weight.reshape(out * rows, columns), ones[1]).view(len(y), -1, rows)
    if ones[0]:
        scores = torch.baddbmm(layers[..., -1].unsqueeze(1), x, layers[..., :-1].mT)
    else:
        scores = torch.bmm(x, layers.mT)
    scores = scores.view(*x.shape[:2], y.shape[1], out)
    return scores.permute(0, 3, 1, 2) if first else scores


def of_first(x: Tensor, y: Tensor, weight: Tensor, ones: Ones, first: bool) -> Tensor:
    """Layers [B, L1, O, I2] applied to the second sequence: [B, L1 O, L2]."""
    out, rows, columns = weight.shape
    layers = _generated(x, weight.mT.reshape(out * columns, rows), ones[0]).view(len(x), -1, columns)
    if ones[1]:
        scores = torch.baddbmm(layers[..., -1:], layers[..., :-1], y.mT)
    else:
        scores = torch.bmm(layers, y.mT)
    scores = scores.view(*x.shape[:2], out, y.shape[1])
    return scores.transpose(1, 2) if first else scores.transpose(2, 3)


def ours(x: Tensor, y: Tensor, weight: Tensor, ones: Ones, first: bool) -> Tensor:
    return mi.biaffine(x, y, weight, ones=ones, channels_first=first)


RIVALS = {
    "supar": _padded(einsum),
    "first": of_first,
    "second": of_second,
    "padded first": _padded(of_first),  # as stanza
    "padded second": _padded(of_second),
}


def case(
    family: str, features: int, out: int, length: int, ones: Ones, first: bool, batch: int | None = None
) -> Case:
    batch = batch or max(WORDS // (1 if out == 1 else 2) // length, 1)
    functions = {name: partial(f, ones=ones, first=first) for name, f in {OURS: ours, **RIVALS}.items()}
    sizes = (
        (batch, length, features),
        (batch, length, features),
        (out, features + ones[0], features + ones[1]),
    )
    name = f"{family}-{features}-{length}" + ("-channels-first" if first else "")
    return Case(family, name, sizes, functions, "supar", scaled=2)


def arcs() -> Iterator[Case]:
    for features in (400, 500):
        for length in (20, 70, 150):
            yield case("arc", features, 1, length, (True, False), True)


def labels(first: bool) -> Iterator[Case]:
    for features in (100, 400):
        for length in (20, 70, 150):
            yield case("label", features, 40, length, (True, True), first)


def few() -> Iterator[Case]:
    """One sentence, as in a service."""
    for name, features, out, ones in (("arc", 500, 1, (True, False)), ("label", 100, 40, (True, True))):
        for length in (20, 70):
            yield case(f"one-{name}", features, out, length, ones, False, batch=1)


FAMILIES = {
    "arc": arcs,
    "label": partial(labels, False),
    "label-channels-first": partial(labels, True),
    "few": few,
}


def main(argv: list[str] | None = None) -> int:
    parser = cases.parser("Scores of all pairs of two sequences.", FAMILIES)
    parser.set_defaults(dtype=["float32"])
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/biaffine.py", *(sys.argv[1:] if argv is None else argv)]
    result = cases.run(FAMILIES, options, command)
    print(text_table(COLUMNS, list(rows_of(result["cases"])), markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
