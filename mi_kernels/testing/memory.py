"""Memory that a computation needs on top of what it was given."""

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(fn: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes of CPU memory that were allocated at one time while ``fn()`` ran, above the start.

    Method: PyTorch's profiler records an event for each allocation (positive) and each release
    (negative) of torch's CPU allocator, wherever it was made: by an operator of PyTorch, by autograd,
    or inside a compiled kernel that allocates its scratch through torch. The result is the greatest
    running sum of these events in order of time, at least 0. What ``fn`` returns counts as long as it
    is alive; the release of what existed before is not seen, and not subtracted.

    Not seen: memory from other allocators (malloc in a library, Python objects, GPUs), and allocations
    in threads that ``fn`` starts itself. Caches that fill on a first call are part of that call: run
    ``fn`` once before, if they should not count.

    With a GPU for ``device``, the same of its memory, by the statistics of PyTorch's allocator there.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        del result
        return max(torch.cuda.max_memory_allocated(device) - before, 0)
    # The profiler's own log lines ("USDT: ... profiler_start") would end up among the caller's output.
    # The variable is read when the first profiler of the process starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = fn()
    del result
    events = recorded.profiler.kineto_results.events()
    cpu = torch.autograd.DeviceType.CPU
    changes = [
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type() == cpu
    ]
    # A stable sort by time alone: events of one instant stay in the order in which they were recorded.
    changes.sort(key=lambda change: change[0])
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak
