"""Compile every Triton kernel ahead of time, for GPUs that are not present, and inspect the result.

    python tools/aot.py --output FILE            all capabilities and dtypes (about 20 minutes)
    python tools/aot.py --short --capability 90 --dtype bfloat16

The kernels are those that calls launch (variants.py), with the tiles chosen for that GPU. It checks that

* no register is spilled, and shared memory does not exceed that of the GPU;
* the products use the matrix instruction of the architecture: mma on 8.0, 8.9 and 12.0, wgmma on 9.0, tcgen05
  on 10.0 (a tile of less than 64 rows uses mma everywhere, float32 without tf32 none, and float64 uses mma on
  8.0, 9.0 and 10.0 only);
* on 9.0 no register is written while a wgmma still reads it (sass.py).

Nothing is executed, so results are not checked.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import environment, results
from mi_kernels import backends
from mi_kernels.tune import positive
from tools import sass

CAPABILITIES = (80, 89, 90, 100, 120)
DTYPES = ("bfloat16", "float16", "tf32")
INSTRUCTIONS = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}  # in PTX
_OF_CAPABILITY = {90: "wgmma", 100: "tcgen05"}
FLOAT64 = (80, 90, 100)  # have float64 matrix instructions
TILE = ("BM", "BS", "BN", "BU", "BP", "BK")
SIZES = ("M", "N", "I", "K", "B", "T", "C", "H", "P", "X", "K1", "K2")
# Operands of products by their names in the kernels; "g" is that of weight gradients.
PRODUCTS = ("w", "u", "v", "w1", "w2", "weight_hh", "weight_mh", "weight")
LEAST_ROWS = 64  # minimum rows of a tile for wgmma and tcgen05


@dataclass(frozen=True)
class Report:
    """Facts about one compiled kernel; ``faults`` lists what is wrong with it."""

    capability: int
    dtype: str
    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int
    seconds: float
    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    register_loops: int  # loops with wgmma whose A operand is in registers
    faults: tuple[str, ...]


def why_not() -> str | None:
    """Why kernels cannot be compiled and inspected here, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if backends.interpreting():
        return "with TRITON_INTERPRET=1 Triton interprets its kernels and compiles none"
    missing = [name for name in ("cuobjdump",) if sass.disassembler(name) is None]
    return f"{', '.join(missing)}: not found on PATH nor in the package triton" if missing else None


def writable(text: str) -> Path:
    """An argument that is a writable file, checked before minutes of work."""
    path = Path(text)
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return path


@contextmanager
def _precision(dtype: str) -> Iterator[torch.dtype]:
    """The dtype of the operands; allows tf32 in the block if the name says so."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    finally:
        settings.fp32_precision = before


def expected(constants: dict[str, Any], arguments: dict[str, Any], capability: int, dtype: str) -> str | None:
    """The matrix instruction of a launch; None without a product, or for one without matrix instructions."""
    operands = [arguments.get(name) for name in PRODUCTS]
    products = "g" in arguments or any(operand is not None for operand in operands)
    if not products or dtype == "float32":
        return None
    if dtype == "float64":
        return "mma" if capability in FLOAT64 else None
    large = constants["BM"] >= LEAST_ROWS
    return _OF_CAPABILITY.get(capability, "mma") if large else "mma"


def reports(capability: int, dtype: str, short: bool = False) -> Iterator[Report]:
    """Compile all kernels for one capability and dtype; the cache of Triton is not used."""
    from tools import variants

    pair = divmod(capability, 10)
    with _precision(dtype) as operands:
        launches = variants.launches(pair, operands, short=short)
        for launch in launches:
            yield _report(launch, capability, dtype)


def compiled_anew(launch: Any, capability: int) -> tuple[Any, float]:
    """A kernel compiled from source, ignoring Triton's cache, and the seconds that it took."""
    import triton
    from triton.backends.compiler import GPUTarget

    from tools import variants

    source, options = variants.source(launch, divmod(capability, 10))
    begin = time.perf_counter()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled, time.perf_counter() - begin


