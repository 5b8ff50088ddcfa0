"""A short suite for each family, by name, and a program that runs a part of it.

    python -m mi_kernels.testing.suite BACKEND DEVICE DTYPE FAMILY [NAME ...]

runs the checks of a family (or only those named) on a backend and prints progress as lines of JSON:

    {"check": name, "state": "begun"}
    {"check": name, "state": "passed", "error": worst error as a fraction of the allowed one, "seconds": ...}
    {"check": name, "state": "failed", "fault": text}

Exit status: 0 all passed, 1 not, RUINED: the device is unusable after the last check. Kernels under test may
hang or crash this process; the parent handles that (isolated.py).
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from ..backends import BackendName
from ..functional.interaction import interaction_by
from ..ops import activations
from ..ops.backend import suffixes
from ..ops.interaction import batched, cost_model, reference
from ..ops.namespace import OPS
from . import checks, devices, mix_samples, norm_samples, recurrent_samples, samples
from ._package import mi
from .batched_samples import BY_INDEX, PER_SAMPLE, Batched
from .biaffine_samples import ARC, LABEL
from .dual_samples import GLU, LOW_RANK, dual_samples
from .errors import require
from .kernel_sizes import MMA, SM90, KernelSize
from .kernel_values import check_interaction
from .samples import LAYOUTS, WEIGHT_ONLY, GateSample, Modulation, Sample
from .shared_samples import MIXED, SHARED

Check = Callable[[torch.dtype, str], float]
DTYPES = ("bfloat16", "float16", "float32", "float64")
RUINED = 3
MAX_FAULTS = 3  # more give no new information
OPERATIONS = ("interaction", "interaction_input_grads", "interaction_weight_grads")


def suite(family: str, backend: str, capability: tuple[int, int] = (0, 0)) -> dict[str, Check]:
    """The checks of a family by name, kernels first. Sizes of the sm_90a engine are included only for 9.0."""
    if family == "interaction":
        found = dict(itertools.chain(kernels(backend, capability), _interactions()))
    elif family in ("glu", "low_rank"):
        found = dict(_duals(family))
    elif family == "modulate":
        found = dict(itertools.chain(_modulations(), _mixings()))
    elif family == "norm":
        found = dict(_normalizations())
    elif family == "recurrent":
        found = dict(_recurrences())
    else:
        found = dict(_gates(family))
    return found


def kernels(backend: str, capability: tuple[int, int] = (0, 0)) -> Iterator[tuple[str, Check]]:
    """The primitives of the dense interaction at sizes that reach each kernel."""
    sizes = (*(SM90 if backend == "cuda" and capability == (9, 0) else ()), *MMA)
    for size in sizes:
        yield f"kernel {size.name}", partial(_kernel, backend, size)


def takes(name: str, dtype: str) -> bool:
    """Whether a check applies to this dtype."""
    if name.startswith("tf32 "):
        return dtype == "float32"
    size = next((s for s in (*SM90, *MMA) if name == f"kernel {s.name}"), None)
    return size is None or dtype in size.dtypes


def _kernel(backend: str, size: KernelSize, dtype: torch.dtype, device: str) -> float:
    operations = {name: getattr(OPS, name + suffixes()[backend]) for name in OPERATIONS}
    if size.kernel is not None:  # make sure that the intended engine is the one checked
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        question = "forward", list(size.sizes), dtype, 15, 90, processors
        plan = OPS.cuda_interaction_plan(*question)
        require(plan.startswith("algorithm=wgmma"), f"expected the sm_90a engine, got the plan {plan}")
    return check_interaction(SimpleNamespace(**operations), size, dtype, device)


def _both(sample: checks.AnySample) -> Iterator[tuple[str, Check]]:
    yield f"values {sample}", partial(checks.check_values, sample)
    yield f"gradients {sample}", partial(checks.check_gradients, sample)


def _interactions() -> Iterator[tuple[str, Check]]:
    shapes = {shape.name: shape for shape in (*samples.ORDINARY, *samples.BROADCAST, *samples.EMPTY)}
    for name in ("odd", "past-powers", "one-output", "few-rows", "outer", "no-rows", "no-input"):
        yield from _both(Sample(shapes[name]))
    yield from _both(Sample(samples.THREADED, WEIGHT_ONLY))
    yield from _both(Sample(samples.ODD, (False, True, True, False)))
    for layout in LAYOUTS[1:]:
        yield from _both(Sample(samples.MIDDLE, layout=layout))
    for order in ("OXZ", "ZOX", "ZXO"):  # those that kernels tell apart
        yield from _both(Sample(samples.THREADED, order=order))
        yield from _both(Sample(shapes["few-rows"], order=order))
    middle = Sample(samples.MIDDLE, WEIGHT_ONLY)
    yield "second order", partial(checks.check_second_order, middle)
    for sample in (middle, Sample(samples.THREADED), Sample(samples.THREADED, order="ZXO")):
        for name, check in _both(sample):
            yield f"tf32 {name}", partial(_in_tf32, check)
    for plan in (cost_model.PER_Z, cost_model.PER_X):
        for sample in (Sample(SHARED[6]), Sample(SHARED[0] if plan == cost_model.PER_Z else SHARED[1])):
            yield f"{plan} {sample}", partial(_planned, plan, sample)
    yield "segment_ids", _segments
    for shape in (PER_SAMPLE[2], BY_INDEX[3], BY_INDEX[9]):
        yield f"weights {shape.name}", partial(_batched, shape)
    yield "generate", _generated
    for pairs in (ARC, LABEL, replace(LABEL, channels_first=True)):
        yield from _both(pairs)
    yield "NaN and Inf", _not_finite
    yield "the same bits twice", partial(_repeatable, Sample(samples.THREADED))


def _gates(op: str) -> Iterator[tuple[str, Check]]:
    terms = samples.GATE_TERMS[op]
    yield from _both(GateSample(op, samples.GATE_ODD, terms))
    yield from _both(GateSample(op, samples.GATE_THREADED, terms))
    yield from _both(GateSample(op, samples.GATE_TALL, samples.GATE_LINEAR[op]))
    for layout in LAYOUTS[1:]:
        yield from _both(GateSample(op, samples.GATE_MIDDLE, terms, layout))
    if "W" in terms:
        for order in ("OXZ", "ZOX", "ZXO"):
            yield from _both(GateSample(op, samples.GATE_THREADED, terms, order=order))
    for activation in activations.NAMES:
        if activation != "sigmoid":
            yield from _both(GateSample(op, samples.GATE_MIDDLE, terms, activation=activation))
    sample = GateSample(op, samples.GATE_MIDDLE, samples.GATE_PAIR[op])
    yield "second order", partial(checks.check_second_order, sample)
    for name, check in _both(GateSample(op, samples.GATE_THREADED, terms)):
        yield f"tf32 {name}", partial(_in_tf32, check)
    yield "the same bits twice", partial(_repeatable, GateSample(op, samples.GATE_THREADED, terms))


def _duals(op: str) -> Iterator[tuple[str, Check]]:
    """Some sizes, each choice of terms, layout and activation once."""
    names = ("odd", "threaded", "few-rows", "outer", "no-rows", "no-input")
    found = [s for s in dual_samples(op) if s.shape.name in names or s.layout != "contiguous"]
    for sample in found:
        yield from _both(sample)
    odd = GLU if op == "glu" else LOW_RANK
    yield "second order", partial(checks.check_second_order, odd)
    threaded = replace(odd, shape=samples.THREADED)
    for name, check in _both(threaded):
        yield f"tf32 {name}", partial(_in_tf32, check)
    yield "the same bits twice", partial(_repeatable, threaded)


_MODULATIONS = (
    *("tokens", "maps", "one", "elementwise", "no-shift", "features", "rows", "scale-full", "shift-full"),
    *("batch-norm", "alternating", "x-smaller", "long-rows", "many-rows", "threaded", "empty"),
)


def _modulations() -> Iterator[tuple[str, Check]]:
    named: dict[str, Modulation] = {}
    for sample in samples.modulations():
        if sample.layout == "contiguous":
            named.setdefault(sample.name, sample)
        elif sample.name in ("tokens", "maps"):
            named[str(sample)] = sample
    chosen = [named[name] for name in _MODULATIONS]
    chosen += [sample for sample in named.values() if sample.layout != "contiguous"]
    tokens = samples.TOKENS
    for activation in activations.NAMES:
        chosen.append(Modulation("tokens", tokens.x, tokens.scale, tokens.shift, activation=activation))
    for sample in dict.fromkeys(chosen):
        if sample.x == sample.shape:
            yield from _both(sample)
        else:  # the gradient of the expansion is PyTorch's
            yield f"values {sample}", partial(checks.check_values, sample)
    sample = Modulation("maps", samples.MAPS.x, samples.MAPS.scale)  # no gradient depends on a shift
    yield "second order", partial(checks.check_second_order, sample)
    yield "the same bits twice", partial(_repeatable, named["threaded"])


def _mixings() -> Iterator[tuple[str, Check]]:
    for sample in dict.fromkeys(mix_samples.mixings()):
        whole = sample.a == sample.b == sample.shape  # else the gradients of the expansions are PyTorch's
        for name, check in itertools.islice(_both(sample), 2 if whole else 1):
            yield f"mix {name}", check
    yield "mix second order", partial(checks.check_second_order, mix_samples.MAPS)
    yield "mix: the same bits twice", partial(_repeatable, mix_samples.TOKENS)


def _normalizations() -> Iterator[tuple[str, Check]]:
    for sample in norm_samples.normalizations():
        yield from _both(sample)
    for sample in (norm_samples.TOKENS, norm_samples.RMS, norm_samples.MAPS):
        yield f"second order {sample}", partial(checks.check_second_order, sample)
        yield f"{sample}: the same bits twice", partial(_repeatable, sample)


def _recurrences() -> Iterator[tuple[str, Check]]:
    for sample in recurrent_samples.recurrences():
        yield from _both(sample)
    for sample in recurrent_samples.every_kind():
        yield f"{sample}: the same bits twice", partial(_repeatable, sample)


def _in_tf32(check: Check, dtype: torch.dtype, device: str) -> float:
    """The check with tf32 allowed for PyTorch's float32 products, in which our tf32 kernels run."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        return check(dtype, device)
    finally:
        settings.fp32_precision = before


