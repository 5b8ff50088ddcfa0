"""One revision's side of a comparison: measures mi_kernels from the folder it is told, on request.

    python worker.py FOLDER        requests and answers are lines of JSON on stdin and stdout

A request has sizes [B, Z, X, O] of the dense form or a suite's case (suites/guard.py), dtype, pass, calls (0:
find out) and shortest (seconds of a sample). The suites are those of this checkout, on the mi_kernels of the
folder: what that revision cannot do is answered by ``why``, and by ``missing``: whether the error is one of a
function, an argument or a value of one that the revision does not have.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness import passes, timing  # these two need no mi_kernels, of whatever revision

# What a call raises of a function, an argument or a dtype that its revision does not have.
MISSING = (AttributeError, ImportError, KeyError, NotImplementedError, TypeError, ValueError)


def _interaction(folder: Path) -> Callable:
    sys.path.insert(0, str(folder))
    import mi_kernels

    found = Path(mi_kernels.__file__).resolve().parents[1]
    if found != folder:
        sys.exit(f"worker: expected mi_kernels from {folder}, found it in {found}")
    return mi_kernels.interaction


def _start(request: dict[str, Any], interaction: Callable) -> timing.Start:
    dtype, work = getattr(torch, request["dtype"]), request["pass"]
    if "sizes" in request:
        return passes.start(work, interaction, passes.random_operands(tuple(request["sizes"]), dtype))
    from benchmarks.harness import cases  # it imports mi_kernels, which is there by now
    from benchmarks.suites.guard import Named

    case = Named(*request["case"]).found()
    return cases.start(case.functions[cases.OURS], case.arguments(dtype, 0), work)


def main() -> None:
    folder, threads = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    torch.set_num_threads(threads)
    interaction = _interaction(folder)
    case, start = None, None
    for line in sys.stdin:
        request = json.loads(line)
        wanted = {key: value for key, value in request.items() if key not in ("calls", "shortest")}
        if wanted != case:
            case, start = wanted, None  # the old operands go before the new ones come
            try:
                start = _start(request, interaction)
                start()()
            except Exception as error:
                case = None
                why = f"{type(error).__name__}: {error}"[:200]
                print(json.dumps({"why": why, "missing": isinstance(error, MISSING)}), flush=True)
                continue
        calls = request["calls"] or timing.calibrate(start, request["shortest"])[0]
        answer = {"calls": calls, **timing.sample(start, calls)._asdict()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
