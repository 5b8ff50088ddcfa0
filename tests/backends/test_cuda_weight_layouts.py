"""W in every memory order on the CUDA kernels, on the emulator: values, what is copied, and by what."""

import re
from functools import partial

import pytest
import torch
from emulated import backend
from test_cuda_emulated import FLOATS, LIMITS, draw, emulated, tf32

from mi_kernels import planners
from mi_kernels.ops.gate import plan as gate_plan
from mi_kernels.ops.gate import portable as gate_portable
from mi_kernels.ops.interaction import plan, portable
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import ORDERS, stored

__all__ = ["emulated", "tf32"]  # fixtures
pytestmark = pytest.mark.skipif(backend.COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: threads of PyTorch would take longer to start than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def primitives(operations, x, z, w, u, v, c, g):
    """Those that read W: y, dx, dz."""
    y = operations.interaction(x, z, w, u, v, c)
    return y, *operations.interaction_input_grads(g, x, z, w, u, v, True, True)


def truth(x, z, w, u, v, c, g):
    x, z, w, u, v, c, g = (t.double() for t in (x, z, w, u, v, c, g))
    return portable.forward(x, z, w, u, v, c), *portable.input_grads(g, x, z, w, u, v, True, True)


def cases(every, *once):
    """Orders in every dtype, and those that differ from one of them by the exchange alone, in float32."""
    return [*((order, dtype) for order in every for dtype in FLOATS), *((o, torch.float32) for o in once)]


def stored_groups(weight, order):
    """W [(G,) O, Z, X], each group with its axes in that order in memory."""
    if weight.dim() == 3:
        return stored(weight, order)
    there, back = ["OZX".index(a) for a in order], [order.index(a) for a in "OZX"]
    groups = weight.permute(0, *(1 + a for a in there)).contiguous()
    return groups.permute(0, *(1 + a for a in back))


def gaps(weight):
    """The same values with unused memory between those of every axis."""
    buffer = torch.full([2 * size + 1 for size in weight.shape], float("nan"), dtype=weight.dtype)
    view = buffer[tuple(slice(1, None, 2) for _ in weight.shape)]
    view.copy_(weight)
    return view


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["OZX", "ZOX", "ZXO", "XOZ"])
def test_the_copy(order, dtype, groups, emulated):
    """Every element, for tiles that are whole or not, axes of size 1, no elements, gaps and expanded axes."""

    def check(weight):
        found = emulated.emulated_repack(weight, groups is not None)
        expected = weight if groups is not None else weight[None]
        if expected.numel() == 0:
            return
        expected = expected[: len(found)]
        assert torch.equal(found, expected) or torch.equal(found, expected.mT)

    sizes = [(1, 1, 1), (3, 5, 7), (70, 3, 33), (130, 1, 65), (1, 9, 70), (64, 8, 16), (65, 40, 1)]
    for size in (*sizes, (0, 3, 4), (3, 0, 4), (2, 3, 0)):
        weight = torch.randn(*(() if groups is None else (groups,)), *size).to(dtype)
        check(stored_groups(weight, order))
    weight = stored_groups(torch.randn(*(() if groups is None else (groups,)), 33, 3, 5).to(dtype), order)
    check(gaps(weight))
    for axis in (-3, -2, -1):
        check(weight.narrow(axis, 1, 1).expand_as(weight))
    if groups:
        check(weight[:1].expand_as(weight))


SIZES = [
    (70, 6, 32, 72),
    (131, 5, 13, 20),
    (3, 70, 24, 9),
    (1, 5, 7, 4),
    (5, 1, 8, 16),
    (20, 4, 1, 8),
    (20, 4, 8, 1),
]


@pytest.mark.parametrize(("order", "dtype"), cases(["ZOX", "ZXO"], "OXZ", "XOZ", "XZO"), ids=str)
def test_values(order, dtype, emulated):
    """With chunks of 16 bytes and without, a few rows and many, reductions that are split or not."""
    for sizes, processors in zip(SIZES, (1, 40, 3, 3, 4, 4, 4), strict=True):
        emulated.emulated_processors(processors)
        arguments = draw(sizes, dtype)
        arguments[2] = stored(arguments[2], order)
        for index, (found, exact) in enumerate(
            zip(primitives(emulated, *arguments), truth(*arguments), strict=True)
        ):
            assert relative_error(found, exact) < LIMITS[dtype], (sizes, index)
    assert emulated.emulated_conflicts() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [20, 3])
def test_groups(rows, dtype, emulated):
    """Of their own and shared ones; gaps, and an axis that repeats."""
    arguments = draw((rows, 3, 16, 24), dtype, groups=(3,))
    weight = arguments[2]
    layouts = [stored_groups(weight, order) for order in ("ZOX", "ZXO", "XOZ")]
    layouts += [gaps(weight), stored_groups(weight, "ZXO")[:1].expand_as(weight)]
    layouts += [stored_groups(weight, "ZOX")[:1].expand_as(weight), weight[..., :1].expand_as(weight)]
    for layout in (*layouts, weight[:, :, :1].expand_as(weight)):
        arguments[2] = layout
        for found, exact in zip(primitives(emulated, *arguments), truth(*arguments), strict=True):
            assert relative_error(found, exact) < LIMITS[dtype]


