"""Generated weights of low rank against what PyTorch users write: base + up (down x), by groups of tokens.

    python benchmarks/suites/low_rank_weights.py --threads 2 --output benchmarks/results/low-rank-weights.json

How a case is measured stands in cases.py. `equal`: groups of one length, `unequal`: of lengths from 1 to
twice the mean, their tokens in order. `repeated` has the factors once for each token, as text-to-LoRA and
doc-to-LoRA have.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case
from benchmarks.suites.hyper import lengths_of

TOKENS, FEATURES = 4096, 1024
RANKS, GROUPS = (4, 16, 64), (1, 8, 64)
Apply = Callable[..., Tensor]


def batched(x: Tensor, down: Tensor, up: Tensor, base: Tensor) -> Tensor:
    return torch.baddbmm(base, x @ down.mT, up.mT)


def looped(x: Tensor, down: Tensor, up: Tensor, base: Tensor) -> Tensor:
    groups = zip(x, down, up, base, strict=True)
    return torch.stack([torch.addmm(c, a @ d.mT, u.mT) for a, d, u, c in groups])


def repeated(x: Tensor, down: Tensor, up: Tensor, base: Tensor) -> Tensor:
    tokens = x.shape[-2]
    down, up = (t.repeat_interleave(tokens, 0) for t in (down, up))
    features = torch.bmm(down, x.flatten(0, -2).unsqueeze(-1))
    return base + torch.bmm(up, features).view_as(base)


def of_one(function: Apply) -> Apply:
    """Of x [1, T, X] with factors [1, ...], as the plain products of all tokens."""
    return lambda *given: function(*(t.squeeze(0) for t in given)).unsqueeze(0)


def equal() -> Iterator[Case]:
    for groups in GROUPS:
        for rank in RANKS:
            functions: dict[str, Apply] = {
                OURS: lambda x, down, up, base: mi.apply_low_rank(
                    x, down.unsqueeze(1), up.unsqueeze(1), base
                ),
                "baddbmm": batched,
                "mm loop": looped,
            }
            if groups == 1:
                functions = {OURS: of_one(mi.apply_low_rank)}
                functions["addmm"] = of_one(lambda x, d, u, c: torch.addmm(c, x @ d.mT, u.mT))
                functions["F.linear"] = of_one(lambda x, d, u, c: c + F.linear(F.linear(x, d), u))
            if rank < 64:  # 2 GiB of factors otherwise
                functions["repeated"] = repeated
            rows = TOKENS // groups
            sizes = ((groups, rows, FEATURES), (groups, rank, FEATURES), (groups, FEATURES, rank))
            oracle = "addmm" if groups == 1 else "baddbmm"
            yield Case(
                "equal", f"G{groups}-R{rank}", (*sizes, (groups, rows, FEATURES)), functions, oracle, 1
            )


def unequal() -> Iterator[Case]:
    for groups in GROUPS[1:]:
        lengths = lengths_of(groups, TOKENS // groups)
        tokens, ids = int(lengths.sum()), torch.repeat_interleave(lengths)
        inside = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        ends, sizes = lengths.cumsum(0).int(), lengths.tolist()

        def ours(x, down, up, base, ids=ids):
            return mi.apply_low_rank(x, down, up, base, segment_ids=ids)

        def split(x, down, up, base, sizes=sizes):
            rows = zip(x.split(sizes), down, up, base.split(sizes), strict=True)
            return torch.cat([torch.addmm(c, a @ d.mT, u.mT) for a, d, u, c in rows])

        def padded(x, down, up, base, inside=inside, sizes=sizes):
            full = nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True)
            return base + torch.bmm(torch.bmm(full, down.mT), up.mT)[inside]

        def grouped(x, down, up, base, ends=ends):
            return base + F.grouped_mm(F.grouped_mm(x, down.mT, offs=ends), up.mT, offs=ends)

        def by_token(x, down, up, base, ids=ids):
            return base + torch.bmm(up[ids], torch.bmm(down[ids], x.unsqueeze(-1))).squeeze(-1)

        for rank in RANKS:
            functions = {OURS: ours, "mm loop": split, "padded bmm": padded, "grouped_mm": grouped}
            if rank < 64:
                functions["repeated"] = by_token
            shapes = ((tokens, FEATURES), (groups, rank, FEATURES), (groups, FEATURES, rank))
            yield Case(
                "unequal", f"G{groups}-R{rank}", (*shapes, (tokens, FEATURES)), functions, "mm loop", 1
            )


FAMILIES = {"equal": equal, "unequal": unequal}


def main(argv: list[str] | None = None) -> int:
    options = cases.parser("Generated weights of low rank against PyTorch.", FAMILIES).parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/low_rank_weights.py", *(sys.argv[1:] if argv is None else argv)]
    cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
