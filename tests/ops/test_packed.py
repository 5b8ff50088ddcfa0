"""mi.pack: the same results, never from a weight that has changed."""

import copy

import pytest
import torch
from helpers import Spy

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.testing.samples import Sample, Shape

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# x shorter than z, longer, odd, and several tasks and tiles of each.
SHAPES = (
    Shape("context-inside", (24,), 70, 5, 7),
    Shape("width-inside", (24,), 6, 37, 13),
    Shape("threaded", (150,), 40, 131, 70),
    Shape("split-context", (16,), 600, 33, 3),
    Shape("few-rows", (2,), 9, 33, 7),
    Shape("one-output", (40,), 31, 9, 1),
    Shape("leading", (3, 1, 5), 4, 9, 3, context_batch=(1, 4, 1)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_same_bits(shape, dtype, place):
    x, z, weight, *others = Sample(shape).arguments(dtype, place.device)
    packed = mi.pack(weight)
    assert torch.equal(mi.interaction(x, z, packed, *others), mi.interaction(x, z, weight, *others))
    assert torch.equal(mi.bilinear(z, x, packed), mi.bilinear(z, x, weight))


@pytest.mark.parametrize("layout", ["transposed", "gaps", "expanded"])
def test_same_bits_of_strided_weights(layout):
    x, z, weight, *others = Sample(SHAPES[1], layout=layout).arguments(torch.float32)
    assert torch.equal(mi.interaction(x, z, mi.pack(weight), *others), mi.interaction(x, z, weight, *others))


compiled = pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")


@compiled
def test_the_packed_copy_is_used_and_only_for_inference():
    x, z, weight, *others = Sample(SHAPES[0]).arguments(torch.float16)
    packed = mi.pack(weight)

    def names(x):
        with Spy() as spy:
            mi.interaction(x, z, packed, *others)
        return spy.names

    assert names(x) == ["interaction_packed"]
    assert names(x.clone().requires_grad_()) == ["interaction"]
    with mi.backend("portable"):
        assert names(x) == ["interaction"]
    assert "read in place" in repr(mi.pack(torch.ones(4, 8, 8)))
    assert "kept as [7, 5, 70] torch.float32" in repr(packed)


def _in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(-2)


def _step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def _load(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def _move(layer):
    layer.to(torch.float64).to(torch.float16)
    _in_place(layer)


def _there_and_back(layer):
    layer.bfloat16().half()  # rounds, keeps the version, and may get the old address again


def _swap(layer):
    layer.weight.data = layer.weight.detach() + 1


@compiled
@pytest.mark.parametrize("change", [_in_place, _step, _load, _move, _there_and_back, _swap])
def test_never_stale(change):
    layer = mi.nn.Bilinear(70, 5, 7).half()
    x, z = torch.randn(24, 70).half(), torch.randn(24, 5).half()
    packed = mi.pack(layer.weight)
    with torch.no_grad():
        before = mi.bilinear(x, z, packed, layer.bias)
        assert torch.equal(before, layer(x, z))
    change(layer)
    with torch.no_grad():
        assert not torch.equal(layer(x, z), before)
        assert torch.equal(mi.bilinear(x, z, packed, layer.bias), layer(x, z))


@compiled
def test_never_stale_where_memory_is_reused():
    """A cast there and back leaves version and dtype alone; the address must not come back either."""
    x, z = torch.randn(40, 4), torch.randn(40, 64)
    for _ in range(20):
        layer = mi.nn.MultiplicativeInteraction(4, context_features=64, out_features=50).requires_grad_(False)
        packed = mi.pack(layer.weight)
        mi.interaction(x, z, packed)
        layer.half().float()
        assert torch.equal(mi.interaction(x, z, packed), mi.interaction(x, z, layer.weight))


def test_gradients_and_transforms_reach_the_weight():
    x, z, weight, *others = Sample(SHAPES[0]).arguments(torch.float64, requires_grad=True)
    packed = mi.pack(weight)
    grads = [
        torch.autograd.grad(mi.interaction(x, z, w, *others).square().sum(), (x, weight))
        for w in (weight, packed)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    rows = torch.vmap(lambda x, z: mi.interaction(x, z, packed))(x, z)
    torch.testing.assert_close(rows, mi.interaction(x, z, weight))
    # An older weight's packed copy does not stand in for what autocast makes of it.
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        arguments = [t.float() for t in (x, z)]
        packed = mi.pack(weight.detach().float())
        assert torch.equal(mi.interaction(*arguments, packed), mi.interaction(*arguments, packed.weight))


def test_compiles():
    x, z, weight, *_ = Sample(SHAPES[0]).arguments(torch.float32)
    packed = mi.pack(weight)
    run = torch.compile(lambda x, z: mi.interaction(x, z, packed), fullgraph=True)
    assert torch.equal(run(x, z), mi.interaction(x, z, weight))


def test_a_packed_weight_in_a_module_is_copied_with_its_weight():
    weight = torch.randn(7, 70, 5)
    packed = copy.deepcopy(mi.pack(weight))
    assert packed.weight is not weight and torch.equal(packed.weight, weight)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0], TypeError, "pack: weight: expected a torch.Tensor, got list"),
        (torch.ones(2, 3), ValueError, r"pack: weight: expected shape \[O, Z, X\], got \[2, 3\]"),
        (torch.ones(2, 3).to_sparse(), TypeError, "pack: weight: expected a dense"),
    ],
    ids=["list", "rank", "sparse"],
)
def test_bad_weights(weight, error, message):
    with pytest.raises(error, match=message):
        mi.pack(weight)


def test_an_inference_tensor_has_no_version():
    with torch.inference_mode():
        weight = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="got an inference tensor"):
        mi.pack(weight)
