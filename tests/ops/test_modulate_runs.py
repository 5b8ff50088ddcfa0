"""Modulation and mixtures of short runs, of which the CPU kernels compute many at a time."""

import ctypes
import sys

import pytest
import torch

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops.modulate import reference

LENGTHS = (*range(1, 71), 96, 127, 128, 200, 255, 256, 257, 300)
# Of x [B, C, n], which operands are shared by what: by the runs of a map, by all maps, by positions of a run.
CONTEXTS = {
    "run": ("BC1", "BC1"),
    "channel": ("1C1", "1C1"),
    "channel of the shift": ("BC1", "1C1"),
    "channel of the scale": ("1C1", "BC1"),
    "map": ("B11", "B11"),
    "position": ("11n", "11n"),
    "position of a map": ("B1n", "B1n"),
    "position and element": ("11n", "BCn"),
    "run and element": ("BC1", "BCn"),
    "run without a shift": ("BC1", None),
}


@pytest.fixture(autouse=True)
def _on_the_cpu():
    if (why := backends.why_not("cpu")) is not None:
        pytest.skip(why)
    with mi.backend("cpu"):
        yield


def sizes(context, shape):
    return (
        None if context is None else [1 if c == "1" else size for c, size in zip(context, shape, strict=True)]
    )


def drawn(size, offset=0):
    """A tensor that begins at some element of its memory."""
    if size is None:
        return None
    count = torch.Size(size).numel()
    return torch.randn(count + offset, dtype=torch.float64)[offset:].view(size)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def values_and_gradients(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS)
def test_every_length_of_a_run(contexts):
    def ours(*t):
        return mi.modulate(*t, activation="tanh", scale_offset=0.5)

    def theirs(*t):
        return reference.modulate(*t, activation="tanh", scale_offset=0.5)

    for n in LENGTHS:
        shape = (2, 37, n) if n // 2 % 2 else (3, 5, n)
        x, grad = drawn(shape, n % 5), drawn(shape, n % 3)
        tensors = (x, *(drawn(sizes(context, shape), n % 5) for context in contexts))
        same(*(values_and_gradients(f, tensors, grad) for f in (ours, theirs)))


@pytest.mark.parametrize("gate", ["BC1", "1C1", "B11", "11n", "B1n"])
def test_every_length_of_a_mixed_run(gate):
    for n in LENGTHS:
        a, b, grad = (drawn((3, 21, n), n % k) for k in (5, 3, 2))
        tensors = a, b, drawn(sizes(gate, a.shape))
        same(*(values_and_gradients(f, tensors, grad) for f in (mi.mix, reference.mix)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_element_has_the_same_bits_wherever_it_is(dtype):
    """Whether it is in a whole vector, in the last part of one, or in one with another run."""
    for n in (3, 9, 17, 49, 100):
        x = (torch.randn(64 * n) * 10.0 ** torch.randint(-42, 2, (64 * n,))).to(dtype)
        scale = torch.randn(64, 1).to(dtype)
        y = mi.modulate(x.view(64, n), scale, activation="sigmoid")
        for rows in (slice(0, 7), slice(5, 6), slice(63, 64)):
            assert torch.equal(mi.modulate(x.view(64, n)[rows], scale[rows], activation="sigmoid"), y[rows])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc how much of the heap is in use")
def test_calls_leave_nothing_on_the_heap():
    """A string argument that is not freed: the memory of results is then not reused either."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33 for mallinfo2")

    class Information(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks in_use free keep".split()
        ]

    libc.mallinfo2.restype = Information
    x, scale = torch.randn(2, 3, 4), torch.randn(2, 3, 1)
    operations = torch.ops.mi_kernels
    calls = 500

    def call():
        operations.modulate(x, scale, scale, "sigmoid", 0.0, 1.0)
        operations.modulate_grads(x, x, scale, scale.shape, "sigmoid", 0.0, True, True, True, 1.0)
        operations.mix(x, x, scale, "sigmoid")
        operations.mix_grads(x, x, x, scale, "sigmoid", True, True, True)

    for _ in range(100):
        call()
    before = libc.mallinfo2().in_use
    for _ in range(calls):
        call()
    assert libc.mallinfo2().in_use - before < 16 * calls  # a chunk is at least 32 bytes
