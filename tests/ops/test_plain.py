"""The rule of plain tensors in training (plain.py) against the one that serves transforms: the same bits."""

from itertools import product

import pytest
import torch
from helpers import Spy
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops.interaction import autograd as dense
from mi_kernels.ops.interaction import kept
from mi_kernels.testing.samples import Sample, Shape

pytestmark = pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ODD = Shape("odd", (5,), 3, 7, 11)
SHAPES = (
    ODD,
    Shape("materialised", (24,), 20, 7, 100),
    Shape("queried", (300,), 20, 40, 30),  # the engine is asked which gradients it needs
    Shape("one-output", (9,), 6, 5, 1),
    Shape("one-input", (9,), 6, 1, 4),
    Shape("no-rows", (0,), 3, 4, 5),
    Shape("no-context", (4,), 0, 3, 5),
)
TERMS = tuple(product((False, True), repeat=3))  # of U, V and c
TRIPLES = [chosen for chosen in product((False, True), repeat=6) if any(chosen)]


def names(y):
    """Of the nodes that made y."""
    found, node = [], y.grad_fn
    while node is not None:
        found.append(getattr(node, "_forward_cls", type(node)).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return " ".join(found)


def is_plain(y):
    return "PlainInteractionRule" in names(y)


def leaves_of(shape, dtype, terms=(True, True, True)):
    arguments = Sample(shape).arguments(dtype, requires_grad=True)
    return [*arguments[:3], *(t if there else None for t, there in zip(arguments[3:], terms, strict=True))]


def general(*arguments):
    y = dense.forward("cpu", *arguments)
    assert not is_plain(y)
    return y


def plain(*arguments):
    y = mi.interaction(*arguments)
    assert is_plain(y)
    return y


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits(dtype, shape, terms):
    """Values, gradients and gradients of gradients."""
    arguments = leaves_of(shape, dtype, terms)
    leaves = [t for t in arguments if t is not None]
    grad, results = Sample(shape).cotangent(dtype).requires_grad_(), []
    for function in (plain, general):
        y = function(*arguments)
        first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        assert not any(g.requires_grad for g in first)
        again = torch.autograd.grad(y, leaves, grad, create_graph=True)
        loss = sum(g.pow(2).sum() for g in again)
        second = torch.autograd.grad(loss, (grad, *leaves), allow_unused=True)
        of_constant = torch.autograd.grad(function(*arguments), leaves, grad.detach(), create_graph=True)
        loss = sum(g.pow(2).sum() for g in of_constant)
        if loss.requires_grad:  # that of the bias alone is the cotangent
            second += torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([y, *first, *again, *second])
    assert_same(*results)


@pytest.mark.parametrize("chosen", TRIPLES, ids=str)
@pytest.mark.parametrize("shape", [ODD, SHAPES[2]], ids=lambda shape: shape.name)
def test_what_requires_a_gradient_or_is_asked_for(shape, chosen):
    leaves, grad = leaves_of(shape, torch.float32), Sample(shape).cotangent(torch.float32)
    everything = torch.autograd.grad(general(*leaves), leaves, grad)
    expected = [g for g, there in zip(everything, chosen, strict=True) if there]
    asked = [t for t, there in zip(leaves, chosen, strict=True) if there]
    only = [t.detach().requires_grad_(there) for t, there in zip(leaves, chosen, strict=True)]
    # What else is computed may change the order of sums in dx and dz, here as there.
    results = []
    for function in (plain, general):
        found = torch.autograd.grad(function(*leaves), asked, grad)
        y = function(*only)
        results.append([*found, *torch.autograd.grad(y, [t for t in only if t.requires_grad], grad)])
    assert_same(*results)
    for found, truth in zip(results[0], 2 * expected, strict=True):
        torch.testing.assert_close(found, truth)


def calls(function):
    """The operations that run, of which each is one pass."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    return sorted(e.key for e in recorded.key_averages() for _ in range(e.count) if "mi_kernels::" in e.key)


@pytest.mark.parametrize(
    ("chosen", "backward"),
    [
        ((True,) * 6, ["input_grads", "weight_grads"]),
        ((True, False, False, False, False, False), ["input_grads"]),
        ((False, False, True, False, False, True), ["weight_grads"]),
    ],
    ids=["all", "x", "W and c"],
)
def test_no_pass_runs_twice(chosen, backward):
    """As many operations as explain tells, in training too; without gradients the forward pass alone."""
    leaves = [
        t.detach().requires_grad_(c) for t, c in zip(leaves_of(ODD, torch.float32), chosen, strict=True)
    ]
    made = []
    assert calls(lambda: made.append(plain(*leaves))) == ["mi_kernels::interaction"]
    expected = [f"mi_kernels::interaction_{name}" for name in backward]
    assert calls(lambda: made[0].sum().backward()) == expected
    plan = mi.explain(mi.interaction, *leaves)
    assert [step.op for step in plan.backward] == backward
    alone = mi.explain(mi.interaction, *(t.detach() for t in leaves))
    assert (plan.algorithm, plan.operations, plan.scratch) == (
        alone.algorithm,
        alone.operations,
        alone.scratch,
    )
    with torch.no_grad():
        assert calls(lambda: mi.interaction(*leaves)) == ["mi_kernels::interaction"]
        assert mi.interaction(*leaves).grad_fn is None


def test_a_freed_graph_is_refused():
    leaves = leaves_of(ODD, torch.float32)
    loss = plain(*leaves).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_what_was_saved_must_not_change():
    leaves = leaves_of(ODD, torch.float32)
    loss = plain(*leaves).sum()
    with torch.no_grad():
        leaves[2].mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_hooks():
    """Of leaves, of the result, and of what is saved."""
    leaves, packed, unpacked, seen = leaves_of(ODD, torch.float32), [], [], []
    expected = torch.autograd.grad(general(*leaves), leaves, torch.full((5, 11), 2.0))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t) or t, lambda t: unpacked.append(t) or t
    ):
        y = plain(*leaves)
    assert [t.data_ptr() for t in packed] == [t.data_ptr() for t in leaves[:5]]
    y.register_hook(lambda g: seen.append("y") or 2 * g)
    leaves[0].register_hook(lambda g: seen.append("x") or 3 * g)
    y.sum().backward()
    assert seen == ["y", "x"] and len(unpacked) == len(packed)
    assert_same([t.grad for t in leaves], [3 * expected[0], *expected[1:]])


def test_gradients_are_accumulated():
    leaves = leaves_of(ODD, torch.float32)
    for _ in range(2):
        plain(*leaves).sum().backward()
    expected = torch.autograd.grad(general(*leaves).sum(), leaves)
    assert_same([t.grad for t in leaves], [2 * g for g in expected])


class _NoGradient(torch.autograd.Function):
    """Of which the gradient is absent."""

    @staticmethod
    def forward(ctx, y):
        return y.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_absent_gradient():
    leaves = leaves_of(ODD, torch.float32)
    _NoGradient.apply(plain(*leaves)).backward()
    assert all(t.grad is None for t in leaves)


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradients_in_other_layouts(layout):
    leaves = leaves_of(ODD, torch.float32)
    grad = torch.randn(5, 1).expand(5, 11) if layout == "expanded" else torch.randn(11, 5).T
    found, expected = (torch.autograd.grad(function(*leaves), leaves, grad) for function in (plain, general))
    assert_same(found, expected)


def test_other_layouts_of_weights_go_the_general_way():
    """Their gradients have the same order in memory."""
    leaves = leaves_of(ODD, torch.float32)
    for index, stored in (
        (2, leaves[2].detach().mT.contiguous().mT),
        (3, leaves[3].detach().T.contiguous().T),
        (4, leaves[4].detach().T.contiguous().T),
    ):
        changed = [*leaves]
        changed[index] = stored.requires_grad_()
        y = mi.interaction(*changed)
        assert not is_plain(y)
        assert_same(
            torch.autograd.grad(y.sum(), changed), torch.autograd.grad(general(*changed).sum(), changed)
        )


def test_vectors():
    """One row without its dimension."""
    x, z, *weights = leaves_of(Shape("row", (1,), 3, 7, 11), torch.float32)
    x, z = x.detach()[0].requires_grad_(), z.detach()[0].requires_grad_()
    y = plain(x, z, *weights)
    expected = general(x[None], z[None], *weights)
    assert torch.equal(y, expected[0])
    leaves = (x, z, *weights)
    assert_same(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves))


class _Subclass(torch.Tensor):
    pass


def test_whatever_is_not_plain_goes_the_general_way(monkeypatch):
    recorded = []
    monkeypatch.setattr(dense.InteractionRule, "call", _noting(dense.InteractionRule.call, recorded))
    leaves = leaves_of(ODD, torch.float32)
    bare = [t.detach() for t in leaves]
    expected = torch.autograd.grad(general(*leaves).sum(), leaves)

    def general_way(call):
        recorded.clear()
        result = call()
        assert recorded
        return result

    found = general_way(lambda: torch.func.grad(lambda *t: mi.interaction(*t).sum(), tuple(range(6)))(*bare))
    assert_same(found, expected)
    stacked = torch.stack((bare[0], bare[0])).requires_grad_()
    y = general_way(lambda: torch.vmap(lambda x: mi.interaction(x, *leaves[1:]))(stacked))
    torch.testing.assert_close(y, mi.interaction(*bare).expand_as(y))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaves[0], torch.ones_like(bare[0]))
        tangent = forward_ad.unpack_dual(general_way(lambda: mi.interaction(dual, *leaves[1:]))).tangent
    torch.testing.assert_close(
        tangent, mi.interaction(torch.ones_like(bare[0]), *bare[1:4], bare[4], None) - bare[1] @ bare[3].T
    )
    wrapped = leaves[0].detach().as_subclass(_Subclass).requires_grad_()
    assert torch.equal(general_way(lambda: mi.interaction(wrapped, *leaves[1:])), mi.interaction(*bare))
    with Spy() as spy:
        general_way(lambda: mi.interaction(*leaves))
    assert spy.names == ["interaction"]
    recorded.clear()
    plain(*leaves)
    assert not recorded


def _noting(call, recorded):
    def noted(*arguments):
        recorded.append(arguments)
        return call(*arguments)

    return noted


def test_batched_gradients():
    """`is_grads_batched` maps the backward pass of a graph that the plain rule has made."""
    leaves, grads = leaves_of(ODD, torch.float64), torch.randn(4, 5, 11, dtype=torch.float64)
    y = plain(*leaves)
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(grads):
        for one, other in zip(found, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(one[index], other, rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_compile(fresh_compiler):
    leaves = leaves_of(ODD, torch.float32)
    y = torch.compile(mi.interaction, backend="aot_eager", fullgraph=True)(*leaves)
    assert not is_plain(y)
    found = torch.autograd.grad(y.sum(), leaves)
    assert_same([y, *found], [general(*leaves), *torch.autograd.grad(general(*leaves).sum(), leaves)])


def test_autocast():
    """Computes as with arguments of the lower dtype, and differentiates the casts."""
    leaves = leaves_of(ODD, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mi.interaction(*leaves)
    lower = [t.bfloat16() for t in leaves]
    expected = general(*lower)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert_same(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves))


def test_parameters_are_plain():
    leaves = leaves_of(ODD, torch.float32)
    parameters = [torch.nn.Parameter(t.detach()) for t in leaves[2:]]
    found = torch.autograd.grad(plain(*leaves[:2], *parameters).sum(), parameters)
    assert_same(found, torch.autograd.grad(general(*leaves).sum(), leaves[2:]))


def test_w_x_is_kept_first():
    """Where that is faster it goes before this rule."""
    sizes = 16, 3, 384, 384
    assert kept.pays(sizes[0], sizes[1:], torch.float32, True)
    leaves = leaves_of(Shape("kept", (16,), 384, 384, 3), torch.float32)
    assert "KeptInteractionRule" in names(mi.interaction(*leaves))
