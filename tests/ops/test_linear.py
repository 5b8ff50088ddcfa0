"""Products without W: of many rows, outputs in the lanes, in one or several stretches; of a few, streamed.

Of up to 256 rows, a matrix with contiguous lanes is read in place but for its last lanes: V stored by
inputs in the forward pass, x in the gradient of V.
"""

import subprocess
import sys

import pytest
import torch

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.samples import Sample, Shape

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The matrix is packed in stretches of 256 words; lanes are 4 to 16 wide; tiles are 4 or 8 rows high.
SHAPES = {
    "plain": (Shape("plain", (300,), 64, 96, 128), (False, True, True, True)),
    "odd": (Shape("odd", (203,), 33, 101, 79), (False, True, True, True)),
    "long": (Shape("long", (450,), 531, 9, 61), (False, True, False, True)),
    "two-stretches": (Shape("two-stretches", (500,), 601, 17, 48), (False, True, True, False)),
    "one-output": (Shape("one-output", (300,), 48, 20, 1), (False, True, True, True)),
    "regions": (Shape("regions", (2100,), 16, 20, 300), (False, True, False, False)),
    "in-place": (Shape("in-place", (70,), 19, 300, 117), (False, False, True, True)),
    "last-in-place": (Shape("last-in-place", (256,), 33, 70, 90), (False, True, True, False)),
    "nothing-to-sum": (Shape("nothing-to-sum", (200,), 0, 40, 50), (False, True, True, True)),
    # Streamed: tiles have up to 4 rows, summation blocks 32 vectors of 16 in the sum, 16 across it.
    "one-row": (Shape("one-row", (1,), 1203, 9, 61), (False, True, True, True)),
    "two-rows": (Shape("two-rows", (2,), 64, 32, 400), (False, True, True, False)),
    "three-rows": (Shape("three-rows", (3,), 71, 33, 150), (False, True, True, True)),
    "seven-rows": (Shape("seven-rows", (7,), 33, 101, 79), (False, True, False, True)),
    "few-outputs": (Shape("few-outputs", (5,), 601, 20, 7), (False, True, True, True)),
}


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"], scope="module")
@pytest.mark.parametrize("name", SHAPES, scope="module")
def test_error_rule(name, layout, dtype, place):
    sample = Sample(*SHAPES[name], layout)

    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 70])
def test_generated_weights(rows, dtype, groups, place):
    """Groups of matrices that lie along their outputs and along the sum."""

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(groups, rows, 37, generator=generator).to(dtype)
        w = torch.randn(groups, 37, 80, generator=generator).to(dtype)
        return x.to(place.device), w.to(place.device)

    check_errors(
        lambda x, w: [mi.apply_generated(x, m.unsqueeze(1)) for m in (w.mT, w.mT.contiguous())],
        lambda x, w: [torch.einsum("gtj,gjo->gto", x, w)] * 2,
        draw,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, place):
    """Of the same number of rows, so that both calls have one plan."""
    x, z, _, u, v, c = Sample(*SHAPES["odd"]).arguments(dtype, place.device)
    y = mi.interaction(x, z, None, u, v, c)
    x, z = x.roll(1, 0), z.roll(1, 0)
    x[0] = z[0] = float("nan")
    moved = mi.interaction(x, z, None, u, v, c)
    assert torch.equal(y[:-1], moved[1:])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 30, 300])
def test_nothing_beyond_a_row_is_taken_for_it(rows, dtype, place):
    """Vectors that reach over the end of an output see the next one, or NaN, or the end of the memory."""
    memory = torch.full((40, 50), float("nan"), dtype=dtype, device=place.device)
    weight = memory[:, :37]
    weight.copy_(torch.ones(40, 37))
    weight[3] = float("inf")
    for matrix in (weight, weight[:37].mT):
        x = torch.ones(rows, matrix.shape[1], dtype=dtype, device=place.device)
        y = mi.interaction(x, x[:, :0], None, None, matrix)
        assert torch.equal(y, matrix.sum(1).expand_as(y))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [3, 30, 300])