@pytest.mark.parametrize("order", ["ZOX", "ZXO", "XZO"])
def test_tf32(order, tf32):
    """In the same bits as a contiguous W: the same sums in the same order."""
    x, z, w, u, v, c, g = draw((70, 6, 16, 72), torch.float32)
    if order.index("Z") > order.index("X"):  # a contiguous one has x inside
        x, z, w, u, v = z, x, w.mT.contiguous(), v, u
    other = (x, z, stored(w, order), u, v, c, g)
    if order.index("Z") < order.index("X"):
        for found, expected in zip(
            primitives(tf32, *other), primitives(tf32, x, z, w, u, v, c, g), strict=True
        ):
            assert torch.equal(found, expected)
    for found, exact in zip(primitives(tf32, *other), truth(*other), strict=True):
        assert relative_error(found, exact) < 1e-3
    assert tf32.emulated_conflicts() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(20, 3, 32, 9), (3, 5, 13, 11), (3, 2, 8, 72)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_what_depends_on_them(value, sizes, dtype, tf32):
    """Numbers are positive, so that Inf stays Inf."""
    for index in (0, 1, 2, 6):  # U, V and the bias are read as they are with any W
        arguments = [t.abs() + 0.5 for t in draw(sizes, dtype)]
        arguments[index].view(-1)[-1] = value
        arguments[2] = stored(arguments[2], "ZXO")
        for found, exact in zip(primitives(tf32, *arguments), truth(*arguments), strict=True):
            assert torch.equal(found.isnan(), exact.isnan()) and torch.equal(found.isinf(), exact.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["ZXO", "XOZ"])
@pytest.mark.parametrize("activation", ["tanh", "softmax"])
def test_gates(activation, order, dtype, emulated):
    """x is exchanged with z for the product, and stays itself in the gate."""
    for rows in (20, 3):
        x, z, w, u, v, c, _ = draw((rows, 6, 16, 16), dtype)
        arguments = (x, z, stored(w / 8, order), u, v / 8, c)
        expected = gate_portable.gated_interaction(*(t.double() for t in arguments), activation, True)
        for found, true in zip(
            emulated.gated_interaction(*arguments, activation, True), expected, strict=True
        ):
            assert relative_error(found, true) < 2 * LIMITS[dtype]


# The orders that a kernel cannot read. Those of SPLIT have an axis of features on each side of the outputs.
SPLIT = ("ZOX", "XOZ")
COPIED = {  # (primitive, dtype, many rows)
    ("forward", torch.float32, True): SPLIT,
    ("forward", torch.float32, False): SPLIT,
    ("forward", torch.bfloat16, True): SPLIT,
    ("forward", torch.bfloat16, False): SPLIT,
    ("forward", torch.float16, True): (),
    ("forward", torch.float16, False): SPLIT,
    ("input_grads", torch.float64, True): ("ZXO", "XZO"),
}


@pytest.mark.parametrize("rows", [20, 2])
@pytest.mark.parametrize(
    ("order", "dtype"), cases(["ZOX", "ZXO", "gaps"], "OZX", "OXZ", "XOZ", "XZO"), ids=str
)
def test_what_is_copied(order, dtype, rows, emulated, monkeypatch):
    """And that explain says so: to the byte, with the memory of the partial sums."""
    monkeypatch.setattr(planners, "query", partial(getattr, emulated))
    monkeypatch.setattr(planners, "gpu", lambda device: (80, 40))
    emulated.emulated_processors(40)
    x, z, w, u, v, _, g = draw((rows, 24, 32, 40), dtype)
    weight = gaps(w) if order == "gaps" else stored(w, order)
    x, z = x.requires_grad_(), z.requires_grad_()
    explained = plan.plan("cuda", x, z, (weight, u, v, None))
    weights = plan.plan("cuda", x.detach(), z.detach(), (weight.requires_grad_(), u, v, None)).backward[0]
    gate = gate_plan.gated(
        "cuda", "tanh", x.shape[:-1], x.detach(), z.detach(), weight[:32], None, None, None
    )
    x, z, weight = x.detach(), z.detach(), weight.detach()
    calls = {
        "forward": (explained, lambda: emulated.interaction(x, z, weight, u, v, None)),
        "input_grads": (
            explained.backward[0],
            lambda: emulated.interaction_input_grads(g, x, z, weight, u, v, True, True),
        ),
        "weight_grads": (weights, lambda: in_order(emulated, order, g, x, z)),
        "gate": (
            gate,
            lambda: emulated.gated_interaction(x, z, weight[:32], None, None, None, "tanh", False),
        ),
    }
    for name, (step, call) in calls.items():
        emulated.emulated_repacks()
        kept = []
        peak = peak_memory(lambda call=call, kept=kept: kept.append(call()))
        copies = emulated.emulated_repacks()
        read = "forward" if name == "gate" else name
        expected = (
            order in COPIED.get((read, dtype, rows > 8), ()) or order == "gaps" and read != "weight_grads"
        )
        if (read, dtype) == ("forward", torch.float64):
            expected = order in (*SPLIT, "gaps")
        assert copies == expected, (name, copies)
        to = "[O, X, Z]" if order in ("OXZ", "XOZ", "XZO") else "[O, Z, X]"
        said = re.search(rf"is copied to {re.escape(to)} \((\d+) bytes\);", step.why)
        assert bool(said) == expected
        if said:
            assert int(said[1]) == (weight[:32] if name == "gate" else weight).numel() * weight.element_size()
        results = kept[0] if isinstance(kept[0], tuple) else kept
        size = sum(t.numel() * t.element_size() for t in results)
        assert peak == step.scratch + size, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gathers_are_not_repeated(dtype, emulated):
    """W along the outputs without whole chunks is copied for several row tiles if the copy has them."""
    for rows, width, copies in ((140, 24, 2), (20, 24, 0), (140, 21, 0)):
        arguments = draw((rows, 3, width, 10), dtype)
        arguments[2] = stored(arguments[2], "ZXO")
        emulated.emulated_repacks()
        for found, exact in zip(primitives(emulated, *arguments), truth(*arguments), strict=True):
            assert relative_error(found, exact) < LIMITS[dtype]
        assert emulated.emulated_repacks() == copies


