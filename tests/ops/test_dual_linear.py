"""The kernels of glu and low_rank: both ways of the CPU, layouts of weights, memory, bits, transforms.

Over 400 lines: all of it is about one primitive, and shares the samples that lead to each of its ways.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import COMPILE, Spy, with_gradients
from torch.nn.functional import linear, pad

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.ops.dual_linear import reference
from mi_kernels.testing.checks import check_form_gradients, check_form_values, form_of
from mi_kernels.testing.dual_samples import GLU, LOW_RANK, DualSample
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import THREADED, Shape

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIB = 1 << 20
needs_cpu = pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")

# Rows enough to pack weights that are contiguous along K, and outputs that fill the lanes: one pass.
TALL = Shape("tall", (150,), 60, 70, 101)
# Outputs that leave lanes empty: both products of a block of rows, of which there are two.
SEVERAL = Shape("several-blocks", (4000,), 4, 3, 3)
# Sums of several parts, on either side.
LONG_X, LONG_Z = Shape("long-x", (50,), 30, 1500, 32), Shape("long-z", (50,), 1500, 30, 32)

ONE_PASS = (
    DualSample("glu", TALL, "Ga", activation="silu"),
    DualSample("glu", TALL, "GaVc", activation="gelu"),
    DualSample("glu", TALL, "Ga", activation="tanh", gate_first=False),
    DualSample("low_rank", TALL, "AC", activation="silu", other="tanh"),
    DualSample("low_rank", TALL, "AC", activation="gelu", other="hardswish", ranks=3),
    DualSample("low_rank", TALL, "ACPUVc", activation="sigmoid", rank=48),
)
BLOCKS = (
    DualSample("glu", THREADED, "GaVc", activation="mish"),
    DualSample("low_rank", THREADED, "AC", activation="softplus", other="quick_gelu", ranks=2),
    DualSample("low_rank", SEVERAL, "AC", activation="identity", ranks=24),
    DualSample("low_rank", Shape("few-rows", (3,), 64, 64, 32), "AC", activation="relu", other="gelu_tanh"),
)
# Of the weights of both products: contiguous along the outputs; one above the other in one tensor; columns of
# a wider tensor. What is not theirs is NaN.
LAYOUTS = ("along the outputs", "halves", "columns")


def laid_out(weights, layout):
    if layout == "along the outputs":
        return [t.mT.contiguous().mT for t in weights]
    if layout == "halves":
        most = max(t.shape[-1] for t in weights)
        halves = torch.cat([pad(t, (0, most - t.shape[-1]), value=math.nan) for t in weights])
        parts = halves.split([len(t) for t in weights])
        return [part[..., : t.shape[-1]] for part, t in zip(parts, weights, strict=True)]
    return [pad(t, (2, 3), value=math.nan)[..., 2 : 2 + t.shape[-1]] for t in weights]


def arguments(sample, layout, dtype, device="cpu", seed=0):
    """Those of the sample, its two weights in a layout."""
    tensors = list(sample.arguments(dtype, device, seed))
    where = [i for i in ((1, 3) if sample.op == "glu" else (2, 3)) if tensors[i] is not None]
    for i, weight in zip(where, laid_out([tensors[i] for i in where], layout), strict=True):
        tensors[i] = weight
    return tensors


def algorithm(sample, tensors):
    """What explain says of the call."""
    options = dict(sample.options)
    if sample.op == "glu":
        *tensors, options["weight_value"], options["bias_value"] = tensors
    return mi.explain(sample.op, *tensors, **options)


def check(sample, dtype, device, draw, name, gradients=True):
    form = form_of(sample)
    check_form_values(form, draw, ("values", sample, dtype, device, name))
    if not gradients:
        return
    check_form_gradients(
        form,
        lambda seed: (sample.cotangent(dtype, device, seed + 1000), *draw(seed)),
        oracle=("gradients", sample, dtype, device, name),
    )


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", (*ONE_PASS, *BLOCKS), ids=str, scope="module")
def test_error_rule_of_both_ways(sample, dtype, place):
    if place.backend == "cpu":
        found = algorithm(sample, sample.arguments(dtype)).algorithm
        assert found == ("one_pass" if sample in ONE_PASS else "blocks")
    draw = partial(sample.arguments, dtype, place.device)
    check(sample, dtype, place.device, draw, None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("layout", LAYOUTS, scope="module")
@pytest.mark.parametrize(
    "sample", (ONE_PASS[1], ONE_PASS[3], ONE_PASS[4], *BLOCKS[:2]), ids=str, scope="module"
)
def test_error_rule_of_layouts(sample, layout, dtype, place):
    draw = partial(arguments, sample, layout, dtype, place.device)
    check(sample, dtype, place.device, draw, layout)


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("shape", [LONG_X, LONG_Z], ids=lambda shape: shape.name, scope="module")
def test_error_rule_of_long_sums(shape, dtype, ranks, place):
    """One pass whose sums have several parts, of which those of one side end first."""
    sample = DualSample("low_rank", shape, "AC", activation="tanh", ranks=ranks)
    draw = partial(arguments, sample, "along the outputs", dtype, place.device)
    if place.backend == "cpu":
        assert algorithm(sample, draw()).algorithm == "one_pass"
    check(sample, dtype, place.device, draw, "long")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", activations.ELEMENTWISE)
def test_error_rule_of_activations_in_one_pass(name, dtype, place):
    """Where they saturate, with outputs that end within a vector.

    The rule knows no rounded sum on the other side of a kink, of which there are some among so many in 16
    bits: there the values alone.
    """
    sample = DualSample("glu", Shape("tall", (100,), 1, 24, 61), "GaVc", activation=name)

    def draw(seed):
        x, *others = sample.arguments(dtype, place.device, seed)
        return x * 3, *others

    if place.backend == "cpu":
        assert algorithm(sample, draw(0)).algorithm == "one_pass"
    smooth = name not in ("relu", "hardsigmoid", "hardswish") or dtype.itemsize > 2
    check(sample, dtype, place.device, draw, "saturated", smooth)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sample", (*ONE_PASS, *BLOCKS), ids=str)
def test_threads_change_no_bit(sample, dtype, place):
    if place.backend != "cpu":
        pytest.skip("PyTorch's products depend on the number of threads")
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        tensors = sample.arguments(dtype, requires_grad=True)
        y = form_of(sample).function(*tensors)
        leaves = [t for t in tensors if t is not None]
        results.append([y, *torch.autograd.grad(y, leaves, sample.cotangent(dtype))])
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def of_primitive(sample, dtype, device="cpu"):
    """x, z, A and C of the primitive."""
    tensors = sample.arguments(dtype, device)
    if sample.op == "low_rank":
        return (*tensors[:2], *(t if t.dim() == 2 else t.flatten(0, 1) for t in tensors[2:4]))
    x, weight, _, value, _ = tensors
    return (x, None, *(weight.chunk(2) if value is None else (weight, value)))


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sample", (*ONE_PASS, *BLOCKS), ids=str)
def test_kept_products(sample, dtype):
    """They are the rounded sums, and keeping them changes no bit of y."""
    x, z, first, second = of_primitive(sample, dtype)
    names = sample.activation, "identity" if sample.op == "glu" else sample.other
    call = partial(torch.ops.mi_kernels.dual_linear, x, z, first, second, None, None, *names)
    ranks = sample.ranks or 1
    (y, none, nor), (same, p, q) = call(ranks, False), call(ranks, True)
    assert none.shape == nor.shape == (0, len(first)) and torch.equal(y, same)
    for kept, tensor, weight in ((p, x, first), (q, x if z is None else z, second)):
        exact = linear(tensor.double(), weight.double())
        assert (kept.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def used(function, device):
    """Bytes at most, on a second call. Filling uninitialised memory takes none, but time."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    function()
    return peak_memory(function, device)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(2048, 48), (1500, 2100)], ids=["one_pass", "blocks"])
