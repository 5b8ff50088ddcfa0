"""Same inputs, same bits: run to run, for any number of threads, in forked processes and many callers."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mi_kernels as mi
from mi_kernels.testing.samples import MIDDLE, THREADED, Sample, Shape

# All worth sharing between threads: sums split over the batch, the context or the outputs, or none of them.
SHAPES = (
    THREADED,
    Shape("batch", (3000,), 8, 24, 16),
    Shape("one-row", (1,), 64, 256, 96),
    Shape("context", (8,), 700, 16, 24),
    Shape("outputs", (16,), 4, 33, 700),
)
RESULTS = ("y", "dx", "dz", "dW", "dU", "dV", "dc", "ddx", "ddz", "ddW", "ddU", "ddV")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def everything(sample, dtype, device="cpu"):
    """y, all gradients, and the gradients of the squared gradients."""
    leaves = sample.arguments(dtype, device, requires_grad=True)
    y = mi.interaction(*leaves)
    first = torch.autograd.grad(y, leaves, sample.cotangent(dtype, device), create_graph=True)
    # The first derivatives do not depend on the bias.
    second = torch.autograd.grad(sum(g.float().pow(2).mean() for g in first), leaves[:5])
    results = [t.detach() for t in (y, *first, *second)]
    assert all(t.isfinite().all() for t in results)
    return results


def differing(one, other):
    """Names of the results whose bits differ."""
    return [name for name, a, b in zip(RESULTS, one, other, strict=True) if not torch.equal(a, b)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_runs_and_thread_counts(shape, dtype, place):
    if place.backend == "portable":
        # Its matrix products are PyTorch's, which promise nothing for other numbers of threads.
        threads: tuple[int, ...] = (torch.get_num_threads(),) * 3
    else:
        threads = (1, 1, 2, 2, 3)
    results = []
    for count in threads:
        torch.set_num_threads(count)
        results.append(everything(Sample(shape), dtype, place.device))
    for result in results[1:]:
        assert differing(results[0], result) == []


def test_allocation_does_not_matter(place):
    """Other addresses and alignments of the same numbers give the same bits."""
    sample = Sample(THREADED)
    expected = mi.interaction(*sample.arguments(torch.float32, place.device))
    kept = [torch.empty(size) for size in (1, 17, 1001)]
    for _ in kept:
        assert torch.equal(mi.interaction(*sample.arguments(torch.float32, place.device)), expected)


def _in_child(sample, queue):
    # As PyTorch's data loaders do: GNU OpenMP cannot start threads again in a forked child, for any operator.
    torch.set_num_threads(1)
    queue.put([t.numpy() for t in everything(sample, torch.float32)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_process(place):
    """A child of a process whose thread pool has run does not hang and computes the same."""
    if place.device != "cpu":
        pytest.skip("CUDA does not survive a fork")
    sample = Sample(SHAPES[1])
    torch.set_num_threads(1)
    expected = everything(sample, torch.float32)
    torch.set_num_threads(2)
    everything(sample, torch.float32)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(sample, queue))
    child.start()
    try:
        found = queue.get(timeout=300)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert differing(expected, [torch.from_numpy(array) for array in found]) == []


@pytest.mark.parametrize("shape", [MIDDLE, THREADED], ids=lambda shape: shape.name)
def test_many_callers(shape, place):
    samples = [Sample(shape, magnitude=1.0 + k) for k in range(8)]
    expected = [everything(sample, torch.float32, place.device) for sample in samples]

    def caller(sample):
        with mi.backend(place.backend):  # each thread chooses for itself
            return [everything(sample, torch.float32, place.device) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for truth, results in zip(expected, pool.map(caller, samples), strict=True):
            for result in results:
                assert differing(truth, result) == []