def test_explain_knows_alignment(emulated, monkeypatch):
    """A few rows read elements where W begins between boundaries, in other splits than by chunks."""
    monkeypatch.setattr(planners, "query", partial(getattr, emulated))
    monkeypatch.setattr(planners, "gpu", lambda device: (80, 40))
    emulated.emulated_processors(40)
    x, z, w, *_ = draw((2, 24, 64, 64), torch.bfloat16)
    grad = torch.ones_like(x)
    scratch = set()
    for start in (0, 1):
        buffer = torch.empty(w.numel() + start, dtype=w.dtype)[start:]
        weight = buffer.view(24, 64, 64).permute(2, 0, 1).copy_(w)
        product = plan.plan("cuda", x.clone().requires_grad_(), z, (weight, None, None, None))
        gate = gate_plan.gated("cuda", "tanh", x.shape[:-1], x, z, weight, None, None, None)
        calls = (
            (product, lambda w: emulated.interaction(x, z, w, None, None, None)),
            (
                product.backward[0],
                lambda w: emulated.interaction_input_grads(grad, x, z, w, None, None, True, False),
            ),
            (gate, lambda w: emulated.gated_interaction(x, z, w, None, None, None, "tanh", False)),
        )
        for step, call in calls:
            assert peak_memory(partial(call, weight)) == step.scratch + x.numel() * x.element_size()
        scratch |= {product.scratch}
    assert len(scratch) == 2


def test_explain_knows_an_expanded_weight(tf32, monkeypatch):
    """Its axis has no place among the others: z, inside it, is exchanged with x, and T = g W reads chunks."""
    monkeypatch.setattr(planners, "query", partial(getattr, tf32))
    monkeypatch.setattr(planners, "gpu", lambda device: (80, 3))
    before = tf32.emulated_processors(3)
    x, z, _, _, _, _, g = draw((1, 16, 16, 64), torch.float32)
    weight = torch.randn(16 * 68).as_strided((64, 16, 16), (1, 68, 0))
    step = plan.plan("cuda", x.clone().requires_grad_(), z, (weight, None, None, None)).backward[0]
    peak = peak_memory(lambda: tf32.interaction_input_grads(g, x, z, weight, None, None, True, False))
    assert peak == step.scratch + x.numel() * x.element_size()
    tf32.emulated_processors(before)


def in_order(operations, order, g, x, z):
    """dW in the order of W, as autograd.py computes it."""
    factors = {"O": g, "Z": z, "X": x}
    outer, middle, inner = (factors[axis] for axis in (order if order in ORDERS else "OZX"))
    return operations.interaction_weight_grads(outer, inner, middle, True, False, False, False)


@pytest.mark.parametrize("order", [*ORDERS, "gaps"])
def test_torch_copies_nothing(order, emulated):
    """Only the kernel of common/repack.cuh copies W, and nothing copies dW."""
    x, z, w, u, v, c, g = draw((20, 3, 16, 24), torch.bfloat16)
    weight = gaps(w) if order == "gaps" else stored(w, order)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        primitives(emulated, x, z, weight, u, v, c, g)
        emulated.gated_interaction(x, z, weight[:16], None, None, None, "tanh", True)
        in_order(emulated, order, g, x, z)
    called = {event.key for event in profile.key_averages()}
    assert "aten::new_empty" in called  # those within the operations are seen
    assert not called & {"aten::contiguous", "aten::clone", "aten::copy_", "aten::_to_copy"}
