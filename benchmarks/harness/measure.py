"""One case: all candidates on one shape, dtype and pass, with their time, memory and error."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import passes, peers, timing
from benchmarks.harness.passes import Operands
from benchmarks.harness.peers import Sizes
from mi_kernels.ops import counts
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import WEIGHT_ONLY, Shape

OURS = "mi_kernels"
GEMM_NAMES = {"mm [O,ZX]": False, "mm [ZX,O]": True}
ONEDNN = "oneDNN fp32"
TRITON = "mm by Triton"
OPT_EINSUM = torch.backends.opt_einsum
TRUTH_BYTES = 64 << 20  # of the float64 product z x, a chunk of rows at a time
PROBE_OPERATIONS = 1 << 28  # from here on, a rival is first tried on a sixteenth of the rows
PROBE_PART = 16


@dataclass(frozen=True)
class Entry:
    """A shape, and where it comes from."""

    shape: Shape
    origin: str


@dataclass(frozen=True)
class Limits:
    """Limits of a measurement in seconds and bytes."""

    rounds: int = 7
    shortest: float = 0.005  # a sample
    longest: float = 10.0  # all samples of one candidate
    call: float = 60.0  # one call; a rival that is predicted to take longer is skipped
    memory: int = 6 << 30  # temporaries of a rival
    seed: int = 0


@dataclass(frozen=True)
class Environment:
    """Where a case runs: the device, its clock, and the backends of ours that take part.

    ``spared``: a backend of ours that fails costs its own row, as a rival does, and not the case.
    """

    device: str = "cpu"
    clock: timing.Clock = timing.wall
    backends: tuple[str, ...] = ("auto",)
    spared: bool = False

    def finish(self) -> None:
        """Wait for what was started."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


HERE = Environment()


@dataclass
class Candidate:
    """A timed candidate, or the reason why it is not timed."""

    name: str
    kind: str  # ours, rival, gemm (torch.mm), onednn, limit (of Triton: peers.triton_gemm)
    start: timing.Start | None = None
    probe: timing.Start | None = None  # the same on fewer rows
    arrange: Callable[[Tensor], Tensor] | None = None  # the layout of its dW
    status: str = "ok"
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of a warm call

    def give_up(self, reason: str) -> None:
        self.status, self.start = reason, None
        self.samples, self.cores = [], []

    def as_dict(self) -> dict[str, Any]:
        measured = timing.statistics_of(self.samples) if self.samples else {}
        if self.cores:
            measured["cores"] = statistics.median(self.cores)
        common = {"name": self.name, "kind": self.kind, "status": self.status}
        return common | measured | self.facts | {"samples_s": self.samples}


def sizes_of(entry: Entry) -> Sizes:
    shape = entry.shape
    return Sizes(shape.rows, shape.context, shape.width, shape.out)


def count(entry: Entry, work: str, dtype: torch.dtype) -> counts.Count:
    """Operations and ideal bytes of a pass, W alone."""
    parts = {
        "forward": (counts.forward,),
        "forward+backward": (counts.forward, counts.input_grads, counts.weight_grads),
        "double-backward": (counts.double_backward,),
    }[work]
    found = [part(entry.shape, dtype, WEIGHT_ONLY) for part in parts]
    return counts.Count(sum(c.operations for c in found), sum(c.bytes for c in found))


def measure(
    entry: Entry,
    dtype: torch.dtype,
    work: str,
    rivals: Iterable[str],
    limits: Limits,
    place: Environment = HERE,
) -> dict[str, Any]:
    """The case as a dict that `json` can write."""
    sizes = sizes_of(entry)
    operands = passes.random_operands(sizes, dtype, limits.seed, place.device)
    if any(name.startswith(peers.COMPILED) for name in rivals):
        torch._dynamo.reset()  # its limit of recompilations counts all shapes together
    with OPT_EINSUM.flags(enabled=False):  # or torch.einsum is opt_einsum wherever that is installed
        candidates = list(_candidates(sizes, dtype, work, rivals, operands, limits, place))
        truth = exact(work, operands)
        for candidate in candidates:
            if candidate.start is not None:
                _try(candidate, truth, limits, place)
        del truth
        _time(candidates, limits, place)
    needed = count(entry, work, dtype)
    return {
        "shape": {"name": entry.shape.name, **sizes._asdict(), "origin": entry.origin},
        "dtype": str(dtype).removeprefix("torch."),
        "pass": work,
        "operations": needed.operations,
        "bytes": needed.bytes,
        "candidates": [candidate.as_dict() for candidate in candidates],
    }


