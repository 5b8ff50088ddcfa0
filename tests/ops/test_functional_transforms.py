"""torch.func: derivatives, vmap over any argument at any dimension, and no loop behind it."""

from itertools import product

import pytest
import torch
from helpers import Spy
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import mi_kernels as mi
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.samples import NAMES, ODD, WEIGHT_ONLY, Sample, Shape

SIZE = 4
SUBSETS = [subset for subset in product((False, True), repeat=6) if any(subset)]


def arguments(place, terms=(True,) * 4):
    return Sample(ODD, terms).arguments(torch.float64, place.device)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def mapped(place, subset, dim=0, size=SIZE, terms=(True,) * 4):
    """Arguments of which those in the subset carry a dimension to map over, and vmap's in_dims."""
    tensors, dims = [], []
    for index, (tensor, chosen) in enumerate(zip(arguments(place, terms), subset, strict=True)):
        if tensor is None or not chosen:
            tensors.append(tensor)
            dims.append(None)
            continue
        generator = torch.Generator().manual_seed(index)
        stack = torch.randn((size, *tensor.shape), generator=generator, dtype=tensor.dtype).to(tensor.device)
        position = dim % (tensor.dim() + 1)
        tensors.append(stack.movedim(0, position).contiguous())
        dims.append(position)
    return tensors, tuple(dims)


def looped(function, tensors, dims, size=SIZE):
    slices = [
        [t if d is None else t.select(d, k) for t, d in zip(tensors, dims, strict=True)] for k in range(size)
    ]
    return torch.stack([function(*one) for one in slices])


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("name", NAMES)
def test_jacobians(transform, name, place):
    tensors, index = arguments(place), NAMES.index(name)
    found = transform(mi.interaction, argnums=index)(*tensors)
    close(found, jacrev(reference.interaction, argnums=index)(*tensors))
    assert found.abs().sum() > 0


def test_grad_vjp_jvp(place):
    tensors = arguments(place)
    every = tuple(range(6))

    def scalar(function):
        return lambda *args: function(*args).pow(2).sum()

    close(grad(scalar(mi.interaction), every)(*tensors), grad(scalar(reference.interaction), every)(*tensors))
    y, pull = vjp(mi.interaction, *tensors)
    y_ref, pull_ref = vjp(reference.interaction, *tensors)
    close(y, y_ref)
    close(pull(torch.ones_like(y)), pull_ref(torch.ones_like(y)))
    directions = tuple(torch.randn_like(t) for t in tensors)
    close(jvp(mi.interaction, tensors, directions), jvp(reference.interaction, tensors, directions))


@pytest.mark.parametrize("argnums", [(0, 1), (1, 2), (0, 4), (2, 3)], ids=str)
def test_hessian(argnums, place):
    tensors = Sample(ODD).arguments(torch.float64, place.device)

    def scalar(function):
        return lambda *args: function(*args).pow(2).sum()

    found = hessian(scalar(mi.interaction), argnums)(*tensors)
    close(found, hessian(scalar(reference.interaction), argnums)(*tensors))


def test_reverse_over_reverse_and_forward_over_forward(place):
    tensors = arguments(place)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacfwd), (jacrev, jacfwd)):
        found = outer(inner(lambda *a: mi.interaction(*a).pow(2).sum(), 0), 1)(*tensors)
        close(found, hessian(lambda *a: reference.interaction(*a).pow(2).sum(), (0, 1))(*tensors)[0][1])


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "".join("xzWUVc"[i] for i in range(6) if s[i]))
def test_vmap_over_any_arguments(subset, dim, place):
    tensors, dims = mapped(place, subset, dim)
    with Spy() as spy:
        found = vmap(mi.interaction, dims)(*tensors)
    assert spy.names == ["interaction"]
    close(found, looped(reference.interaction, tensors, dims))


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("subset", [SUBSETS[31], SUBSETS[15], SUBSETS[-1]], ids=["x", "z", "all"])
def test_vmap_over_nothing_or_one(subset, size, place):
    tensors, dims = mapped(place, subset, size=size)
    if size == 0:
        y = vmap(lambda *args: mi.interaction(*args), dims)(*tensors)
        assert y.shape == (0, 5, 11)
        return
    close(vmap(mi.interaction, dims)(*tensors), looped(reference.interaction, tensors, dims, size))


@pytest.mark.parametrize("out_dim", [0, 1, 2])
def test_vmap_out_dims(out_dim, place):
    tensors, dims = mapped(place, (True, False, True, False, False, False))
    found = vmap(mi.interaction, dims, out_dims=out_dim)(*tensors)
    close(found, looped(reference.interaction, tensors, dims).movedim(0, out_dim))


@pytest.mark.parametrize("outer", range(6), ids=NAMES)
@pytest.mark.parametrize("inner", range(6), ids=NAMES)
def test_nested_vmap(inner, outer, place):
    tensors, inner_dims = mapped(place, tuple(i == inner for i in range(6)))
    outer_dims: list = [None] * 6
    tensors[outer] = torch.stack([tensors[outer], 2 * tensors[outer], -tensors[outer]])
    outer_dims[outer] = 0
    with Spy() as spy:
        found = vmap(vmap(mi.interaction, inner_dims), tuple(outer_dims))(*tensors)
    assert spy.names == ["interaction"]
    close(found, vmap(vmap(reference.interaction, inner_dims), tuple(outer_dims))(*tensors))


