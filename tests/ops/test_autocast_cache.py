"""Under autocast a weight is cast once a region, as F.linear's is."""

import threading

import pytest
import torch
import torch.nn.functional as F
from calls import CALLS
from helpers import Spy
from torch.utils.checkpoint import checkpoint

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops import autocast
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import ODD, Sample, Shape

WIDE = Shape("wide", (4,), 40, 50, 60)


def casts(function, size):
    """How many copies of this many elements are made in another dtype."""
    with torch.profiler.profile(record_shapes=True) as recorded:
        function()
    events = [event for event in recorded.events() if event.name == "aten::_to_copy"]
    return sum(torch.Size(event.input_shapes[0]).numel() == size for event in events)


def leaves(place, shape=WIDE):
    return Sample(shape).arguments(torch.float32, place.device, requires_grad=True)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_one_cast_a_region(grad, place):
    x, z, weight, *others = leaves(place)

    def region():
        with torch.autocast(place.device, torch.bfloat16), torch.set_grad_enabled(grad):
            return [mi.interaction(x, z, weight, *others) for _ in range(5)]

    assert casts(region, weight.numel()) == 1
    assert casts(lambda: (region(), region()), weight.numel()) == 2


ELEMENTWISE = ("modulate", "mix", "norm", "norm-residual")  # which autocast does not cast


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ELEMENTWISE])
def test_every_call_keeps_its_weights(name, place):
    call = CALLS[name]
    tensors = call.arguments(torch.float32, place.device)
    with torch.autocast(place.device, torch.bfloat16):
        results = [call(*tensors) for _ in range(3)]
        assert len(autocast._REGIONS[place.device].casts) == len(tensors)
    assert len(results) == 3


def test_calls_share_what_they_save(place):
    x, z, weight, *_ = leaves(place)

    def held(function):
        with torch.autocast(place.device, torch.bfloat16):
            results = [function() for _ in range(16)]
        return results

    copy = weight.numel() * 2
    assert (
        peak_memory(lambda: held(lambda: mi.interaction(x, z, weight)), place.device) < 2 * copy + 16 * 4096
    )
    assert peak_memory(lambda: held(lambda: F.linear(x, weight.flatten(0, 1))), place.device) > 8 * copy


def test_gradients_of_shared_casts_add_up(place):
    tensors = leaves(place, ODD)
    with torch.autocast(place.device, torch.bfloat16):
        loss = sum(mi.interaction(*tensors).float().pow(2).sum() for _ in range(3))
    found = torch.autograd.grad(loss, tensors)
    with torch.autocast(place.device, torch.bfloat16, cache_enabled=False):
        loss = sum(mi.interaction(*tensors).float().pow(2).sum() for _ in range(3))
    # Each cast rounds the gradient that comes back through it; one cast rounds their sum.
    torch.testing.assert_close(found, torch.autograd.grad(loss, tensors), rtol=2e-2, atol=2e-2)


def test_nothing_is_kept_past_the_region(place):
    x, z, weight, *_ = leaves(place)
    region = autocast._REGIONS[place.device]
    with torch.no_grad():
        with torch.autocast(place.device, torch.bfloat16):
            with torch.autocast(place.device, torch.bfloat16):
                mi.interaction(x, z, weight)
            assert region.casts
        assert not region.casts
        with torch.autocast(place.device, torch.bfloat16):
            mi.interaction(x, z, weight)
            torch.clear_autocast_cache()
            assert not region.casts
            mi.interaction(x, z, weight)
            assert region.casts
        assert not region.casts


def in_this_thread(function):
    function()


def in_another_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize("runs", [in_this_thread, in_another_thread])
def test_values_follow_the_weight(runs, place):
    """A change in the region or between two, of a kind that PyTorch counts; gradients on or off."""
    x, z, weight, *_ = leaves(place)

    def check():
        def fresh():
            return mi.interaction(x.bfloat16(), z.bfloat16(), weight.bfloat16())

        for _ in range(2):
            with torch.autocast(place.device, torch.bfloat16):
                with torch.no_grad():
                    assert torch.equal(mi.interaction(x, z, weight), fresh())
                    weight.mul_(-2)
                    assert torch.equal(mi.interaction(x, z, weight), fresh())
                assert torch.autograd.grad(mi.interaction(x, z, weight).sum(), weight)[0].abs().sum() > 0
            weight.data = weight.data + 1  # uncounted, between regions
        with torch.autocast(place.device, torch.float16):
            assert mi.interaction(x, z, weight).dtype == torch.float16

    runs(check)


