"""Low-rank interactions: values and derivatives."""

import pytest
import torch

import mi_kernels as mi
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.dual_linear_samples import low_ranks

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", list(low_ranks()), ids=str, scope="module")
def test_error_rule(sample, dtype, place):
    y = mi.low_rank(*sample.arguments(dtype, place.device), **sample.options)
    assert y.dtype == dtype and y.shape == sample.shape
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)
