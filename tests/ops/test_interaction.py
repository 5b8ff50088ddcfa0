"""Values of the dense interaction against float64 and against PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

import mi_kernels as mi
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.checks import check_values, values_of
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.samples import LAYOUTS, MIDDLE, NAMES, ODD, Sample, samples

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check(draw, **options):
    check_errors(values_of(mi.interaction), values_of(reference.interaction), draw, **options)


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", list(samples()), ids=str, scope="module")
def test_values(sample, dtype, place):
    y = mi.interaction(*sample.arguments(dtype, place.device))
    assert y.dtype == dtype
    assert y.shape == (*sample.shape.lead, sample.shape.out)
    check_values(sample, dtype, place.device)


def test_the_formula_itself():
    """The reference is the oracle of all other tests, so it is held against a plain loop."""
    x, z, w, u, v, c = (t.tolist() for t in Sample(ODD).arguments(torch.float64))
    y = reference.interaction(*Sample(ODD).arguments(torch.float64))
    for b in range(5):
        for o in range(11):
            expected = (
                c[o] + sum(u[o][i] * z[b][i] for i in range(3)) + sum(v[o][j] * x[b][j] for j in range(7))
            )
            expected += sum(z[b][i] * w[o][i][j] * x[b][j] for i in range(3) for j in range(7))
            assert math.isclose(y[b, o], expected, rel_tol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_no_bit(layout, place):
    """The same numbers in another layout are the same problem (expanded ones against their own copies).

    Of the compiled kernels; PyTorch's matrix product, which the portable path calls, may round differently.
    They sum in the order in which the axes of W lie; test_weight_layouts_cpu.py has the other orders.
    """
    arguments = list(Sample(MIDDLE, layout=layout).arguments(torch.float32, place.device))
    if layout == "transposed":
        arguments[2] = arguments[2].contiguous()
    copies = [t.clone(memory_format=torch.contiguous_format) for t in arguments]
    assert [t.stride() for t in arguments] != [t.stride() for t in copies] or layout == "offset"
    y, expected = mi.interaction(*arguments), mi.interaction(*copies)
    tolerance = 0 if place.backend == "cpu" else 1e-5
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("one", range(6), ids=NAMES)
def test_layouts_may_differ_between_arguments(one, place):
    arguments = list(Sample(MIDDLE).arguments(torch.float32, place.device))
    arguments[one] = Sample(MIDDLE, layout="gaps").arguments(torch.float32, place.device)[one]
    check(lambda _: arguments, most=1)


def test_result_is_contiguous_and_new(place):
    """A result never aliases an argument, also where it is a copy of the bias alone."""
    bias = torch.ones(5, device=place.device)
    x = torch.zeros(3, 0, device=place.device)
    y = mi.interaction(x, x, None, bias=bias)
    assert y.is_contiguous()
    y.zero_()
    assert bias.eq(1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [ODD, MIDDLE], ids=lambda shape: shape.name)
def test_nan_and_inf_reach_what_depends_on_them_and_nothing_else(shape, name, dtype, value, place):
    arguments = Sample(shape).arguments(dtype, place.device)
    arguments[NAMES.index(name)].view(-1)[-1] = value
    check(lambda _: arguments, most=1)
    broken = ~mi.interaction(*arguments).isfinite().flatten(0, -2)
    expected = torch.zeros_like(broken)
    if name in ("x", "z"):
        expected[-1, :] = True
    else:
        expected[:, -1] = True
    assert torch.equal(broken, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_times_nan_is_nan(dtype, place):
    """No term is skipped because its other factor is zero."""
    x, z, w, u, v, c = Sample(ODD).arguments(dtype, place.device)
    z.zero_()
    x[2, 3] = math.nan
    assert mi.interaction(x, z, w)[2].isnan().all()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_integers_are_exact_as_in_torch(dtype, has_bias):
    x, z, w, _, _, c = Sample(MIDDLE).arguments(dtype)
    bias = c if has_bias else None
    y = mi.bilinear(z, x, w, bias)
    assert y.dtype == dtype
    assert torch.equal(y, F.bilinear(z, x, w, bias))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_terms(dtype):
    arguments = Sample(MIDDLE).arguments(dtype)
    y = mi.interaction(*arguments)
    exact = reference.interaction(*(t.to(torch.int64) for t in arguments))
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bilinear_is_the_interaction_with_the_first_input_as_context(dtype, place):
    x, z, w, _, _, c = Sample(MIDDLE).arguments(dtype, place.device)
    assert torch.equal(mi.bilinear(z, x, w, c), mi.interaction(x, z, w, bias=c))
    assert torch.equal(mi.bilinear(z, x, w), mi.interaction(x, z, w))


def test_bilinear_agrees_with_torch(place):
    x, z, w, _, _, c = Sample(MIDDLE).arguments(torch.float64, place.device)
    torch.testing.assert_close(mi.bilinear(z, x, w, c), F.bilinear(z, x, w, c), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_accumulate_in_float32(dtype, place):
    """4096 + 1 + 1 + ...: in 16 bits every 1 is lost."""
    x = torch.ones(2, 4097, dtype=dtype, device=place.device)
    x[:, 0] = 4096
    z = torch.ones(2, 1, dtype=dtype, device=place.device)
    y = mi.interaction(x, z, torch.ones(3, 1, 4097, dtype=dtype, device=place.device))
    assert y.eq(8192).all()
    y = mi.interaction(z, x, torch.ones(3, 4097, 1, dtype=dtype, device=place.device))
    assert y.eq(8192).all()
    y = mi.interaction(x, z, None, weight_x=torch.ones(3, 4097, dtype=dtype, device=place.device))
    assert y.eq(8192).all()