def test_memory(rows, width, dtype):
    """Inference stores neither product; training what backward needs, both of them and no more."""
    sample = DualSample("glu", Shape("memory", (rows,), 1, width, 1040), "Ga")
    x, weight, bias, *_ = sample.arguments(dtype)
    result = rows * 1040 * dtype.itemsize
    slack = (5 * MIB // 2) * dtype.itemsize  # packed weights of the threads, blocks of both products
    assert slack < 2 * result * (1 if rows == 2048 else 2)
    with mi.backend("cpu"):
        assert used(lambda: mi.glu(x, weight, bias), "cpu") <= result + slack
        x.requires_grad_()
        assert used(lambda: mi.glu(x, weight, bias), "cpu") <= 3 * result + slack


@needs_cpu
@pytest.mark.parametrize("sample", (ONE_PASS[0], ONE_PASS[4], *BLOCKS[:3]), ids=str)
def test_scratch_is_what_explain_says(sample):
    tensors = sample.arguments(torch.float32)
    torch.set_num_threads(1)
    with mi.backend("cpu"):
        plan = algorithm(sample, tensors)
        total = used(lambda: form_of(sample).function(*tensors), "cpu")
    y = 4 * math.prod(form_of(sample).function(*tensors).shape)
    if plan.algorithm == "one_pass":
        assert total - y == plan.scratch
    else:  # and the scratch of each of both products
        assert plan.scratch <= total - y <= plan.scratch + 2 * MIB


def test_what_is_kept_for_backward_of_terms(place):
    """Both products of all terms, and P's argument: their sum."""
    sample = ONE_PASS[5]
    tensors = sample.arguments(torch.float32, place.device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        form_of(sample).function(*tensors)
    known = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    own = [t for t in saved if t.numel() and t.untyped_storage().data_ptr() not in known]
    assert sorted({t.data_ptr(): list(t.shape) for t in own}.values()) == [[150, 48]] * 3


def test_calls_of_a_packed_weight(place):
    """One call forward; backward one for the gradients of both products, one product each for dx and dW."""
    x, weight, bias, *_ = GLU.arguments(torch.float32, place.device, requires_grad=True)
    with Spy() as spy:
        y = mi.glu(x, weight, bias)
    assert spy.names == ["dual_linear"]
    with Spy() as spy:
        y.sum().backward()
    assert spy.names[0] == "dual_linear_grads"
    assert spy.names[1:] in (
        ["cpu_linear_grads"],
        ["interaction_input_grads", "interaction_weight_grads"],
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sample", [ONE_PASS[0], replace(GLU, activation="silu")], ids=str)
def test_halves_in_either_order_are_the_same_bits(sample, dtype, place):
    x, weight, bias, *_ = sample.arguments(dtype, place.device, requires_grad=True)
    turned = [torch.cat(t.chunk(2)[::-1]) for t in (weight, bias)]
    first, second = mi.glu(x, weight, bias), mi.glu(x, *turned, gate_first=False)
    assert torch.equal(first, second)
    grad = sample.cotangent(dtype, place.device)
    both = [torch.autograd.grad(y, (x, weight, bias), grad) for y in (first, second)]
    for one, other in zip(*both, strict=True):
        scale = one.double().norm()
        assert (one.double() - other.double()).norm() <= 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sample", (ONE_PASS[0], ONE_PASS[4], *BLOCKS), ids=str)
def test_nan_stays_where_it_belongs(sample, dtype, place):
    """A row of x, a row of a weight; of infinities what PyTorch makes of them."""
    tensors = sample.arguments(dtype, place.device)
    factor = tensors[1 if sample.op == "glu" else 2]
    tensors[0][2, -1], factor.reshape(-1, factor.shape[-1])[5, 0] = math.nan, math.nan
    found, form = form_of(sample).function(*tensors), form_of(sample)
    assert torch.equal(
        found.isnan(), form.reference(*(None if t is None else t.double() for t in tensors)).isnan()
    )
    bad = torch.zeros_like(found, dtype=torch.bool)
    bad[2], bad[:, 5 % bad.shape[1]] = True, True
    assert torch.equal(found.isnan(), bad)


def test_factors_of_terms_are_those_of_einsum(place):
    """MUTAN: [S, R, X], the term first."""
    x, z, a, c = (
        torch.randn(s, dtype=torch.float64, device=place.device)
        for s in ((7, 5), (7, 4), (3, 6, 5), (3, 6, 4))
    )
    expected = torch.einsum("bj,srj,bi,sri->br", x, a, z, c)
    torch.testing.assert_close(mi.low_rank(x, z, a, c), expected)
    activated = torch.einsum(
        "bsr,bsr->br", torch.einsum("bj,srj->bsr", x, a).tanh(), torch.einsum("bi,sri->bsr", z, c)
    )
    torch.testing.assert_close(mi.low_rank(x, z, a, c, activation_x="tanh"), activated)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, 0), (1, None, 2), (None, 1, None)], ids=str)
