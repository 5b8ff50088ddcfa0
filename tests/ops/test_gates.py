"""The diagonal form and the dense gate: values, gradients of every order, transforms, messages.

One file for both, though a long one: every test takes both forms through the same calls.
"""

import re

import pytest
import torch
from helpers import Spy
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.testing.checks import call_gate as call
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values
from mi_kernels.testing.checks import reference_gate as reference
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import (
    GATE_MIDDLE,
    GATE_ODD,
    GATE_PAIR,
    GATE_TERMS,
    GATE_THREADED,
    GateSample,
    Shape,
    gates,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = tuple(GATE_TERMS)
TINY = Shape("tiny", (2,), 2, 3, 3)
TINY_SHARED = Shape("shared", (2, 2), 2, 3, 3, context_batch=(2, 1))
SHARED = Shape("shared", (2, 3), 2, 4, 4, context_batch=(2, 1))


def of_present(function, sample, **options):
    """The function of its present tensors alone."""
    there = [t is not None for t in sample.arguments(torch.float32)]

    def called(*tensors):
        tensors = iter(tensors)
        return function(*(next(tensors) if t else None for t in there), **options)

    return called


def cases():
    """Every case in float32 and bfloat16; the other dtypes take the odd shape and the long one."""
    for op in OPS:
        for sample in gates(op):
            every = sample.shape in (GATE_ODD, GATE_THREADED) and sample.terms in ("AC", "WU", GATE_TERMS[op])
            for dtype in FLOATS if every else (torch.float32, torch.bfloat16):
                yield pytest.param(sample, dtype, id=f"{sample}-{dtype}")


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize(("sample", "dtype"), list(cases()), scope="module")
def test_error_rule(sample, dtype, place):
    def draw(seed):
        return sample.arguments(dtype, place.device, seed)

    y = call(sample.op)(*draw(0), **sample.options)
    assert y.dtype == dtype and y.shape == (*sample.shape.lead, sample.shape.width)
    assert y.is_contiguous()
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_second_order_is_as_exact_as_pytorch(op, dtype, place):
    sample = GateSample(op, GATE_MIDDLE, GATE_PAIR[op])
    check_second_order(sample, dtype, place.device)


# Where contexts are shared, the diagonal form has the derivatives of modulation, which are in its own tests.
CHECKED = [
    (op, shape, name)
    for op in OPS
    for shape in (TINY, TINY_SHARED)
    for name in activations.NAMES
    if (op, shape) != ("diagonal", TINY_SHARED) or name in ("sigmoid", "softmax")
]


@pytest.mark.parametrize(("op", "shape", "name"), CHECKED, ids=lambda value: getattr(value, "name", value))
def test_gradcheck(op, shape, name, place):
    terms = "AaCc" if (op, shape) == ("diagonal", TINY_SHARED) else GATE_TERMS[op]
    sample = GateSample(op, shape, terms, activation=name)
    inputs = [t for t in sample.arguments(torch.float64, place.device, requires_grad=True) if t is not None]
    function = of_present(call(op), sample, **sample.options)
    full = name in ("sigmoid", "softmax")
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True} if full else {}
    assert gradcheck(function, inputs, check_forward_ad=True, check_undefined_grad=True, **batched)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("terms", ["A", "AC", "Ac", "AaG", "W", "U", "V", "c"])
