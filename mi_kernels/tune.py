"""Times the tiles of the Triton kernels on this GPU and writes the table of choices: ``mi-kernels tune``.

Calls never autotune; tuning is opt-in. The table is in the user's cache directory (``user_files.table``) and
applies to this user's calls from then on; ``--output`` names another file, such as ops/triton/table.json of a
checkout, which is part of the package and can be committed. A tile is only chosen if its results are as
accurate as those of the heuristic's tile.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends
from .ops import user_files
from .testing.errors import relative_error

DTYPES = ("bfloat16", "float16", "float32", "float64")
Call = Callable[[], Sequence[Tensor]]
Measure = Callable[[Call], float]  # seconds; raises one of `does_not_run()` if the tile does not run


def calls(sizes: Sequence[int], dtype: torch.dtype, device: str) -> dict[str, tuple[Call, Call]]:
    """The primitives of a dense interaction at [B, Z, X, O] by name: (in Triton, in PyTorch)."""
    from .ops.interaction import portable
    from .ops.triton import interaction as kernels

    B, Z, X, O = sizes  # noqa: E741

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    x, z, grad, weight = draw(B, X), draw(B, Z), draw(B, O), draw(O, Z, X, scale=(Z * X) ** -0.5)
    linear = draw(O, Z), draw(O, X), draw(O)

    def of(module: Any) -> dict[str, Call]:
        return {
            "forward": lambda: (module.forward(x, z, weight, None, None, None),),
            "forward with U, V and c": lambda: (module.forward(x, z, weight, *linear),),
            "input gradients": lambda: module.input_grads(grad, x, z, weight, None, None, True, True),
            "weight gradient": lambda: module.weight_grads(grad, x, z, True, False, False, False)[:1],
        }

    ours, theirs = of(kernels), of(portable)
    return {name: (ours[name], theirs[name]) for name in ours}


@contextmanager
def _recorded_problems() -> Iterator[list[Any]]:
    """Records the problems for which tiles are chosen in the block, without duplicates, in order."""
    from .ops.triton import host, tiles

    seen: dict[Any, None] = {}

    def choose(problem: Any) -> Any:
        seen.setdefault(problem)
        return tiles.choose(problem)

    found: list[Any] = []
    original, host.choose = host.choose, choose  # type: ignore[assignment]
    try:
        yield found
    finally:
        host.choose = original
        found += seen


def does_not_run() -> tuple[type[Exception], ...]:
    """The exceptions of a tile that this GPU cannot run: too much shared memory, or a compilation error.

    Not Triton's base class, which moved between versions. PyTorch raises RuntimeError (out of memory).
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return (OutOfResources, PTXASError, CompilationError, RuntimeError)


def tune(
    call: Call, truth: Call, measure: Measure, most: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The fastest valid tile of each problem in a call, by table key; None if it is the heuristic's."""
    from .ops.triton import tiles

    exact = [t.double() for t in truth()]
    with _recorded_problems() as problems:
        results = call()
    limit = 2 * _error(results, exact)
    found = {}
    for problem in problems:
        timed: dict[Any, float] = {}
        for tile in islice(tiles.candidates(problem), most):
            with tiles.overriding({problem.key: tile}):
                try:
                    if _error(call(), exact) <= limit:
                        timed[tile] = measure(call)
                except does_not_run() as error:
                    line = next(iter(str(error).splitlines()), "")[:100]
                    say(f"  {tile}: {type(error).__name__}: {line}")
        if not timed:
            say(f"{problem.key}: no tile runs")
            continue
        best = min(timed, key=timed.__getitem__)
        first = timed.get(next(tiles.candidates(problem)), float("inf"))
        times = f"{1e6 * first:.1f} us, best of {len(timed)} {1e6 * timed[best]:.1f} us"
        say(f"{problem.key}: {times} {best}")
        found[problem.key] = best if timed[best] < first else None
    return found


def _error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(relative_error(r, t) for r, t in zip(results, exact, strict=True))


def _measure(call: Call) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=50, return_mode="median") / 1e3


def _first_call(call: Call) -> float:
    """Seconds of a first call, including compilation."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected four positive numbers B,Z,X,O, got {text!r}")
    return sizes


def positive(text: str) -> int:
    """An argument that is a positive number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def why_not() -> str | None:
    """Why nothing can be timed here, or None."""
    if backends.interpreting():
        return "TRITON_INTERPRET=1 is set: the interpreter's times say nothing about a GPU"
    return backends.why_not("triton")


def merged(choices: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The choices updated with the results of `tune`; entries that the heuristic now beats are removed."""
    return {key: tile for key, tile in (choices | found).items() if tile is not None}


def _open_table(output: Path | None) -> tuple[Path, dict[str, Any], Callable[[Path, str], object]]:
    """(path, entries, write function) of the table; it is written once to fail before the work, not after it.

    Raises OSError, ValueError, RuntimeError: it cannot be read or written, or has no folder.
    """
    from .ops.triton import tiles

    if output is not None:
        choices = tiles.read(output) if output.exists() else dict(tiles.table())
        output.write_text(tiles.to_json(choices))
        return output, choices, Path.write_text
    path = user_files.table()
    user_files.make_private_folder(path)
    choices, reason = tiles.user_table()
    if reason is not None:
        raise ValueError(reason)
    user_files.write_atomic(path, tiles.to_json(choices))
    return path, choices, user_files.write_atomic


def main(argv: Iterable[str] | None = None) -> int:
    summary = "Time the tiles of the Triton kernels on this GPU and write the table of choices."
    parser = argparse.ArgumentParser(prog="mi-kernels tune", description=summary, allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", type=_sizes, metavar="B,Z,X,O", required=True)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--most", type=positive, default=60, help="tiles tried for each product (60)")
    parser.add_argument(
        "--output",
        type=Path,
        help="the table, added to where it exists (tiles.json in the user's cache directory)",
    )
    options = parser.parse_args(None if argv is None else list(argv))
    reason = why_not()
    if reason is not None:
        print(f"tune: {reason}", file=sys.stderr)
        return 1
    try:
        path, choices, write = _open_table(options.output)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    from .ops.triton import tiles

    for dtype in options.dtype:
        for sizes in options.sizes:
            for name, (call, truth) in calls(sizes, getattr(torch, dtype), "cuda").items():
                print(f"{name}, {dtype}, B,Z,X,O = {sizes}: first call {_first_call(call):.2f} s", flush=True)
                choices = merged(choices, tune(call, truth, _measure, options.most))
                write(path, tiles.to_json(choices))
    print(path)
    return 0