def test_what_autocast_does_not_keep(place):
    x, z, weight, *_ = leaves(place)
    frozen, view = weight.detach(), weight[:]
    region = autocast._REGIONS[place.device]

    def keeps(weight, cache_enabled=True):
        with torch.autocast(place.device, torch.bfloat16, cache_enabled=cache_enabled):
            mi.interaction(x.detach(), z.detach(), weight)
            return len(region.casts)

    assert keeps(weight) == 1
    assert keeps(frozen) == keeps(view) == keeps(weight, cache_enabled=False) == 0
    with torch.autocast(place.device, torch.bfloat16):
        torch.func.grad(lambda w: mi.interaction(x, z, w).float().sum())(weight)
        assert not region.casts


@pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")
@pytest.mark.parametrize("frozen", [True, False])
def test_packed_weights(frozen):
    """One cast for all regions, laid out for the kernels in the dtype of autocast."""
    x, z, weight, *others = Sample(Shape("long", (24,), 70, 5, 7)).arguments(torch.float32)
    weight.requires_grad_(not frozen)
    packed = mi.pack(weight)

    def region():
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            return [mi.interaction(x, z, packed, *others) for _ in range(4)]

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        expected = mi.interaction(x, z, weight, *others)
    assert all(torch.equal(y, expected) for y in region())
    assert casts(region, weight.numel()) == 0
    with Spy() as spy:
        region()
    assert set(spy.names) == {"interaction_packed"}
    with torch.no_grad():
        weight.mul_(3)
    assert casts(region, weight.numel()) >= 1
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert torch.equal(region()[0], mi.interaction(x, z, weight, *others))


@pytest.mark.parametrize("outer", ["autocast", "inference"])
def test_inference_mode(outer, place):
    x, z, weight, *_ = leaves(place)
    modes = [torch.autocast(place.device, torch.bfloat16), torch.inference_mode()]
    first, second = modes if outer == "autocast" else modes[::-1]
    with first, second:
        y = [mi.interaction(x, z, weight) for _ in range(3)][-1]
        assert autocast._REGIONS[place.device].casts
    assert torch.equal(y, mi.interaction(x.bfloat16(), z.bfloat16(), weight.bfloat16()))
    assert not autocast._REGIONS[place.device].casts


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_default_dtypes(dtype, place):
    x, z, weight, *_ = leaves(place)
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast(place.device, torch.bfloat16):
            mi.interaction(x, z, weight)
            mi.interaction(x, z, weight)
            assert len(autocast._REGIONS[place.device].casts) == 3
        assert not autocast._REGIONS[place.device].casts
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("before", [True, False], ids=["after a layer", "first"])
def test_checkpoints(before, place):
    """What is run again saves the same tensors, whether the cache was filled before it or in it."""
    x, z, weight, *_ = leaves(place, Shape("square", (5,), 4, 6, 6))
    runs = []

    def layer(h):
        runs.append(None)
        return mi.interaction(h, z, weight)

    with torch.autocast(place.device, torch.bfloat16):
        h = mi.interaction(x, z, weight) if before else x
        y = checkpoint(layer, h, use_reentrant=False)
    assert len(runs) == 1
    found = torch.autograd.grad(y.float().sum(), [x, z, weight])
    assert len(runs) == 2
    with torch.autocast(place.device, torch.bfloat16):
        y = layer(mi.interaction(x, z, weight) if before else x)
    torch.testing.assert_close(found, torch.autograd.grad(y.float().sum(), [x, z, weight]))


def test_hooks_of_saved_tensors_see_none_of_it(place):
    """And may keep what they pack, without keeping casts past the region."""
    x, z, weight, *_ = leaves(place)
    seen = []

    def pack(tensor):
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(place.device, torch.bfloat16):
            mi.interaction(x, z, weight)
    assert not autocast._REGIONS[place.device].casts
    assert all(tensor.numel() > 1 for tensor in seen)
    weight.data.add_(1)  # uncounted
    with torch.autocast(place.device, torch.bfloat16):
        y = mi.interaction(x, z, weight)
    assert torch.equal(y, mi.interaction(x.bfloat16(), z.bfloat16(), weight.bfloat16()))


def test_weights_may_be_swapped(place):
    x, z, weight, *_ = leaves(place)
    with torch.no_grad(), torch.autocast(place.device, torch.bfloat16):
        mi.interaction(x, z, weight)
        torch.utils.swap_tensors(weight, torch.nn.Parameter(weight.detach() * 3))
        assert torch.equal(
            mi.interaction(x, z, weight), mi.interaction(x.bfloat16(), z.bfloat16(), weight.bfloat16())
        )