@pytest.mark.parametrize("terms", [(True,) * 4, WEIGHT_ONLY, (False, True, True, True)], ids=str)
def test_per_sample_gradients(terms, place):
    """vmap(grad): one gradient of every weight for each row, in one call of each operation."""
    x, z, *weights = arguments(place, terms)
    present = tuple(i for i, there in enumerate(terms) if there)

    def loss(function):
        def scalar(*args):
            *weights, x, z = args
            return function(x, z, *weights).pow(2).sum()

        return vmap(grad(scalar, present), (None,) * 4 + (0, 0))

    with Spy() as spy:
        found = loss(mi.interaction)(*weights, x, z)
    assert spy.names == ["interaction", "interaction_weight_grads"]
    expected = [
        grad(lambda *a, k=k: reference.interaction(x[k], z[k], *a).pow(2).sum(), present)(*weights)
        for k in range(x.shape[0])
    ]
    close(found, tuple(map(torch.stack, zip(*expected, strict=True))))


@pytest.mark.parametrize("subset", SUBSETS[::3], ids=lambda s: "".join("xzWUVc"[i] for i in range(6) if s[i]))
def test_gradients_under_vmap(subset, place):
    """Every gradient by every argument while any argument is mapped over, without a loop."""
    tensors, dims = mapped(place, subset)
    every = tuple(range(6))

    def gradients(function):
        return vmap(grad(lambda *args: function(*args).pow(2).sum(), every), dims)

    with Spy() as spy:
        found = gradients(mi.interaction)(*tensors)
    assert spy.names == ["interaction", "interaction_input_grads", "interaction_weight_grads"]
    close(found, gradients(reference.interaction)(*tensors))


@pytest.mark.parametrize("subset", SUBSETS[::7], ids=lambda s: "".join("xzWUVc"[i] for i in range(6) if s[i]))
def test_second_order_under_vmap(subset, place):
    tensors, dims = mapped(place, subset)

    def second(function):
        def slope(*args):
            first = grad(lambda *a: function(*a).pow(2).sum(), (0, 1, 2, 3))(*args)
            return sum(g.pow(2).sum() for g in first)

        return vmap(grad(slope, tuple(range(6))), dims)

    close(second(mi.interaction)(*tensors), second(reference.interaction)(*tensors))


def test_ensemble_of_models(place):
    """vmap over stacked weights of several layers, each with its own input or with a shared one."""
    layers = [
        mi.nn.MultiplicativeInteraction(
            7, context_features=3, out_features=11, dtype=torch.float64, device=place.device
        )
        for _ in range(SIZE)
    ]
    parameters, buffers = torch.func.stack_module_state(layers)
    x, z, *_ = arguments(place)

    def run(parameters, buffers, x, z):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x, z))

    with torch.no_grad():
        found = vmap(run, (0, 0, None, None))(parameters, buffers, x, z)
        close(found, torch.stack([layer(x, z) for layer in layers]))


def test_vmap_of_bilinear(place):
    x, z, w, _, _, c = arguments(place)
    found = vmap(mi.bilinear, (0, 0, None, None))(z, x, w, c)
    close(found, torch.nn.functional.bilinear(z, x, w, c))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_forward_mode_inside_forward_mode(order, place):
    """Along one direction, every order of nested jvp; a tangent lost between the levels would give zero."""
    x, z, weight, *_ = Sample(Shape("small", (2,), 3, 4, 2)).arguments(torch.float64, place.device)

    def along(function):
        def value(s):
            return function(x + s, z + 2 * s * z, weight - s * s).sum()

        for _ in range(order):
            value = _directional(value)
        return value(torch.tensor(0.3, dtype=torch.float64, device=place.device))

    expected = along(lambda x, z, w: (z[:, None, :, None] * w * x[:, None, None, :]).sum((-1, -2)).pow(3))
    result = along(lambda x, z, w: mi.interaction(x, z, w).pow(3))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


def _directional(function):
    return lambda s: torch.func.jvp(function, (s,), (torch.ones_like(s),))[1]


@pytest.mark.parametrize("modes", list(product(("jacfwd", "jacrev"), repeat=3)), ids="-".join)
def test_mixed_modes_of_third_order(modes, place):
    arguments = Sample(Shape("small", (2,), 2, 2, 1)).arguments(torch.float64, place.device)[:3]
    outer, middle, inner = (getattr(torch.func, mode) for mode in modes)

    def third(function):
        def loss(x, z, w):
            return function(x, z, w).pow(3).sum()

        first = inner(loss, argnums=(0, 1, 2))
        return torch.utils._pytree.tree_leaves(outer(middle(first, argnums=(0, 2)), argnums=1)(*arguments))

    expected = third(lambda x, z, w: (z[:, None, :, None] * w * x[:, None, None, :]).sum((-1, -2)))
    for result, truth in zip(third(mi.interaction), expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-11)
