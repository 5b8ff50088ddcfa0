"""Small calls: every public function against PyTorch's own operations, where fixed costs decide.

    python benchmarks/suites/small.py --rounds 100
    python benchmarks/suites/small.py --rounds 100 --plan kernel    # the kernels, whatever the size

Each row is one interleaved run, on one thread by default: the least time of the fastest PyTorch form by ours.
Aim: 1 / 1.3 = 0.77.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import tables, timing

SIZES = ((1, 16), (8, 32), (64, 64))  # rows, features
AIM = 1 / 1.3
OURS = "mi_kernels"
Forms = dict[str, Callable[..., object]]


class Case(NamedTuple):
    name: str
    sizes: tuple[tuple[int, ...], ...]  # of the tensors
    forms: Forms


def _weights(n: int) -> tuple[tuple[int, ...], ...]:
    return (n, n, n), (n, n), (n, n), (n,)


def modulations(rows: int, n: int) -> Iterator[Case]:
    forms: Forms = {OURS: mi.modulate, "eager": lambda x, s, t: x * s + t}
    forms["addcmul"] = lambda x, s, t: torch.addcmul(t, x, s)
    yield Case("modulate", ((rows, n),) * 3, forms)
    forms = {OURS: lambda x, s, t: mi.modulate(x, s, t, scale_offset=1.0)}
    forms |= {"eager": lambda x, s, t: x * (1 + s) + t, "addcmul": lambda x, s, t: torch.addcmul(t, x, 1 + s)}
    yield Case("modulate, 1 + s", ((rows, n),) * 3, forms)


def gates(rows: int, n: int) -> Iterator[Case]:
    def eager(x, z, a, b, c, d):
        return torch.sigmoid(F.linear(z, a, b)) * x + F.linear(z, c, d)

    def addcmul(x, z, a, b, c, d):
        return torch.addcmul(F.linear(z, c, d), torch.sigmoid(F.linear(z, a, b)), x)

    forms: Forms = {
        OURS: lambda *t: mi.diagonal(*t, activation="sigmoid"),
        "eager": eager,
        "addcmul": addcmul,
    }
    yield Case("diagonal", ((rows, n), (rows, n), (n, n), (n,), (n, n), (n,)), forms)
    forms = {OURS: mi.gated_interaction, "einsum": lambda x, *t: torch.sigmoid(_einsum(x, *t)) * x}
    forms["x first"] = lambda x, *t: torch.sigmoid(_x_first(x, *t)) * x
    yield Case("gated_interaction", ((rows, n), (rows, n), *_weights(n)), forms)


def _einsum(x, z, w, u, v, c):
    return torch.einsum("bi,oij,bj->bo", z, w, x) + F.linear(z, u) + F.linear(x, v, c)


def _x_first(x, z, w, u, v, c):
    t = F.linear(x, w.reshape(-1, w.shape[2])).view(len(x), w.shape[0], w.shape[1])
    return (t @ z.unsqueeze(-1)).squeeze(-1) + F.linear(z, u) + F.linear(x, v, c)


def interactions(rows: int, n: int) -> Iterator[Case]:
    forms: Forms = {OURS: mi.interaction, "einsum": _einsum, "x first": _x_first}
    yield Case("interaction", ((rows, n), (rows, n), *_weights(n)), forms)
    forms = {OURS: mi.bilinear, "F.bilinear": F.bilinear}
    forms["einsum"] = lambda z, x, w, c: torch.einsum("bi,oij,bj->bo", z, w, x) + c
    yield Case("bilinear", ((rows, n), (rows, n), (n, n, n), (n,)), forms)


def generated(rows: int, n: int) -> Iterator[Case]:
    def einsum(z, w, u, v, c):
        return torch.einsum("bi,oij->boj", z, w) + v, F.linear(z, u, c)

    def matmul(z, w, u, v, c):
        return (z @ w + v.unsqueeze(1)).transpose(0, 1), F.linear(z, u, c)

    forms: Forms = {OURS: mi.generate, "einsum": einsum, "matmul": matmul}
    yield Case("generate", ((rows, n), *_weights(n)), forms)
    forms = {OURS: mi.apply_generated, "F.linear": F.linear}
    yield Case("apply_generated, one W'", ((rows, n), (n, n), (n,)), forms)
    if rows == 1:
        yield Case("apply_generated, x [X]", ((n,), (n, n), (n,)), forms)
    forms = {OURS: mi.apply_generated, "einsum": lambda x, w, c: torch.einsum("boj,bj->bo", w, x) + c}
    forms["baddbmm"] = lambda x, w, c: torch.baddbmm(c.unsqueeze(-1), w, x.unsqueeze(-1)).squeeze(-1)
    yield Case("apply_generated", ((rows, n), (rows, n, n), (rows, n)), forms)


FAMILIES = {
    "modulate": modulations,
    "gates": gates,
    "interaction": interactions,
    "generated": generated,
}


def _as_tuple(y: object) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)  # type: ignore[return-value]


def _start(function: Callable[..., object], tensors: list[Tensor], backward: bool) -> timing.Start:
    def forward() -> object:
        with torch.no_grad():
            return function(*tensors)

    if not backward:
        return lambda: partial(function, *tensors)
    grads = [torch.ones_like(y) for y in _as_tuple(forward())]

    def both() -> object:
        return torch.autograd.grad(_as_tuple(function(*tensors)), tensors, grads)

    return lambda: both


def measure(case: Case, dtype: torch.dtype, backward: bool, rounds: int) -> tuple[str, float, float, float]:
    """The name of the fastest PyTorch form, its time over ours, and both times."""
    torch.manual_seed(0)
    tensors = [torch.randn(size).div_(4).to(dtype).requires_grad_(backward) for size in case.sizes]
    starts = {name: _start(function, tensors, backward) for name, function in case.forms.items()}
    samples: dict[str, list[float]] = {name: [] for name in starts}
    with nullcontext() if backward else torch.no_grad():
        for name, _, one in timing.interleave(starts, rounds, 3e-4, 10.0):
            samples[name].append(one.seconds)
    times = {name: min(found) for name, found in samples.items()}
    ours = times.pop(OURS)
    rival = min(times, key=times.__getitem__)
    return rival, times[rival] / ours, times[rival], ours


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, help="samples of each candidate (100)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (1)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--plan", choices=("auto", "kernel"), default="auto", help="kernel: never PyTorch's")
    sizes = " ".join(f"{rows},{features}" for rows, features in SIZES)
    parser.add_argument("--sizes", nargs="+", default=sizes.split(), help=f"rows,features ({sizes})")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for family in options.family:
        for size in options.sizes:
            for case in FAMILIES[family](*map(int, size.split(","))):
                for backward in (False, True):
                    with mi.backend("cpu") if options.plan == "kernel" else nullcontext():
                        found = measure(case, getattr(torch, options.dtype), backward, options.rounds)
                    rival, ratio, theirs, ours = found
                    work = "forward+backward" if backward else "forward"
                    times = f"{1e6 * theirs:.1f} / {1e6 * ours:.1f}"
                    short = "" if ratio >= AIM else "SHORT"
                    rows.append([case.name, size, work, rival, times, tables.format_ratio(ratio), short])
    columns = ["function", "rows,features", "pass", "fastest PyTorch form", "us", "PyTorch / ours", ""]
    print(tables.text_table(columns, rows, markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