def _report(launch: Any, capability: int, dtype: str) -> Report:
    from mi_kernels.ops.triton import tile_limits

    compiled, seconds = compiled_anew(launch, capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        found, text = sass.resources_of(path), sass.text_of(path)
    loops = list(sass.loops(text)) if capability == 90 else []
    ptx = compiled.asm["ptx"]
    instructions = tuple(name for name, word in INSTRUCTIONS.items() if word in ptx)
    constants = {k: v for k, v in launch.arguments.items() if isinstance(v, int | str) and k.isupper()}
    constants = {k: v for k, v in constants.items() if k not in SIZES}
    wanted = expected(constants, launch.arguments, capability, dtype)
    limit = tile_limits.available_shared_memory(divmod(capability, 10))
    faults = []
    if found.spilled:
        faults.append(f"{found.spilled} bytes of registers spilled")
    if compiled.metadata.shared > limit:
        faults.append(f"{compiled.metadata.shared} bytes of shared memory, there are {limit}")
    if instructions != ((wanted,) if wanted else ()):
        faults.append(
            f"expected {wanted or 'no matrix instruction'}, found {', '.join(instructions) or 'none'}"
        )
    if any(loop.hazards for loop in loops):
        faults.append("registers written while a wgmma may read them")
    return Report(
        capability, dtype, launch.kernel.__name__, constants, launch.options["num_warps"],
        launch.options["num_stages"],
        round(seconds, 3), found.registers, found.spilled, compiled.metadata.shared, instructions, len(loops),
        tuple(faults),
    )  # fmt: skip


def table(found: list[Report]) -> str:
    """A row per capability and dtype: kernels, maximum registers, spills, instructions, faults, seconds."""
    lines = [
        "| capability | dtype | kernels | most registers | spilled | instructions"
        " | loops with wgmma from registers | hazards | faults | seconds a kernel, median, most |",
        "| ---: | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for key in dict.fromkeys((r.capability, r.dtype) for r in found):
        group = [r for r in found if (r.capability, r.dtype) == key]
        counts = {name: sum(name in r.instructions for r in group) for name in INSTRUCTIONS}
        used = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        times = sorted(r.seconds for r in group)
        hazards = sum("wgmma may read" in fault for r in group for fault in r.faults)
        row = (*key, len(group), max(r.registers for r in group), sum(r.spilled > 0 for r in group), used)
        row += (sum(r.register_loops for r in group), hazards, sum(bool(r.faults) for r in group))
        lines.append(f"| {' | '.join(map(str, row))} | {times[len(times) // 2]:.2f}, {times[-1]:.2f} |")
    return "\n".join(lines)


def by_tile(found: list[Report]) -> list[dict[str, Any]]:
    """For each capability, dtype, kernel, style and tile: the number of kernels and their maximum usage."""
    groups: dict[tuple[Any, ...], list[Report]] = {}
    for report in found:
        style = report.constants.get("STYLE", "")
        tile = "x".join(str(report.constants[size]) for size in TILE if size in report.constants)
        key = (report.capability, report.dtype, report.kernel, style, tile)
        groups.setdefault(key, []).append(report)
    names = ("capability", "dtype", "kernel", "style", "tile")
    return [
        dict(zip(names, key, strict=True))
        | {"count": len(group)}
        | {use: max(getattr(report, use) for report in group) for use in ("registers", "spilled", "shared")}
        for key, group in groups.items()
    ]


def _collected(job: tuple[int, str], short: bool) -> list[Report]:
    return list(reports(*job, short))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aot", description="Compile every Triton kernel ahead of time.", allow_abbrev=False
    )
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--dtype", nargs="+", choices=(*DTYPES, "float32", "float64"), default=list(DTYPES))
    parser.add_argument("--short", action="store_true", help="one size and one activation")
    parser.add_argument("--jobs", type=positive, default=2, help="processes (2)")
    parser.add_argument("--output", type=writable, help="JSON; the table goes beside it as .md")
    options = parser.parse_args(argv)
    reason = why_not()
    if reason is not None:
        print(f"aot: {reason}", file=sys.stderr)
        return 2
    command = ["python", "tools/aot.py", *(sys.argv[1:] if argv is None else argv)]
    facts = environment.facts(command)
    jobs = [(capability, dtype) for dtype in options.dtype for capability in options.capability]
    found: list[Report] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for job, group in zip(jobs, pool.map(partial(_collected, short=options.short), jobs), strict=True):
            found += group
            if options.output is not None:
                _save(options.output, facts, found)
            print(f"{job[0]} {job[1]}: {len(group)} kernels", flush=True)
            for report in group:
                for fault in report.faults:
                    where = f"{report.kernel} {report.constants} {report.warps} warps, {report.stages} stages"
                    print(f"  {where}: {fault}", flush=True)
    print(table(found))
    return int(any(report.faults for report in found))


def _save(path: Path, facts: dict[str, Any], found: list[Report]) -> None:
    """JSON (maximum usage per tile, and all faults), and the table with the versions it depends on."""
    faulty = [asdict(report) for report in found if report.faults]
    results.write(path, facts | {"kernels": by_tile(found), "faulty": faulty})
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "triton"))
    head = f"{facts['date']}, commit {facts['commit']['revision']}, {versions}, `{facts['command']}`"
    path.with_suffix(".md").write_text(f"{head}\n\n{table(found)}\n")


if __name__ == "__main__":
    sys.exit(main())