def _ours(backend: str) -> Callable[..., Tensor]:
    if backend == "auto":
        return mi.interaction
    return mi.backend(backend)(mi.interaction)


def _candidates(
    sizes: Sizes,
    dtype: torch.dtype,
    work: str,
    rivals: Iterable[str],
    operands: Operands,
    limits: Limits,
    place: Environment,
) -> Iterator[Candidate]:
    for backend in place.backends:
        name = OURS if backend == "auto" else f"{OURS} {backend}"
        start = passes.start(work, _ours(backend), operands)
        yield Candidate(name, "ours", start, arrange=lambda w: w)
    for name in rivals:
        yield _rival(name, sizes, work, operands, limits)
    made = {
        name: partial(peers.gemm, work, sizes, dtype, by, place.device) for name, by in GEMM_NAMES.items()
    }
    if place.device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        made[ONEDNN] = partial(peers.onednn_gemm, work, sizes)
    if "triton" in place.backends and place.device != "cpu":
        made[TRITON] = partial(peers.triton_gemm, work, sizes, dtype, place.device)
    for name, make in made.items():
        candidate = Candidate(name, {ONEDNN: "onednn", TRITON: "limit"}.get(name, "gemm"))
        if peers.gemm_elements(work, sizes) * dtype.itemsize > limits.memory:
            candidate.give_up("skipped: memory")
        else:
            candidate.start = partial(lambda run: run, make())
        yield candidate


# How many tensors of the size of its largest temporary a rival holds at once, at least: autograd saves one,
# and makes its gradient; the second derivative saves both.
_HELD = {"forward": 1, "forward+backward": 2, "double-backward": 4}


def _rival(name: str, sizes: Sizes, work: str, operands: Operands, limits: Limits) -> Candidate:
    peer, candidate = peers.find(name), Candidate(name, "rival")
    candidate.arrange = peer.arrange
    missing = peer.missing()
    if missing is not None:
        candidate.give_up(f"not installed: {missing}")
        return candidate
    if _HELD[work] * peer.temporary(sizes) * operands.x.dtype.itemsize > limits.memory:
        candidate.give_up("skipped: memory")
        return candidate
    own = operands.arranged(peer.arrange)
    try:
        function = peer.make(sizes)
        if name.startswith(peers.COMPILED):
            candidate.start = passes.start(work, peers.compiled(function), own)
            return candidate
        candidate.start = passes.start(work, function, own)
        rows = sizes.B // PROBE_PART
        if rows and sizes.B * sizes.Z * sizes.X * sizes.O > PROBE_OPERATIONS:
            few = sizes._replace(B=rows)
            candidate.probe = passes.start(work, peer.make(few), own.rows(0, rows))
    except Exception as error:  # a failing rival is reported and does not stop the run
        candidate.give_up(_failure(error))
    return candidate


