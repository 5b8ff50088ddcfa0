"""The time of a first call on Triton: imports, and compilation of kernels.

    python tools/cold_start.py                            for capability 9.0, in bfloat16
    python tools/cold_start.py --capability 80 --dtype float16 --output FILE

Sizes are the first of variants.py: B, Z, X, O = 4096, 32, 256, 256, all terms. Imports are timed
in new processes, compilation from source in one, each --rounds times; medians are printed. No GPU is needed:
these are times of this machine's CPU. The time to load a kernel into a GPU is not in them, nor is Triton's
cache, which lets a second process skip the compilation.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import environment, results
from mi_kernels.tune import positive
from tools import aot

# The timed statements, and the setup before each.
IMPORTS = {
    "torch": ("", "import torch"),
    "mi_kernels": ("import torch", "import mi_kernels"),
    "its Triton kernels, at the first call": (
        "import mi_kernels",
        "import mi_kernels.ops.triton.interaction",
    ),
}


def seconds_of(before: str, statement: str) -> float:
    """Seconds of a statement in a new process, after its setup."""
    script = f"import time\n{before}\nbegin = time.perf_counter()\n{statement}\n"
    script += "print(time.perf_counter() - begin)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=environment.ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def compilations(capability: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, Any]]:
    """For each operation, its kernels by name and, for each round, the seconds that all of them took."""
    from tools import variants

    calls = variants.first_calls(divmod(capability, 10), dtype)
    aot.compiled_anew(next(iter(calls["modulate"].values())), capability)  # initialisation once per process
    return {
        name: {
            "kernels": [launch.kernel.__name__ for launch in launches.values()],
            "seconds": [
                sum(aot.compiled_anew(launch, capability)[1] for launch in launches.values())
                for _ in range(rounds)
            ],
        }
        for name, launches in calls.items()
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| import | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {statistics.median(times):.2f} |" for name, times in result["imports"].items()]
    lines += ["", "| first forward and backward | kernels | seconds to compile |", "| --- | ---: | ---: |"]
    for name, found in result["compilations"].items():
        lines.append(f"| {name} | {len(found['kernels'])} | {statistics.median(found['seconds']):.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cold_start", description="What a first call on Triton waits for.", allow_abbrev=False
    )
    parser.add_argument("--capability", type=int, choices=aot.CAPABILITIES, default=90)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--output", type=aot.writable, help="JSON")
    options = parser.parse_args(argv)
    reason = aot.why_not()
    if reason is not None:
        print(f"cold_start: {reason}", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    facts = environment.facts(["python", "tools/cold_start.py", *(sys.argv[1:] if argv is None else argv)])
    imports = {name: [seconds_of(*pair) for _ in range(options.rounds)] for name, pair in IMPORTS.items()}
    found = compilations(options.capability, getattr(torch, options.dtype), options.rounds)
    result = facts | {"imports": imports, "compilations": found}
    print(table(result))
    print(f"measured in {time.perf_counter() - begin:.0f} s")
    if options.output is not None:
        results.write(options.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