@pytest.mark.parametrize("inner", [None, 0])
def test_nested_vmap_of_inputs_and_weights(in_dims, inner, place):
    """In another vmap, over the weight."""
    tensors = []
    for size, dim in zip(((4, 5), (4, 3), (6, 5)), in_dims, strict=True):
        size = list(size)
        if dim is not None:
            size.insert(dim, 2)
        tensors.append(torch.randn(size, dtype=torch.float64, device=place.device))
    factor = torch.randn((*((3,) if inner == 0 else ()), 6, 3), dtype=torch.float64, device=place.device)

    def mapped(function):
        def one(*given):
            y = partial(function, activation_x="tanh", activation_z="silu")
            if inner == 0:
                return torch.vmap(y, (None, None, None, 0))(*given, factor)
            return y(*given, factor)

        return torch.vmap(one, in_dims)(*tensors)

    torch.testing.assert_close(mapped(mi.low_rank), mapped(reference.low_rank), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sample", [GLU, replace(GLU, terms="GaVc"), LOW_RANK], ids=str)
def test_autocast_is_the_call_in_its_dtype(sample, place):
    tensors = sample.arguments(torch.float32, place.device, requires_grad=True)
    call = form_of(sample).function
    with torch.autocast(place.device, torch.bfloat16):
        y = call(*tensors)
    low = call(*(None if t is None else t.bfloat16() for t in tensors))
    assert y.dtype == torch.bfloat16 and torch.equal(y, low)
    grads = torch.autograd.grad(y.float().sum(), [t for t in tensors if t is not None])
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("sample", [GLU, LOW_RANK], ids=str)
def test_backends_by_name(sample):
    tensors = sample.arguments(torch.float64)
    form, called = (
        form_of(sample),
        {"reference": None, "portable": "dual_linear_portable", "cpu": "dual_linear"},
    )
    for name, operation in called.items():
        if backends.why_not(name) is None:
            with mi.backend(name), Spy() as spy:
                torch.testing.assert_close(form.function(*tensors), form.reference(*tensors))
            assert spy.raw[:1] == ([] if operation is None else [operation])


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("sample", [GLU, replace(GLU, terms="GaVc"), LOW_RANK], ids=str)
def test_compiled_for_all_numbers_of_rows(sample, place):
    """Forward and backward in the bits of the eager call."""
    compiled = torch.compile(form_of(sample).function, backend="aot_eager", **COMPILE)
    for rows in (7, 2, 64):
        given = replace(sample, shape=replace(sample.shape, batch=(rows,)))
        tensors = given.arguments(torch.float32, place.device)
        expected = with_gradients(form_of(given).function, tensors)
        torch.testing.assert_close(with_gradients(compiled, tensors), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
def test_exported_modules_take_any_number_of_rows(strict, place):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = mi.nn.GatedMLP(5, hidden_features=6, bias=True)
            sizes = {"context_features": 5, "out_features": 3, "rank": 8}
            self.fuse = mi.nn.LowRankInteraction(5, activation_x="tanh", **sizes)

        def forward(self, x):
            return self.fuse(x, self.mlp(x))

    model, rows = Model().to(place.device), torch.export.Dim("rows", min=2, max=4096)
    x = torch.randn(4, 5, device=place.device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict)
    for count in (2, 90):
        x = torch.randn(count, 5, device=place.device)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_explain_counts_what_the_formula_says(place):
    """By hand: 6 rows, X = 4, H = 5; and 6 rows, X = 4, Z = 3, R = 7, O = 2, two terms."""
    x, weight, bias = (torch.ones(s, device=place.device) for s in ((2, 3, 4), (10, 4), (10,)))
    plan = mi.explain(mi.glu, x, weight, bias)
    assert (plan.op, plan.backend, plan.backward) == ("glu", place.backend, ())
    assert plan.bytes == 4 * (6 * 4 + 10 * 4 + 10 + 6 * 5)
    assert plan.operations == 2 * 6 * 10 * 4 + 2 * 6 * 5
    z, a, c, p = (torch.ones(s, device=place.device) for s in ((2, 3, 3), (2, 7, 4), (2, 7, 3), (2, 7)))
    plan = mi.explain(mi.low_rank, x, z, a, c, p)
    assert plan.bytes == 4 * (6 * 4 + 6 * 3 + 14 * 4 + 14 * 3 + 14 + 6 * 2)
    assert plan.operations == 2 * 6 * (14 * (4 + 3) + 2 * 7) + 2 * 6 * 14
    plan = mi.explain(mi.low_rank, x, z[..., :0], a, c[..., :0], p)
    assert plan.operations == 2 * 6 * (14 * 4 + 2 * 7) + 2 * 6 * 14


def test_modules(place):
    for first in (True, False):
        layer = mi.nn.GLU(7, out_features=5, activation="gelu", gate_first=first, dtype=torch.float64)
        torch.nn.init.normal_(layer.bias)
        layer.to(place.device)
        x = torch.randn(3, 7, dtype=torch.float64, device=place.device)
        gate, value = linear(x, layer.weight, layer.bias).chunk(2, -1)[:: 1 if first else -1]
        torch.testing.assert_close(layer(x), torch.nn.functional.gelu(gate) * value)
    mlp = mi.nn.GatedMLP(7, hidden_features=5, out_features=4, bias=True, device=place.device)
    x = x.float()
    hidden = mi.glu(x, mlp.glu.weight, mlp.glu.bias)
    torch.testing.assert_close(mlp(x), linear(hidden, mlp.down.weight, mlp.down.bias))


RANKS = {"cp": 9, "tucker": (4, 3, 2), "blocks": (2, 2, 2)}


@pytest.mark.parametrize("core", RANKS)
def test_cores_are_their_dense_weight(core, place):
    """Of a layer with all terms: the interaction with to_dense()."""
    options = {"blocks": 3} if core == "blocks" else {}
    layer = mi.nn.LowRankInteraction(
        5,
        context_features=4,
        out_features=6,
        rank=RANKS[core],
        core=core,
        weight_z=True,
        weight_x=True,
        device=place.device,
        dtype=torch.float64,
        **options,
    )
    torch.nn.init.normal_(layer.bias)
    x, z = (torch.randn(3, n, dtype=torch.float64, device=place.device) for n in (5, 4))
    dense = layer.to_dense()
    assert dense.shape == (6, 4, 5)
    expected = mi.interaction(x, z, dense, layer.weight_z, layer.weight_x, layer.bias)
    torch.testing.assert_close(layer(x, z), expected)
    found = torch.autograd.grad(layer(x, z).sin().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(expected.sin().sum(), list(layer.parameters())))


@pytest.mark.parametrize(("core", "rank"), [("cp", 2), ("tucker", (4, 3, 2))])
def test_from_dense_finds_a_weight_of_the_rank(core, rank):
    """Exactly, of the layer that made it: CP as far as the sweeps go, Tucker to the last digits."""
    made = mi.nn.LowRankInteraction(
        5, context_features=4, out_features=6, rank=rank, core=core, dtype=torch.float64
    )
    weight = made.to_dense().detach()
    layer = mi.nn.LowRankInteraction.from_dense(weight, rank, core=core)
    error = {"cp": 1e-4, "tucker": 1e-12}[core]
    assert (layer.to_dense() - weight).norm() <= error * weight.norm()
    assert layer.bias is None and layer.weight_z is None and layer.weight_x is None


def test_from_dense_with_all_terms():
    """Of a rank that holds any weight, in the layer's dtype; U, V and c as they are."""
    weight, u, v, c = (torch.randn(s) for s in ((3, 2, 4), (3, 2), (3, 4), (3,)))
    layer = mi.nn.LowRankInteraction.from_dense(
        weight, (3, 2, 4), core="tucker", weight_z=u, weight_x=v, bias=c
    )
    x, z = torch.randn(5, 4), torch.randn(5, 2)
    torch.testing.assert_close(layer(x, z), mi.interaction(x, z, weight, u, v, c))
    for own, given in ((layer.weight_z, u), (layer.weight_x, v), (layer.bias, c)):
        assert torch.equal(own, given)


def test_from_dense_is_nearer_with_more_blocks():
    """A local minimum, but never worse than one block less."""
    weight = torch.randn(4, 3, 3, dtype=torch.float64)
    errors = []
    for blocks in (1, 2):
        layer = mi.nn.LowRankInteraction.from_dense(weight, 2, core="blocks", blocks=blocks)
        errors.append(float((layer.to_dense().detach() - weight).norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] < weight.norm()


def test_no_dense_weight_with_activations():
    layer = mi.nn.LowRankInteraction(5, context_features=4, out_features=6, rank=2, activation_z="tanh")
    with pytest.raises(ValueError, match="^to_dense: activation_z: expected identity, got 'tanh'$"):
        layer.to_dense()


@pytest.mark.parametrize("out", [1, 3, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_narrow_outputs_are_rows_at_once(out, dtype):
    """Rows shorter than a run, at sizes that leave a part of the last one; gradients have any strides."""
    generator = torch.Generator().manual_seed(out)
    p, q = torch.randn(2, 1500, out, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(out, 1500, generator=generator, dtype=torch.float64).to(dtype).mT
    for names in (("silu", "identity"), ("identity", "tanh"), ("sigmoid", "tanh")):
        portable = torch.ops.mi_kernels.dual_linear_grads_portable
        exact = portable(*(t.double() for t in (grad, p, q)), *names, 1)
        found = torch.ops.mi_kernels.dual_linear_grads(grad, p, q, *names, 1)
        limit = max(2 * relative_error(portable(grad, p, q, *names, 1), exact), 1e-12)
        assert relative_error(found, exact) <= limit


def test_an_odd_packed_weight_is_refused_while_compiling():
    compiled = torch.compile(lambda x, w: mi.glu(x, w), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="even number 2H"):
        compiled(torch.randn(4, 5), torch.randn(7, 5))


def test_a_large_rank_is_not_larger_than_all_there_is():
    """h [B, R] would be twice x: a part of the rows at a time."""
    x, z, a, c = torch.randn(4096, 64), torch.randn(4096, 64), torch.randn(512, 64), torch.randn(512, 64)
    out = torch.randn(16, 512)
    y = mi.low_rank(x, z, a, c, out)
    exact = ((x.double() @ a.double().mT) * (z.double() @ c.double().mT)) @ out.double().mT
    plain = ((x @ a.mT) * (z @ c.mT)) @ out.mT
    assert relative_error(y, exact) <= 2 * relative_error(plain, exact)
    peak = peak_memory(lambda: mi.low_rank(x, z, a, c, out), "cpu") - y.nbytes
    assert peak < 2 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quick_gelu_of_the_largest_numbers(dtype, place):
    t = torch.tensor([3e38, -3e38, 2e38, -2e38] * 5000, device=place.device).to(dtype).requires_grad_()
    (slope,) = torch.autograd.grad(mi.modulate(torch.ones_like(t), t, activation="quick_gelu").sum(), t)
    assert torch.equal(slope, (t > 0).to(dtype))