def test_no_gradient_sees_what_lies_beside_a_row(rows, dtype, place):
    memory = torch.full((rows, 50), float("nan"), dtype=dtype, device=place.device)
    x = memory[:, 3:40]
    x.copy_(torch.ones(rows, 37))
    weight = torch.zeros(40, 37, dtype=dtype, device=place.device, requires_grad=True)
    mi.interaction(x, x[:, :0], None, None, weight).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, rows))


# Each tensor ends where its memory does, at a page that must not be touched. The mapping is never freed.
GUARDED = """
import ctypes, mmap, torch
import mi_kernels as mi

def guarded(*shape):
    values = torch.randn(shape)
    size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    found = torch.frombuffer(memory, dtype=torch.float32, count=values.numel(), offset=size - values.nbytes)
    return found.view(shape).copy_(values)

for rows in (3, 20, 257):
    for features in (*range(1, 50), 63, 64, 65, 95, 97):
        x, weight = guarded(rows, 9), guarded(9, features)
        y = mi.apply_generated(x, weight.T)
        torch.testing.assert_close(y, x @ weight)
        x, weight = guarded(rows, features), guarded(40, features).requires_grad_()
        mi.apply_generated(x, weight).sum().backward()
        torch.testing.assert_close(weight.grad, x.sum(0).expand(40, features), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.subprocess
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of the C library")
def test_nothing_is_read_beyond_the_memory():
    """A vector that reaches over the last row is no wrong value, as its lanes are not stored."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_few_rows_make_no_partial_sums():
    """They would take as much memory as the result for each part, and longer than the products."""
    if backends.why_not("cpu") is not None:
        pytest.skip(backends.why_not("cpu"))
    torch.set_num_threads(1)
    for rows in (16, 70, 127):
        plan = torch.ops.mi_kernels.cpu_interaction_plan(
            "weight_grads", [1, rows, 0, 500, 500], torch.float32, 4
        )
        (scratch,) = (part for part in plan.split(";") if part.startswith("scratch="))
        assert int(scratch.removeprefix("scratch=")) < 500 * 500 * 4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 12, 24])