def _try(candidate: Candidate, truth: tuple[Tensor, ...], limits: Limits, place: Environment) -> None:
    """First calls of a candidate: whether it is too slow or fails, its error and its memory."""
    try:
        if candidate.probe is not None:
            predicted = PROBE_PART * timing.sample(candidate.probe, 1, clock=place.clock).seconds
            if predicted > limits.call:
                candidate.facts["predicted_s"] = predicted
                candidate.give_up(f"skipped: time, about {predicted:.0f} s a call")
                return
        begin = time.perf_counter()
        results = candidate.start()()
        place.finish()
        candidate.seconds = time.perf_counter() - begin
        if candidate.kind in ("ours", "rival"):
            candidate.facts["error"] = _error(results, truth, candidate.arrange)
        del results
        # What is prepared (the graph of first derivatives) is alive during the call and counts.
        candidate.facts["extra_bytes"] = peak_memory(lambda: _held(candidate.start()), place.device)
        if candidate.name.startswith(peers.COMPILED) or candidate.seconds < 1:
            candidate.seconds = timing.sample(candidate.start, 1, clock=place.clock).seconds
    except Exception as error:
        _fails(candidate, error, place)


def _fails(candidate: Candidate, error: Exception, place: Environment) -> None:
    if candidate.kind == "ours" and not place.spared:
        raise error
    candidate.give_up(_failure(error))


def _held(run: passes.Run) -> tuple[object, ...]:
    return run(), run


def _failure(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"fails: {type(error).__name__}: {lines[0][:200]}"


def _error(results: tuple[Tensor, ...], truth: tuple[Tensor, ...], arrange: Callable) -> float:
    """The largest relative L2 error among the results; of dW, which is always the last, in its own layout."""
    exact = truth if len(truth) == 1 else (*truth[:-1], arrange(truth[-1]))
    return max(relative_error(r.reshape(t.shape), t) for r, t in zip(results, exact, strict=True))


def exact(work: str, operands: Operands) -> tuple[Tensor, ...]:
    """The results in float64, a chunk of rows at a time. dW is a sum over rows, the others are rows."""
    o = operands.to(torch.float64)
    rows = o.x.shape[0]
    step = max(1, TRUTH_BYTES // (8 * o.x.shape[1] * o.z.shape[1]))
    formula = peers.PEERS["materialised"].make(Sizes(0, 0, 0, 0))
    rows_done, dw = [], None
    for begin in range(0, rows, step):
        results = passes.start(work, formula, o.rows(begin, begin + step))()()
        if work != "forward":
            *results, part = results
            dw = part if dw is None else dw.add_(part)
        rows_done.append(results)
    by_row = tuple(torch.cat(parts) for parts in zip(*rows_done, strict=True))
    return by_row if dw is None else (*by_row, dw)


def _time(candidates: list[Candidate], limits: Limits, place: Environment = HERE) -> None:
    running = {candidate.name: candidate for candidate in candidates if candidate.start is not None}
    samples = timing.interleave(
        {name: candidate.start for name, candidate in running.items()},
        limits.rounds,
        limits.shortest,
        limits.longest,
        {name: candidate.seconds for name, candidate in running.items()},
        limits.seed,
        place.clock,
        lambda name, error: _fails(running[name], error, place),
    )
    for name, _, sample in samples:
        running[name].samples.append(sample.seconds)
        running[name].cores.append(sample.cores)


MODES = ("forward, no grad", "forward, with grad", "forward+backward")


def overhead(entry: Entry, limits: Limits) -> Iterator[dict[str, Any]]:
    """Seconds of one call with negligible arithmetic, in each mode."""
    operands = passes.random_operands(sizes_of(entry), torch.float32, limits.seed)
    functions = {OURS: mi.interaction}
    functions |= {name: peers.PEERS[name].make(sizes_of(entry)) for name in ("einsum", "F.bilinear")}
    for mode in MODES:
        candidates = []
        for name, function in functions.items():
            if mode == "forward, with grad":
                start = passes.start_with_graph(function, operands)
            else:
                start = passes.start(mode.removesuffix(", no grad"), function, operands)
            candidates.append(Candidate(name, "ours" if name == OURS else "rival", start))
        with OPT_EINSUM.flags(enabled=False):
            _time(candidates, limits)
        found = {candidate.name: candidate.as_dict() for candidate in candidates}
        yield {"shape": entry.shape.name, "mode": mode, "candidates": list(found.values())}
