"""Autocast treats the interaction as it treats F.linear."""

import pytest
import torch
import torch.nn.functional as F

import mi_kernels as mi
from mi_kernels.testing.samples import MIDDLE, Sample

LOW = (torch.bfloat16, torch.float16)


def linear_dtype(device, dtype, low):
    with torch.autocast(device, low):
        return F.linear(
            torch.ones(2, 3, dtype=dtype, device=device), torch.ones(4, 3, dtype=dtype, device=device)
        ).dtype


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_that_of_linear(dtype, low, place):
    x, z, w, u, v, c = Sample(MIDDLE).arguments(dtype, place.device)
    with torch.autocast(place.device, low):
        y, b = mi.interaction(x, z, w, u, v, c), mi.bilinear(z, x, w, c)
    assert y.dtype == b.dtype == linear_dtype(place.device, dtype, low)


@pytest.mark.parametrize("low", LOW, ids=str)
def test_values_are_those_of_cast_inputs(low, place):
    arguments = Sample(MIDDLE).arguments(torch.float32, place.device)
    with torch.autocast(place.device, low):
        y = mi.interaction(*arguments)
    assert torch.equal(y, mi.interaction(*(t.to(low) for t in arguments)))


@pytest.mark.parametrize("low", LOW, ids=str)
def test_mixed_dtypes_meet_in_the_lower_one(low, place):
    x, z, w, u, v, c = Sample(MIDDLE).arguments(torch.float32, place.device)
    with torch.autocast(place.device, low):
        y = mi.interaction(x.bfloat16(), z.half(), w, u, v, c.bfloat16())
    assert y.dtype == low
    with pytest.raises(TypeError, match="z: expected torch.bfloat16"):
        mi.interaction(x.bfloat16(), z.half(), w, u, v, c)


@pytest.mark.parametrize("low", LOW, ids=str)
def test_gradients_come_back_in_the_dtype_of_the_leaves(low, place):
    leaves = Sample(MIDDLE).arguments(torch.float32, place.device, requires_grad=True)
    with torch.autocast(place.device, low):
        y = mi.interaction(*leaves)
    y.float().pow(2).sum().backward()
    cast = [t.detach().to(low).requires_grad_() for t in leaves]
    mi.interaction(*cast).float().pow(2).sum().backward()
    for leaf, twin in zip(leaves, cast, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, twin.grad.float())


def test_disabled_regions_and_other_devices_are_left_alone(place):
    arguments = Sample(MIDDLE).arguments(torch.float32, place.device)
    other = "cuda" if place.device == "cpu" else "cpu"
    with torch.autocast(other, torch.bfloat16):
        assert mi.interaction(*arguments).dtype == torch.float32
    with torch.autocast(place.device, torch.bfloat16), torch.autocast(place.device, enabled=False):
        assert mi.interaction(*arguments).dtype == torch.float32


def test_integers_are_left_alone():
    arguments = Sample(MIDDLE).arguments(torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert mi.interaction(*arguments).dtype == torch.int64


def test_reference_obeys_too():
    arguments = Sample(MIDDLE).arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), mi.backend("reference"):
        assert mi.interaction(*arguments).dtype == torch.bfloat16