def _planned(plan: str, sample: Sample, dtype: torch.dtype, device: str) -> float:
    planned = partial(interaction_by, plan)
    return max(
        check(sample, dtype, device, planned) for check in (checks.check_values, checks.check_gradients)
    )


def _segments(dtype: torch.dtype, device: str) -> float:
    """Groups of unequal length, in any order."""
    ids = MIXED.segment_ids(device)
    form = checks.Form(
        lambda *a: mi.interaction(*a, segment_ids=ids),
        lambda x, z, *weights: reference.interaction(x, z[ids], *weights),
    )
    draw = partial(MIXED.arguments, dtype, device)
    return max(
        checks.check_form_values(form, draw),
        checks.check_form_gradients(form, lambda s: (MIXED.cotangent(dtype, device, s + 1000), *draw(s))),
    )


def _batched(shape: Batched, dtype: torch.dtype, device: str) -> float:
    """Weights of each sample, or chosen by index."""
    sample, ids = Sample(shape), shape.weight_ids(device)

    def theirs(x: Tensor, z: Tensor, *weights: Tensor) -> Tensor:
        return reference.interaction(x, z, *(weights if ids is None else batched.gathered(weights, ids)))

    form = checks.Form(lambda *a: mi.interaction(*a, weight_ids=ids), theirs)
    draw = partial(sample.arguments, dtype, device)
    return max(
        checks.check_form_values(form, draw),
        checks.check_form_gradients(form, lambda s: (sample.cotangent(dtype, device, s + 1000), *draw(s))),
    )


