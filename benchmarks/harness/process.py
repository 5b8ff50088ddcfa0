"""One of the processes that suites/processes.py starts: it imports, prepares a call and times it, on request.

    python process.py        requests and answers are lines of JSON on stdin and stdout

Requests, each with `do`:
  import   module              -> seconds (wall), cpu
  prepare  form, ours, rows, features, dtype, threads -> {}
  call     backward, count     -> seconds, a list: of each call in a row; on one thread of its CPU time
  run      backward, seconds   -> calls in this time, seconds, cpu
  switch   backward, threads, count -> change (seconds of set_num_threads), seconds of the calls after it
  regions  backward            -> regions: parallel ones of a call, where regions.cpp is preloaded
Nothing but the standard library is imported unasked, so that what comes first is seen.
"""

import ctypes
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Form(NamedTuple):
    """A public function, and PyTorch's operations for the same; `mi` and `torch` are the modules."""

    sizes: Callable[[int, int], tuple[tuple[int, ...], ...]]  # of rows and features
    ours: Callable[..., Any]  # (mi, *tensors)
    rival: Callable[..., Any]  # (torch, *tensors)


def _pair(rows: int, n: int) -> tuple[tuple[int, ...], ...]:
    return (rows, n), (rows, n)


def _linear(torch: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    return torch.nn.functional.linear(x, weight, bias)


def _interaction(torch: Any, x: Any, z: Any, w: Any, u: Any, v: Any, c: Any) -> Any:
    t = _linear(torch, x, w.reshape(-1, w.shape[2])).view(len(x), w.shape[0], w.shape[1])
    return (t @ z.unsqueeze(-1)).squeeze(-1) + _linear(torch, z, u) + _linear(torch, x, v, c)


def _low_rank(torch: Any, x: Any, z: Any, a: Any, b: Any, c: Any) -> Any:
    return _linear(torch, _linear(torch, x, a) * _linear(torch, z, b), c)


def _glu(torch: Any, x: Any, weight: Any) -> Any:
    gate, value = _linear(torch, x, weight).chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


def _normed(torch: Any, x: Any, scale: Any, shift: Any) -> Any:
    return torch.nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def _diagonal(torch: Any, x: Any, z: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return torch.sigmoid(_linear(torch, z, a, b)) * x + _linear(torch, z, c, d)


def _mrnn(torch: Any, x: Any, w: Any, u: Any, m: Any, n: Any) -> Any:
    h, ys = x.new_zeros(1, u.shape[0]), []
    for step in x.unsqueeze(1):
        product = _linear(torch, step, m) * _linear(torch, h, n)
        h = torch.tanh(_linear(torch, step, w) + _linear(torch, product, u))
        ys.append(h)
    return torch.cat(ys)


def _our_mrnn(mi: Any, x: Any, w: Any, u: Any, m: Any, n: Any) -> Any:
    return mi.multiplicative_rnn("mrnn", x.unsqueeze(1), None, w, u, weight_mx=m, weight_mh=n)[0].squeeze(1)


def _weights(n: int) -> tuple[tuple[int, ...], ...]:
    return (n, n, n), (n, n), (n, n), (n,)


FORMS = {
    "interaction": Form(
        lambda b, n: (*_pair(b, n), *_weights(n)), lambda mi, *t: mi.interaction(*t), _interaction
    ),
    "bilinear": Form(
        lambda b, n: (*_pair(b, n), (n, n, n)),
        lambda mi, *t: mi.bilinear(*t),
        lambda torch, *t: torch.nn.functional.bilinear(*t),
    ),
    "gated_interaction": Form(
        lambda b, n: (*_pair(b, n), *_weights(n)),
        lambda mi, *t: mi.gated_interaction(*t),
        lambda torch, x, *t: torch.sigmoid(_interaction(torch, x, *t)) * x,
    ),
    "biaffine": Form(
        lambda b, n: ((1, b, n), (1, b, n), (4, n, n)),
        lambda mi, *t: mi.biaffine(*t),
        lambda torch, *t: torch.einsum("bxi,byj,oij->bxyo", *t),
    ),
    "diagonal": Form(
        lambda b, n: (*_pair(b, n), (n, n), (n,), (n, n), (n,)),
        lambda mi, *t: mi.diagonal(*t, activation="sigmoid"),
        _diagonal,
    ),
    "low_rank": Form(
        lambda b, n: (*_pair(b, n), (n, n), (n, n), (n, n)), lambda mi, *t: mi.low_rank(*t), _low_rank
    ),
    "glu": Form(lambda b, n: ((b, n), (2 * n, n)), lambda mi, *t: mi.glu(*t), _glu),
    "generate": Form(
        lambda b, n: ((b, n), (n, n, n)),
        lambda mi, *t: mi.generate(*t)[0],
        lambda torch, *t: torch.einsum("bi,oij->boj", *t),
    ),
    "apply_generated": Form(
        lambda b, n: ((b, n), (b, n, n)),
        lambda mi, *t: mi.apply_generated(*t),
        lambda torch, x, w: torch.bmm(w, x.unsqueeze(-1)).squeeze(-1),
    ),
    "modulate": Form(
        lambda b, n: ((b, n),) * 3,
        lambda mi, *t: mi.modulate(*t),
        lambda torch, x, scale, shift: torch.addcmul(shift, x, scale),
    ),
    "mix": Form(
        lambda b, n: ((b, n),) * 3,
        lambda mi, *t: mi.mix(*t),
        lambda torch, a, b, gate: torch.lerp(b, a, torch.sigmoid(gate)),
    ),
    "norm_modulate": Form(lambda b, n: ((b, n),) * 3, lambda mi, *t: mi.norm_modulate(*t), _normed),
    "multiplicative_rnn": Form(lambda b, n: ((b, n), *((n, n),) * 4), _our_mrnn, _mrnn),
}


class Call:
    """A prepared call."""

    def __init__(self, form: str, ours: bool, rows: int, features: int, dtype: str, threads: int):
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        # On one thread its own time, which other programs do not lengthen.
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        # Any first backward pass of a process imports sympy, in PyTorch's own code.
        one = torch.ones(1, requires_grad=True)
        torch.autograd.grad(one * 1, one, torch.ones(1))
        found = FORMS[form]
        module = importlib.import_module("mi_kernels") if ours else torch
        function = found.ours if ours else found.rival
        drawn = [torch.randn(size) / size[-1] ** 0.5 for size in found.sizes(rows, features)]
        self.leaves = [t.to(getattr(torch, dtype)).requires_grad_() for t in drawn]
        self.inputs = [t.detach() for t in self.leaves]
        self.function, self.grad = lambda tensors: function(module, *tensors), torch.autograd.grad
        self.no_grad, self.ones_like = torch.no_grad, torch.ones_like
        self.cotangent: Any = None

    def run(self, backward: bool) -> object:
        if not backward:
            with self.no_grad():
                return self.function(self.inputs)
        y = self.function(self.leaves)
        if self.cotangent is None:
            self.cotangent = self.ones_like(y)
        return self.grad(y, self.leaves, self.cotangent)


def _seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    begin = clock()
    run()
    return clock() - begin


def _calls(call: Call, backward: bool, count: int) -> dict[str, Any]:
    return {"seconds": [_seconds(lambda: call.run(backward), call.clock) for _ in range(count)]}


def _import(module: str) -> dict[str, Any]:
    begin, busy = time.perf_counter(), time.process_time()
    importlib.import_module(module)
    return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - busy}


def _run(call: Call, backward: bool, seconds: float) -> dict[str, Any]:
    calls, begin, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        call.run(backward)
        calls += 1
    return {"calls": calls, "seconds": time.perf_counter() - begin, "cpu": time.process_time() - busy}


def _switch(call: Call, backward: bool, threads: int, count: int) -> dict[str, Any]:
    set_num_threads = importlib.import_module("torch").set_num_threads
    change = _seconds(lambda: set_num_threads(threads))
    return {"change": change, "seconds": [_seconds(lambda: call.run(backward)) for _ in range(count)]}


def _regions(call: Call, backward: bool) -> dict[str, Any]:
    call.run(backward)  # a first call may start threads
    counter = ctypes.c_int.in_dll(ctypes.CDLL(None), "mi_parallel_regions")
    before = counter.value
    call.run(backward)
    return {"regions": counter.value - before}


def main() -> None:
    call: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        match request.pop("do"):
            case "import":
                answer = _import(**request)
            case "prepare":
                call, answer = Call(**request), {}
            case "call":
                answer = _calls(call, **request)
            case "run":
                answer = _run(call, **request)
            case "regions":
                answer = _regions(call, **request)
            case "switch":
                answer = _switch(call, **request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