@pytest.mark.parametrize("across", [False, True])
def test_streamed_tasks_keep_to_their_memory(across, rows, dtype, place):
    """Large enough for several workers; each has scratch beside that of the next."""
    torch.set_num_threads(3)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1030, generator=generator).to(dtype).to(place.device)
    weight = torch.randn(1030, 1100, generator=generator).to(dtype).to(place.device).T
    weight = weight if across else weight.contiguous()
    expected = x.double() @ weight.double().T
    for _ in range(5):
        y = mi.interaction(x, x[:, :0], None, None, weight)
        error = (y.double() - expected).norm() / expected.norm()
        assert error < {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("depth", [2000, 20000])
def test_streamed_sums_of_positive_numbers(depth, across, place):
    """Rounding errors of one long sum grow with it; these are sums of sums."""

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(4, depth, generator=generator).to(place.device)
        weight = torch.rand(depth, 80, generator=generator).to(place.device).T
        return x, weight if across else weight.contiguous()

    check_errors(
        lambda x, w: [mi.interaction(x, x[:, :0], None, None, w)],
        lambda x, w: [torch.einsum("bk,ok->bo", x, w)],
        draw,
    )


def within_nan(values, by_outputs=False):
    """The same matrix with NaN before, behind and beside its rows, or its columns."""
    if by_outputs:
        return within_nan(values.mT).mT
    memory = torch.full((values.shape[0] + 2, values.shape[1] + 7), float("nan"), dtype=values.dtype)
    return memory[1:-1, 2:-5].copy_(values)


def products(by_outputs):
    """y = V x + c, dx = V^T g, dV = g^T x, of arguments that NaN surrounds."""

    def call(g, x, weight, bias):
        g, x, weight = within_nan(g), within_nan(x), within_nan(weight, by_outputs)
        nothing = x[:, :0]
        y = torch.ops.mi_kernels.interaction(x, nothing, None, None, weight, bias)
        dx, _ = torch.ops.mi_kernels.interaction_input_grads(g, x, nothing, None, None, weight, True, False)
        _, _, dv, dc = torch.ops.mi_kernels.interaction_weight_grads(g, x, nothing, False, False, True, True)
        return [y, dx, dv, dc]

    return call


def products_of(rows, depth, out, dtype):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        sizes = (rows, out), (rows, depth), (out, depth), (out,)
        return [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    return draw


def check_products(rows, depth, out, dtype, by_outputs):
    check_errors(
        products(by_outputs),
        lambda g, x, weight, bias: [
            torch.einsum("bk,ok->bo", x, weight) + bias,
            torch.einsum("bo,ok->bk", g, weight),
            torch.einsum("bo,bk->ok", g, x),
            g.sum(0),
        ],
        products_of(rows, depth, out, dtype),
        oracle=("rows of products", rows, depth, out, dtype),
    )


needs_cpu = pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")


@needs_cpu
@pytest.mark.parametrize("by_outputs", [False, True], ids=["k-major", "n-major"])
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("rows", range(1, 41))
def test_any_number_of_rows(rows, dtype, by_outputs):
    """The last tile is whole, half or partly empty; outputs fill their lanes or leave some of them."""
    for depth, out in ((19, 48), (40, 37), (130, 16)):
        check_products(rows, depth, out, dtype, by_outputs)


@needs_cpu
@pytest.mark.parametrize("by_outputs", [False, True], ids=["k-major", "n-major"])
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("rows", [2, 3, 9, 12, 17, 20, 33])
def test_a_bad_row_reaches_no_other(rows, dtype, by_outputs):
    """Of those in its tile."""
    for depth, out in ((40, 37), (300, 16)):
        g, x, weight, bias = products_of(rows, depth, out, dtype)(0)
        before = products(by_outputs)(g, x, weight, bias)
        x[-1] = g[-1] = float("nan")
        after = products(by_outputs)(g, x, weight, bias)
        for one, other in zip(before[:2], after[:2], strict=True):
            assert torch.equal(one[:-1], other[:-1]) and other[-1].isnan().all()


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("rows", range(9, 25))
def test_long_sums_of_some_rows_are_streamed(rows, dtype):
    """From 256 elements on, in a matrix that is contiguous along them."""
    for depth, out in ((255, 11), (256, 11), (301, 40), (1203, 5)):
        check_products(rows, depth, out, dtype, by_outputs=False)


def test_equal_rows_give_equal_results(place):
    """Also the last one of so many that it is alone in its task."""
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)).expand(32769, 300).contiguous()
    weight = torch.randn(256, 300, generator=torch.Generator().manual_seed(1))
    x, weight = x.to(place.device), weight.to(place.device)
    y = mi.interaction(x, x[:, :0], None, None, weight)
    if place.backend == "cpu":
        assert torch.equal(y, y[:1].expand_as(y))
    else:
        assert torch.allclose(y, y[:1].expand_as(y), rtol=1e-4, atol=1e-4)


def test_the_shift_of_a_gate_is_summed_before_it_is_added(place):
    """As the formula has it: g x + (C z + c), where (g x + C z) + c would overflow."""
    x, z, big = torch.full((100, 48), 3e38), torch.ones(100, 1), torch.full((48, 1), 3e38)
    x, z, big = x.to(place.device), z.to(place.device), big.to(place.device)
    y = mi.diagonal(x, z, torch.zeros_like(big), None, big, -big.squeeze(1), scale_offset=1.0)
    assert torch.equal(y, x)
