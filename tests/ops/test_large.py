"""Addresses past 2^31 elements. Slow, but part of the suite: up to 9 GiB, some seconds each."""

import pytest
import torch

import mi_kernels as mi

pytestmark = pytest.mark.slow
FAR = (1 << 31) + 4096
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _memory(_poisoned_memory):
    """Untouched pages cost nothing; filling them would."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if available < 11 << 20:
        pytest.skip(f"needs 11 GiB of memory, {available >> 20} GiB are available")
    yield


def close(found, expected):
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_rows_far_apart(place):
    """Three rows, the last of which starts beyond 2^31 elements."""
    stride = FAR // 2
    buffer = torch.empty(2 * stride + 16, dtype=DTYPE, device=place.device)
    x = buffer.as_strided((3, 16), (stride, 1)).copy_(torch.randn(3, 16))
    z, w = torch.randn(3, 5).to(x), torch.randn(7, 5, 16).to(x)
    grad = torch.randn(3, 7).to(x)
    near = x.clone(memory_format=torch.contiguous_format)
    results = []
    for tensor in (x, near):
        leaves = [t.detach().requires_grad_() for t in (tensor, z, w)]
        y = mi.interaction(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    for found, expected in zip(*results, strict=True):
        close(found, expected)


def test_large_weight(place):
    """W of more than 2^31 elements is read, and dW written, to its end."""
    if place.backend == "portable":
        pytest.skip("PyTorch's own operators do the addressing there; dW is summed in float32, in all 18 GiB")
    width, context = 256, 128
    out = FAR // (width * context) + 1
    weight = torch.zeros(out, context, width, dtype=DTYPE, device=place.device)
    last = weight[-3:].copy_(torch.randn(3, context, width) / 64)
    x = torch.randn(2, width).to(last)
    z = torch.randn(2, context).to(last)
    y = mi.interaction(x, z, weight)
    close(y[:, -3:], torch.einsum("bi,oij,bj->bo", z.float(), last.float(), x.float()))
    assert y[:, :-3].eq(0).all()

    grad = torch.zeros(2, out, dtype=DTYPE, device=place.device)
    grad[:, -3:] = torch.randn(2, 3)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(mi.interaction(leaf, z, weight), leaf, grad)
    close(dx, torch.einsum("bo,bi,oij->bj", grad[:, -3:].float(), z.float(), last.float()))

    weight.requires_grad_()
    (dw,) = torch.autograd.grad(mi.interaction(x, z, weight), weight, grad)
    close(dw[-3:], torch.einsum("bo,bi,bj->oij", grad[:, -3:].float(), z.float(), x.float()))
    assert dw[:3].eq(0).all()


def test_large_batch(place):
    """x, and dx, of more than 2^31 elements."""
    if place.backend == "portable":
        pytest.skip("PyTorch's own operators do the addressing there, in minutes and with 16 GiB")
    width = 128
    rows = FAR // width
    x = torch.zeros(rows, width, dtype=DTYPE, device=place.device)
    x[-3:] = torch.randn(3, width)
    z = torch.zeros(rows, 1, dtype=DTYPE, device=place.device)
    z[-3:] = torch.randn(3, 1)
    weight = torch.randn(1, 1, width).to(x)
    expected = torch.einsum("bi,oij,bj->bo", z[-3:].float(), weight.float(), x[-3:].float())
    y = mi.interaction(x, z, weight)
    close(y[-3:], expected)
    assert y[:-3].eq(0).all()

    x.requires_grad_()
    grad = torch.ones_like(y)
    (dx,) = torch.autograd.grad(mi.interaction(x, z, weight), x, grad)
    close(dx[-3:], z[-3:].float() * weight[0].float())
    assert dx[:-3:4096].eq(0).all()
