"""Gated linear units: values and derivatives."""

import pytest
import torch

import mi_kernels as mi
from mi_kernels.testing.checks import call_glu, check_gradients, check_values
from mi_kernels.testing.dual_linear_samples import glus

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ours = call_glu()


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", list(glus()), ids=str, scope="module")
def test_error_rule(sample, dtype, place):
    y = ours(*sample.arguments(dtype, place.device), **sample.options)
    assert y.dtype == dtype and y.shape == sample.shape
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)