def _generated(dtype: torch.dtype, device: str) -> float:
    """generate for contexts, and apply_generated to tokens."""
    sample = Sample(SHARED[2])
    ours: Callable[..., Any] = mi.generate
    theirs: Callable[..., Any] = reference.generate

    def draw(seed: int) -> Sequence[Any]:
        return sample.arguments(dtype, device, seed)[1:]

    def apply(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        return lambda x, w, b: [function(x, w, b)]

    def layers(seed: int) -> Sequence[Any]:
        x, *tensors = sample.arguments(dtype, device, seed)
        return x, *(t.contiguous() for t in theirs(*tensors))

    generated = checks.check_errors(ours, theirs, draw)
    applied = checks.check_errors(apply(mi.apply_generated), apply(reference.apply_generated), layers)
    return max(generated, applied)


def _not_finite(dtype: torch.dtype, device: str) -> float:
    """NaN and Inf propagate to exactly the results that depend on them."""
    form = checks.form_of(Sample(samples.ODD))
    for index, value in itertools.product(range(6), (float("nan"), float("inf"))):
        arguments = Sample(samples.ODD).arguments(dtype, device)
        tensors: Any = arguments
        tensors[index].view(-1)[-1] = value
        checks.check_errors(
            lambda *a: [form.function(*a)],
            lambda *a: [form.reference(*a)],
            lambda _, a=arguments: a,  # type: ignore[misc]
            most=1,
        )
    return 0.0


def _repeatable(sample: checks.AnySample, dtype: torch.dtype, device: str) -> float:
    gradients = checks.gradients_of(checks.form_of(sample).function)
    grad, tensors = sample.cotangent(dtype, device), sample.arguments(dtype, device)
    first, second = gradients(grad, *tensors), gradients(grad, *tensors)
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        require(torch.equal(one, other), f"gradient {index} differs from run to run")
    return 0.0


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def run_checks(
    chosen: dict[str, Check],
    backend: BackendName,
    dtype: torch.dtype,
    device: str,
    say: Callable[..., None] = _say,
) -> int:
    """Run the checks on a backend, with uninitialised memory filled with NaN; returns the exit status."""
    faults = 0
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = (
        "ieee"  # the environment may allow tf32; checks of tf32 set it
    )
    for name, check in chosen.items():
        say(check=name, state="begun")
        begin = time.monotonic()
        try:
            with mi.backend(backend):
                error = check(dtype, device)
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)  # attributes asynchronous errors to this check
            require(error <= 1, f"error {error:.3g} of what is allowed")
        except Exception as problem:  # any failure of a kernel is reported
            kind = "" if isinstance(problem, AssertionError) else f"{type(problem).__name__}: "
            say(check=name, state="failed", fault=f"{kind}{problem}"[:600])
            faults += 1
            if devices.ruined(device):
                return RUINED
            if faults == MAX_FAULTS:
                return 1
            continue
        say(check=name, state="passed", error=error, seconds=round(time.monotonic() - begin, 2))
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    backend, device, dtype, family, *names = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic algorithms
    torch.set_num_threads(1)  # several of these processes run concurrently
    capability = (0, 0)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)
        capability = torch.cuda.get_device_capability(device)
    found = {name: c for name, c in suite(family, backend, capability).items() if takes(name, dtype)}
    unknown = [name for name in names if name not in found]
    if unknown:
        print(f"suite: {family} in {dtype} has no check {unknown[0]!r}", file=sys.stderr)
        return 2
    chosen = {name: found[name] for name in names} if names else found
    return run_checks(chosen, cast(BackendName, backend), getattr(torch, dtype), device)


if __name__ == "__main__":
    sys.exit(main())
