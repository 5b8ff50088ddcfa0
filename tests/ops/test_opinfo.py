"""PyTorch's own samples for nn.functional.bilinear, run against this package's drop-in."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

import mi_kernels as mi
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.errors import check_errors

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)


@cache
def op_info():
    # Importing PyTorch's test definitions takes seconds, so only the tests that need them do it.
    from torch.testing._internal.common_methods_invocations import op_db

    return next(info for info in op_db if info.name == "nn.functional.bilinear")


def op_samples(dtype, device="cpu", requires_grad=False):
    found = list(op_info().sample_inputs(device, dtype, requires_grad=requires_grad))
    assert len(found) >= 16
    return [(sample.input, *sample.args) for sample in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype):
    """On the backend that is chosen by itself, because integers have no compiled one."""
    assert dtype in op_info().dtypes
    for arguments in op_samples(dtype):
        expected = F.bilinear(*arguments)
        y = mi.bilinear(*arguments)
        assert y.dtype == expected.dtype and y.shape == expected.shape
        if not dtype.is_floating_point:
            assert torch.equal(y, expected)
            continue
        check_errors(
            lambda *tensors: [mi.bilinear(*tensors)],
            lambda first, second, weight, bias=None: [
                reference.interaction(second, first, weight, bias=bias)
            ],
            lambda _, arguments=arguments: arguments,
            most=1,
        )


def test_first_order(place):
    for inputs in op_samples(torch.float64, place.device, requires_grad=True):
        assert gradcheck(
            mi.bilinear,
            inputs,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
            fast_mode=True,
        )


def test_second_order(place):
    for inputs in op_samples(torch.float64, place.device, requires_grad=True):
        assert gradgradcheck(
            mi.bilinear,
            inputs,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_batched_grad=True,
            fast_mode=True,
        )


def test_vmap(place):
    for inputs in op_samples(torch.float64, place.device):
        for chosen in range(len(inputs)):
            stacks = [torch.stack([t, 2 * t]) if i == chosen else t for i, t in enumerate(inputs)]
            found = vmap(mi.bilinear, tuple(0 if i == chosen else None for i in range(len(inputs))))(*stacks)
            expected = torch.stack(
                [F.bilinear(*(t[k] if i == chosen else t for i, t in enumerate(stacks))) for k in range(2)]
            )
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
