"""Groups of unequal length: order, filling and plan of their products. Values are in test_hyper.py."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import mi_kernels as mi
from mi_kernels.functional.interaction import interaction_by
from mi_kernels.ops.interaction import reference
from mi_kernels.ops.interaction.by_segment import joined
from mi_kernels.ops.interaction.cost_model import FUSED, PER_Z
from mi_kernels.ops.interaction.segments import grouping
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.shared_samples import MIXED, TINY_RAGGED, Ragged


def test_vmap_over_the_numbers(place):
    x, z, *weights = TINY_RAGGED.arguments(torch.float64, place.device)
    ids = torch.stack([TINY_RAGGED.segment_ids(place.device), TINY_RAGGED.segment_ids(place.device).flip(0)])
    layers = mi.generate(z, *weights)
    found = torch.func.vmap(lambda i: mi.interaction(x, z, *weights, segment_ids=i))(ids)
    applied = torch.func.vmap(lambda i: mi.apply_generated(x, *layers, segment_ids=i))(ids)
    expected = torch.stack([reference.interaction(x, z[i], *weights) for i in ids])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(applied, expected)


@pytest.mark.parametrize("padding", [0, 3, 40, 10**9])
def test_groups_of_similar_length_are_one_call(padding):
    lengths = torch.tensor([7, 0, 1, 100, 8, 7, 0, 90, 1, 9])
    found = joined(lengths, padding)
    groups = torch.cat([part for part, _ in found])
    assert sorted(groups.tolist()) == lengths.nonzero().flatten().tolist()
    assert all((lengths[part] <= length).all() for part, length in found)
    padded = sum(len(part) * length for part, length in found) - int(lengths.sum())
    assert padded == 0 if padding == 0 else padded <= min(2 * padding * len(found), int(lengths.sum()))
    assert len(found) == {0: 6, 3: 4, 40: 3, 10**9: 3}[padding]


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_are_grouped_in_their_order(mixed, place):
    sample = Ragged("some", (3, 0, 5, 1), mixed=mixed)
    ids = sample.segment_ids(place.device)
    row_index, offsets = grouping(ids, 4)
    assert offsets.tolist() == [0, 3, 3, 8, 9]
    for group in range(4):
        rows = row_index[offsets[group] : offsets[group + 1]]
        assert torch.equal(rows, (ids == group).nonzero().flatten())


def test_rows_that_fill_up_are_in_no_result(place):
    """Zeros beside Inf would be NaN; neither values nor gradients of other rows may have it."""
    lengths = [3, 5, 4]
    ids = torch.repeat_interleave(torch.tensor(lengths)).to(place.device)
    leaves = [torch.ones(s, device=place.device, requires_grad=True) for s in ((12, 4), (3, 6, 4), (3, 6))]
    x, weight, bias = (t.detach().clone() for t in leaves)
    weight[0, 0, 0] = x[3] = float("inf")
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y = mi.apply_generated(x, weight, bias, segment_ids=ids)
    assert not y.isnan().any() and torch.equal(y.isinf().any(1).nonzero().flatten().cpu(), torch.arange(4))
    grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert not any(g.isnan().any() for g in grads)
    assert torch.equal(grads[2][:, 0].cpu(), torch.tensor(lengths).float())


def test_ragged_choice_and_explain(place):
    for sample, plan in ((Ragged("long", (300,) * 9, 32, 64, 64), PER_Z), (Ragged("short", (1,) * 9), FUSED)):
        arguments, ids = sample.arguments(torch.float32, place.device), sample.segment_ids(place.device)
        explained = mi.explain("interaction", *arguments, segment_ids=ids)
        assert explained.alternatives[0].plan == FUSED
        assert (explained.algorithm == PER_Z) == (plan == PER_Z)
        assert torch.equal(mi.interaction(*arguments, segment_ids=ids), interaction_by(plan, *arguments, ids))


def test_the_fused_plan_fills_nothing_up():
    """Neither what it is estimated at, for which it would lose here, nor the reference."""
    sample = Ragged("filled up", (3, 3, 3, 2, 2, 2, 2, 1) * 40, 64, 64, 64)
    (x, z, weight, *_), ids = sample.arguments(torch.float32), sample.segment_ids()
    explained = mi.explain("interaction", x, z, weight, segment_ids=ids)
    assert explained.alternatives[0].operations == 2 * 720 * 64**3
    assert explained.algorithm != PER_Z
    with mi.backend("reference"):
        applied = mi.explain("apply_generated", x, weight[:1].expand(320, 64, 64), segment_ids=ids)
    assert applied.operations == 2 * 720 * 64 * 64


class Sums(TorchDispatchMode):
    """Records the dtypes in which rows are added up by number."""

    def __init__(self):
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("index_add"):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", ["W", "U"])
def test_gradients_of_contexts_are_summed_in_float32(terms, dtype, place):
    """4096 + 1 + 1 + ... over the rows of a context that is repeated for each: in 16 bits every 1 is lost.

    Some releases of PyTorch add rows up in float32 anyway, on CPUs: so what is asked for is looked at too.
    """
    ids = torch.arange(8194, device=place.device) % 2
    x = torch.ones(8194, 1, dtype=dtype, device=place.device)
    z = torch.ones(2, 1, dtype=dtype, device=place.device, requires_grad=True)
    one = torch.ones(1, 1, dtype=dtype, device=place.device)
    weights = (one.unsqueeze(0),) if terms == "W" else (None, one)
    grad = torch.where(torch.arange(8194, device=place.device).unsqueeze(1) < 2, 4096 * x, x)
    y = interaction_by(FUSED, x, z, *weights, segment_ids=ids)
    with Sums() as sums:
        (dz,) = torch.autograd.grad(y, z, grad)
    assert dz.eq(8192).all() and sums.dtypes == [torch.float32]


def traced(mode, function, arguments):
    if mode == "jit":
        return torch.jit.trace(function, arguments, check_trace=False)
    return make_fx(function, tracing_mode=mode)(*arguments)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic", "jit"])
def test_tracers_do_not_freeze_the_numbers(mode, place):
    """Traced with some groups, run with others."""
    x, z, *weights = MIXED.arguments(torch.float64, place.device)
    ids = MIXED.segment_ids(place.device)
    other = ids.new_zeros(ids.shape)
    layers = mi.generate(z, *weights)
    run = traced(mode, lambda i, *a: mi.interaction(*a, segment_ids=i), (ids, x, z, *weights))
    expected = reference.interaction(x, z[other], *weights)
    torch.testing.assert_close(run(other, x, z, *weights), expected)
    run = traced(mode, lambda i, *a: mi.apply_generated(*a, segment_ids=i), (ids, x, *layers))
    torch.testing.assert_close(run(other, x, *layers), expected)


@pytest.mark.parametrize("number", [-1, 4])
def test_numbers_out_of_range_are_found_where_they_are_not_looked_at(number, fresh_compiler):
    """Inductor, and indexing with brackets, would count negative numbers from the end."""
    x, z, weight, layers = (torch.randn(*size) for size in ((4, 5), (4, 2), (6, 2, 5), (4, 6, 5)))
    bad = torch.tensor([0, number, 1, 2])
    for function, arguments in ((mi.interaction, (x, z, weight)), (mi.apply_generated, (x, layers))):

        def call(ids, function=function, arguments=arguments):
            return function(*arguments, segment_ids=ids)

        compiled = torch.compile(call, fullgraph=True)
        torch.testing.assert_close(compiled(bad.clamp(0, 3)), call(bad.clamp(0, 3)))
        with pytest.raises((RuntimeError, ValueError), match="out of bounds|values from 0 to"):
            compiled(bad)
        for backend in ("auto", "portable", "reference"):
            with mi.backend(backend), pytest.raises((IndexError, RuntimeError), match="out of"):
                torch.func.vmap(call)(torch.stack([bad, bad]))


def test_numbers_without_data():
    """Fake and meta tensors have shapes alone; so have the results and the plans."""
    tensors = [torch.randn(*size) for size in ((4, 5), (3, 2), (6, 2, 5), (3, 6, 5))]
    tensors.append(torch.zeros(4, dtype=torch.int64))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
    for x, z, weight, layers, ids in (fakes, [t.to("meta") for t in tensors]):
        assert mi.interaction(x, z, weight, segment_ids=ids).shape == (4, 6)
        assert mi.apply_generated(x, layers, segment_ids=ids).shape == (4, 6)
        assert mi.explain("interaction", x, z, weight, segment_ids=ids).operations == 2 * 4 * 6 * 2 * 5
        assert mi.explain("apply_generated", x, layers, segment_ids=ids).operations == 2 * 4 * 6 * 5


def test_explain_counts_the_same_for_equal_groups_either_way(place):
    sample = Ragged("equal", (300,) * 9, 32, 64, 64)
    x, z, *weights = sample.arguments(torch.float32, place.device, requires_grad=True)
    ragged = mi.explain(mi.interaction, x, z, *weights, segment_ids=sample.segment_ids(place.device))
    dense = mi.explain(mi.interaction, x.unflatten(0, (9, 300)), z.unsqueeze(1), *weights)
    for one, other in zip((ragged, *ragged.backward), (dense, *dense.backward), strict=True):
        found = (one.op, one.algorithm, one.operations, one.bytes)
        assert found == (other.op, other.algorithm, other.operations, other.bytes)


def test_memory_of_rows_in_any_order(place):
    """Besides the result: at most the rows of x once more."""
    if place.device != "cpu":
        pytest.skip("peak_memory measures the CPU's allocator")
    ids = torch.repeat_interleave(torch.tensor([1000, 990] * 20))
    ids = ids[torch.randperm(len(ids))]
    x, weight = torch.randn(len(ids), 64), torch.randn(40, 64, 64)
    peak = peak_memory(lambda: mi.apply_generated(x, weight, segment_ids=ids))
    assert peak <= 2 * x.nbytes  # the result has the size of x
