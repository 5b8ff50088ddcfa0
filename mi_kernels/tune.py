"""Times the tiles of the Triton kernels on this GPU and writes the table of choices: ``mi-kernels tune``.

Nothing is tuned on a call; this is opt-in. The table is in the user's cache directory (``user_files.table``)
and counts for this user's calls from then on; ``--output`` names another file, such as ops/triton/table.json
of a checkout, which is a part of the package and can be committed. A tile is only taken if its results are as
right as those of the heuristic's tile.
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

from mi_kernels import backends
from mi_kernels.ops import user_files
from mi_kernels.testing.errors import relative_error

DTYPES = ("bfloat16", "float16", "float32", "float64")
Call = Callable[[], Sequence[Tensor]]
Measure = Callable[[Call], float]  # seconds; what `does_not_run` lists where the tile does not run


def calls(sizes: Sequence[int], dtype: torch.dtype, device: str) -> dict[str, tuple[Call, Call]]:
    """The primitives of a dense interaction at [B, Z, X, O], by name: in Triton, and in PyTorch."""
    from mi_kernels.ops.interaction import portable
    from mi_kernels.ops.triton import interaction as kernels

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
def _watched() -> Iterator[list[Any]]:
    """The problems whose tiles are asked for meanwhile, each once, in order."""
    from mi_kernels.ops.triton import host, tiles

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
    """What a tile that this GPU cannot run raises: too much shared memory, or refused by a compiler.

    Not Triton's base class: that moved between its versions. RuntimeError is PyTorch's (of memory, say).
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return (OutOfResources, PTXASError, CompilationError, RuntimeError)


def tune(
    call: Call, truth: Call, measure: Measure, most: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The fastest valid tile of each problem in a call, by the table's key; None where the heuristic's is."""
    from mi_kernels.ops.triton import tiles

    exact = [t.double() for t in truth()]
    with _watched() as problems:
        results = call()
    limit = 2 * _error(results, exact)
    found = {}
    for problem in problems:
        timed: dict[Any, float] = {}
        for tile in islice(tiles.candidates(problem), most):
            with tiles.using({problem.key: tile}):
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


def _cold(call: Call) -> float:
    """Seconds of a first call, compilation included."""
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
    """A number of tiles, rounds or processes."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def why_not() -> str | None:
    """Why nothing can be timed here, or None."""
    if backends.interpreting():
        return "TRITON_INTERPRET=1 is set: the interpreter's times say nothing about a GPU"
    return backends.why_not("triton")


def merged(choices: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The choices with what `tune` found: an entry that the heuristic now beats goes."""
    return {key: tile for key, tile in (choices | found).items() if tile is not None}


def _begun(output: Path | None) -> tuple[Path, dict[str, Any], Callable[[Path, str], object]]:
    """The table to add to, what is in it, and what writes it: once before the work, to see that it can be.

    Raises OSError, ValueError, RuntimeError: it cannot be read or written, or has no place.
    """
    from mi_kernels.ops.triton import tiles

    if output is not None:
        choices = tiles.read(output) if output.exists() else dict(tiles.table())
        output.write_text(tiles.written(choices))
        return output, choices, Path.write_text
    path = user_files.table()
    user_files.make_private_folder(path)
    choices, reason = tiles.own()
    if reason is not None:
        raise ValueError(reason)
    user_files.write_atomic(path, tiles.written(choices))
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
        path, choices, write = _begun(options.output)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    from mi_kernels.ops.triton import tiles

    for dtype in options.dtype:
        for sizes in options.sizes:
            for name, (call, truth) in calls(sizes, getattr(torch, dtype), "cuda").items():
                print(f"{name}, {dtype}, B,Z,X,O = {sizes}: first call {_cold(call):.2f} s", flush=True)
                choices = merged(choices, tune(call, truth, _measure, options.most))
                write(path, tiles.written(choices))
    print(path)
    return 0
