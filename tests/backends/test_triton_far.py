"""Addresses beyond 2^31 in the Triton kernels, in the interpreter: operands and results with far dimensions.

Each dimension of each operand in turn is laid out with 2^32 elements from its first to its last index, in
memory that is reserved and not touched: a few pages of it exist. In front lie 2^31 elements more, so that an
offset that wraps around finds zeros instead of a segmentation fault. test_triton.py runs this file.
"""

import mmap

import pytest
import torch

from mi_kernels import backends
from mi_kernels.testing.samples import NAMES, Sample, Shape

pytest.importorskip("triton")
from mi_kernels.ops.triton import gate as diagonal
from mi_kernels.ops.triton import host, interaction, plan

pytestmark = pytest.mark.skipif(not backends.interpreting(), reason="part of test_triton.py")
SHAPE = Shape("far", (70,), 3, 70, 70)  # two tiles of rows and of columns, three of the sums over them
DTYPE = torch.float16
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on


def far(tensor, dim, spread=1 << 32):
    """The same values with dimension ``dim`` spread over so many elements."""
    near = tensor.movedim(dim, 0)
    stride = spread // near.shape[0] + 3  # the last tile begins beyond 2^31
    first = 1 << 31
    room = (first + stride * near.shape[0] + near[0].numel()) * tensor.element_size()
    pages = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    memory = torch.frombuffer(pages, dtype=tensor.dtype)
    strides = stride, *near[0].contiguous().stride()
    return memory.as_strided(near.shape, strides, first).copy_(near).movedim(0, dim)


def operands(groups=()):
    """grad, x, z, W, U, V, c."""
    shape = SHAPE if not groups else Shape("far", (4,), 3, 5, 6)
    seeds = range(*(groups or (1,)))
    drawn = [
        (Sample(shape).cotangent(DTYPE, seed=s + 9), *Sample(shape).arguments(DTYPE, seed=s)) for s in seeds
    ]
    return [torch.stack(tensors) if groups else tensors[0] for tensors in zip(*drawn, strict=True)]


def results(grad, x, z, w, u, v, c):
    yield from (
        interaction.forward(x, z, w, u, v, c),
        *interaction.input_grads(grad, x, z, w, u, v, True, True),
    )
    yield from interaction.weight_grads(grad, x, z, True, True, True, True)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


NEAR = ("grad", *NAMES)
DIMS = [
    (place, dim)
    for place, tensor in enumerate((SHAPE.sizes()[0], *SHAPE.sizes()))
    for dim in range(len(tensor))
]


@pytest.fixture(scope="module")
def expected():
    return list(results(*operands()))


@pytest.mark.parametrize(("place", "dim"), DIMS, ids=[f"{NEAR[place]}-{dim}" for place, dim in DIMS])
def test_operands(place, dim, expected):
    tensors = operands()
    tensors[place] = far(tensors[place], dim)
    assert_same(results(*tensors), expected)


@pytest.mark.parametrize("place", range(7), ids=NEAR)
def test_groups(place):
    tensors = operands((3,))
    near = list(results(*tensors))
    tensors[place] = far(tensors[place], 0)
    assert_same(results(*tensors), near)


@pytest.mark.parametrize("name", ["y", "dx", "dz", "dw"])
def test_results(name):
    grad, x, z, w, *_ = operands()
    ways = {
        "y": (x.new_empty(grad.shape), lambda y: host.contraction(y, x, z, w)),
        "dx": (
            torch.empty_like(x),
            lambda dx: interaction.fused_grads(grad, x, z, w, None, None, dx, torch.empty_like(z)),
        ),
        "dz": (torch.empty_like(z), lambda dz: interaction.fused_grads(grad, x, z, w, None, None, None, dz)),
        "dw": (torch.empty_like(w), lambda dw: host.weight_grad(dw, grad, z, x)),
    }
    result, compute = ways[name]
    compute(result)
    for dim in range(result.dim()):
        distant = far(torch.zeros_like(result), dim)
        compute(distant)
        assert torch.equal(distant, result)


@pytest.mark.parametrize(
    ("place", "dim", "width"),
    [(0, 1, 70), (1, 1, 16), (2, 1, 16), (2, 2, 70)],
    ids=["x", "z", "weight-1", "weight-2"],
)
def test_a_tile_that_stays(place, dim, width):
    """The style of float64 that has the context for its inner loop. The wider one has it in more parts."""
    tensors = list(Sample(Shape("held", (2,), 20, width, 9)).arguments(torch.float64)[:3])
    launches, _ = plan.record(interaction.forward, (*tensors, None, None, None), tensors[0].device)
    assert launches[0].arguments["STYLE"] == "held" and (width > 16 or launches[0].arguments["splits"] == 2)
    expected = interaction.forward(*tensors, None, None, None)
    tensors[place] = far(tensors[place], dim, 1 << 33)
    assert torch.equal(interaction.forward(*tensors, None, None, None), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_softmax(dim):
    x, z, weight = (torch.randn(sizes).to(DTYPE) for sizes in ((5, 5), (5, 2), (5, 2)))
    near, distant = (
        diagonal.diagonal(t, z, weight, None, None, None, None, "softmax", 0.5, True)
        for t in (x, far(x, dim))
    )
    assert_same(distant, near)
