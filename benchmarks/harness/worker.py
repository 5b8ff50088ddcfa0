"""One revision's side of a comparison: measures mi_kernels from the folder it is told, on request.

    python worker.py FOLDER        requests and answers are lines of JSON on stdin and stdout

A request has sizes [B, Z, X, O], dtype, pass, calls (0: find out) and shortest (seconds of a sample).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness import passes, timing  # these two need no mi_kernels, of whatever revision


def _interaction(folder: Path) -> Callable:
    sys.path.insert(0, str(folder))
    import mi_kernels

    found = Path(mi_kernels.__file__).resolve().parents[1]
    if found != folder:
        sys.exit(f"worker: expected mi_kernels from {folder}, found it in {found}")
    return mi_kernels.interaction


def main() -> None:
    folder, threads = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    torch.set_num_threads(threads)
    interaction = _interaction(folder)
    case, start = None, None
    for line in sys.stdin:
        request = json.loads(line)
        wanted = (tuple(request["sizes"]), request["dtype"], request["pass"])
        if wanted != case:
            case, start = wanted, None  # the old operands go before the new ones come
            sizes, dtype, work = wanted
            operands = passes.random_operands(sizes, getattr(torch, dtype))
            start = passes.start(work, interaction, operands)
        calls = request["calls"] or timing.calibrate(start, request["shortest"])[0]
        answer = {"calls": calls, **timing.sample(start, calls)._asdict()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