def test_gradcheck_of_terms(terms, place):
    op = "diagonal" if "A" in terms else "gated_interaction"
    sample = GateSample(op, TINY, terms)
    inputs = [t for t in sample.arguments(torch.float64, place.device, requires_grad=True) if t is not None]
    function = of_present(call(op), sample, **sample.options)
    zero = {"check_undefined_grad": False} if terms == "c" else {}
    assert gradcheck(lambda x, z, *w: function(x, z, *w) + 0 * z.sum(), inputs, check_forward_ad=True, **zero)
    assert gradgradcheck(lambda x, z, *w: function(x, z, *w) + 0 * z.sum(), inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("op", OPS)
def test_third_order(op, name, place):
    sample = GateSample(op, GATE_ODD, GATE_TERMS[op], activation=name)

    def third(function, seed=3):
        tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
        value = function(*tensors, **sample.options).pow(3).sum()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(
                (g * torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device)).sum()
                for g in grads
            )
        return value

    torch.testing.assert_close(third(call(op)), third(reference(op)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("mapped", ["x", "z", "xz", "weights", "all", "one"])
@pytest.mark.parametrize("op", OPS)
def test_vmap_and_per_sample_gradients(op, mapped, place):
    sample = GateSample(op, TINY, GATE_TERMS[op])
    tensors = list(sample.arguments(torch.float64, place.device))
    chosen = {"x": [0], "z": [1], "xz": [0, 1], "weights": range(2, len(tensors)), "one": [3]}
    in_dims = [None] * len(tensors)
    for index in chosen.get(mapped, range(len(tensors))):
        in_dims[index] = index % 2
        tensors[index] = torch.stack([tensors[index], 2 * tensors[index], -tensors[index]], index % 2)
    every = tuple(range(len(tensors)))

    def loss(function):
        return lambda *t: function(*t, **sample.options).pow(2).sum()

    for transform in (
        lambda f: f,
        lambda f: torch.func.grad(f, every),
        lambda f: torch.func.jacrev(torch.func.grad(f, 1), 1),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f, 1), 1),
    ):
        found = torch.func.vmap(transform(loss(call(op))), tuple(in_dims))(*tensors)
        expected = torch.func.vmap(transform(loss(reference(op))), tuple(in_dims))(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_shared_contexts_are_computed_once(place):
    """The products have as many rows as there are contexts."""
    sample = GateSample("diagonal", SHARED, "AaCc")
    x, z, *weights, _ = sample.arguments(torch.float32, place.device)
    with Spy() as spy:
        mi.diagonal(x, z, *weights)
    assert spy.names == ["interaction", "interaction", "modulate"]
    assert all(arguments[1].shape == (2, 2) for name, arguments in spy.calls if name == "interaction")
    with Spy() as spy:
        mi.diagonal(x, z.expand(2, 3, 2), *weights)
    assert spy.names == ["diagonal"]


@pytest.mark.parametrize("lead", [(), (2, 1)], ids=["one-in-all", "one-per-sequence"])
def test_shared_contexts_without_features(lead, place):
    """Gate and shift are the biases alone."""
    x, bias = torch.randn(2, 5, 4, device=place.device), torch.randn(4, device=place.device)
    z, empty = torch.zeros(*lead, 0, device=place.device), torch.zeros(4, 0, device=place.device)
    assert torch.equal(mi.diagonal(x, z, empty, bias), bias * x)
    torch.testing.assert_close(mi.diagonal(x, z, empty, bias, empty, bias), bias * x + bias)


@pytest.mark.parametrize("op", OPS)
def test_the_inputs_and_the_gate_are_saved(op, place):
    tensors = GateSample(op, GATE_ODD, GATE_TERMS[op]).arguments(
        torch.float32, place.device, requires_grad=True
    )
    addresses = {t.data_ptr() for t in tensors}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        call(op)(*tensors)
    kept = [t for t in saved if t.data_ptr() not in addresses]
    assert len(saved) > len(kept) and [t.shape for t in kept] == [tensors[0].flatten(0, -2).shape]


@pytest.mark.parametrize("op", OPS)
def test_extra_memory_is_y_alone(op):
    if backends.why_not("cpu") is not None:
        pytest.skip(backends.why_not("cpu"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    sample = GateSample(op, Shape("large", (20000,), 32, 64, 64), GATE_TERMS[op][:4])
    tensors = sample.arguments(torch.float32)
    call(op)(*tensors)
    assert peak_memory(lambda: call(op)(*tensors)) <= 20000 * 64 * 4 + (1 << 20)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "shape", [GATE_THREADED, Shape("batch", (3000,), 24, 40, 40), Shape("few", (3,), 24, 200, 200)], ids=str
)
@pytest.mark.parametrize("op", OPS)
def test_threads_change_no_bit(op, shape, name, dtype, place):
    sample, results = GateSample(op, shape, GATE_TERMS[op], activation=name), []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads if place.backend == "cpu" else 1)
        leaves = sample.arguments(dtype, place.device, requires_grad=True)
        y = call(op)(*leaves, **sample.options)
        results.append([y, *torch.autograd.grad(y, leaves, sample.cotangent(dtype, place.device))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, portable):
    overload = getattr(torch.ops.mi_kernels, f"{op}_portable" if portable else op).default
    for terms in (GATE_TERMS[op], GATE_TERMS[op][:1]):
        tensors = GateSample(op, GATE_MIDDLE, terms).arguments(torch.float32)
        x, z = tensors[0].flatten(0, -2), tensors[1].flatten(0, -2)
        scalars = ("sigmoid", 0.5) if op == "diagonal" else ("softmax",)
        for keep_gate in (False, True):
            torch.library.opcheck(overload, (x, z, *tensors[2:], *scalars, keep_gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overflow_on_the_way(dtype, place):
    """z x leaves the range of the dtype, times 0 it is NaN; the gate itself is finite."""
    x = torch.full((3, 4), 1e20, device=place.device, dtype=dtype)
    z = torch.full((3, 2), 1e20, device=place.device, dtype=dtype)
    w = torch.zeros(4, 2, 4, device=place.device, dtype=dtype)
    assert mi.gated_interaction(x, z, w).eq(x / 2).all()
    w[:, 0, 0], w[:, 0, 1] = 1, -1  # z x W is Inf and -Inf
    assert mi.gated_interaction(x, z, w).eq(x / 2).all()
    w.zero_()
    w[:, 0, 0], w[:, 0, 1] = 1e-3, 1e-3
    assert mi.gated_interaction(x, z, w, activation="sigmoid").eq(x).all()


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("op", OPS)
def test_softmax_of_large_logits(op, rows, offset, place):
    """Their exponentials overflow or vanish, those of differences do not; and 13 features fill no vector."""
    sample = GateSample(op, Shape("large", (rows,), 6, 13, 13), GATE_TERMS[op], activation="softmax")
    tensors = sample.arguments(torch.float32, place.device)
    tensors[sample.names.index("bias")].add_(offset)
    expected = reference(op)(*(t.double() for t in tensors), **sample.options)
    found = call(op)(*tensors, **sample.options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf(op, value, place):
    """Where they depend on it. Inf may also become NaN in the dense sums, by the order of summation."""
    if (op, value) == ("gated_interaction", float("inf")):
        return
    sample = GateSample(op, GATE_ODD, GATE_TERMS[op], activation="tanh")
    for index in range(len(sample.names)):
        tensors = sample.arguments(torch.float32, place.device)
        tensors[index].view(-1)[-1] = value
        expected = reference(op)(*tensors, **sample.options)
        found = call(op)(*tensors, **sample.options)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())


SIZES = {
    "diagonal": {
        "x": (4, 5),
        "z": (4, 3),
        "weight": (5, 3),
        "bias": (5,),
        "shift_weight": (5, 3),
        "shift_bias": (5,),
        "weight_x": (5, 5),
    },
    "gated_interaction": {
        "x": (4, 5),
        "z": (4, 3),
        "weight": (5, 3, 5),
        "weight_z": (5, 3),
        "weight_x": (5, 5),
        "bias": (5,),
    },
}
EVERY = [(op, name) for op, sizes in SIZES.items() for name in sizes]
WEIGHTS = [(op, name) for op, name in EVERY if name not in ("x", "z")]


def broken(op, changed, error, message, **options):
    arguments = {name: torch.ones(sizes) for name, sizes in SIZES[op].items()} | changed
    with Spy() as spy, pytest.raises(error, match=message):
        getattr(mi, op)(**arguments, **options)
    assert spy.names == []


@pytest.mark.parametrize(("op", "name"), EVERY)
def test_messages_about_tensors(op, name):
    broken(op, {name: [1.0]}, TypeError, f"^{op}: {name}: expected a torch.Tensor, got list$")
    sparse = torch.ones(SIZES[op][name]).to_sparse()
    broken(op, {name: sparse}, TypeError, rf"^{op}: {name}: expected a dense \(strided\) tensor")
    if name != "x":
        wrong = {name: torch.ones(SIZES[op][name]).double()}
        broken(op, wrong, TypeError, rf"^{op}: {name}: expected torch.float32 \(the dtype of x\)")
        wrong = {name: torch.ones(SIZES[op][name], device="meta")}
        broken(op, wrong, ValueError, f"^{op}: {name}: expected device cpu .*, got meta$")


@pytest.mark.parametrize(("op", "name"), WEIGHTS)
def test_messages_about_sizes(op, name):
    right = SIZES[op][name]
    for axis, size in enumerate(right):
        for delta in (-1, 1):
            wrong = [*right[:axis], size + delta, *right[axis + 1 :]]
            message = rf"^{op}: {name}: expected shape \[.*={size}.*\], got {re.escape(str(wrong))}$"
            broken(op, {name: torch.ones(wrong)}, ValueError, message)
    ranks = ((2, *right), (1, 1, *right)) if len(right) == 1 else (right[1:], (1, *right))
    for wrong in ranks:  # a scalar and a row are a bias
        message = rf"^{op}: {name}: expected shape \[.*\], got {re.escape(str(list(wrong)))}$"
        broken(op, {name: torch.ones(wrong)}, ValueError, message)


@pytest.mark.parametrize("op", OPS)
def test_other_messages(op):
    integers = {name: torch.ones(sizes).long() for name, sizes in SIZES[op].items()}
    broken(op, integers, TypeError, f"^{op}: x: expected a dtype of float64, .*, got torch.int64$")
    broken(op, {"x": torch.tensor(1.0)}, ValueError, rf"^{op}: x: expected at least 1 dimension\(s\)")
    broken(op, {"z": torch.ones(3, 3)}, ValueError, f"^{op}: z: expected leading dimensions that broadcast")
    names = ", ".join(activations.NAMES)
    message = f"^{op}: activation: expected one of {names}, got 'swish'$"
    broken(op, {}, ValueError, message, activation="swish")
    if op == "diagonal":
        message = "^diagonal: scale_offset: expected a float, got NoneType$"
        broken(op, {}, TypeError, message, scale_offset=None)
        broken(op, {"weight": None}, TypeError, "^diagonal: weight: expected a torch.Tensor, got NoneType$")
    else:
        nothing = dict.fromkeys(("weight", "weight_z", "weight_x", "bias"))
        broken(op, nothing, ValueError, f"^{op}: expected at least one of weight, .*, got None for all$")


@pytest.mark.parametrize("op", OPS)
def test_autocast(op, place):
    sample = GateSample(op, GATE_MIDDLE, GATE_TERMS[op])
    tensors = sample.arguments(torch.float32, place.device, requires_grad=True)
    with torch.autocast(place.device, torch.bfloat16):
        y = call(op)(*tensors, **sample.options)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call(op)(*(t.bfloat16() for t in tensors), **sample.options))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("op", OPS)
def test_explain(op, place):
    tensors = GateSample(op, GATE_MIDDLE, GATE_TERMS[op]).arguments(
        torch.float32, place.device, requires_grad=True
    )
    plan = call(op, lambda *a, **o: mi.explain(op, *a, **o))(*tensors, activation="tanh")
    assert (plan.op, plan.backend) == (op, place.backend)
    inputs = ["input_grads"] * (2 if op == "diagonal" else 1)  # dz of gate and shift is a product of its own
    assert [step.op for step in plan.backward] == ["gate_grads", *inputs, "weight_grads"]
    assert plan.operations > 0 and op in str(plan)
