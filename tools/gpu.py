"""Timing on a GPU, and the facts about it that measurements depend on."""

import re
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import timing

FLUSHED = 2  # L2 sizes written before each call, to flush the cache


class EventClock:
    """Times calls by events on the current stream, each with a cold L2 cache.

    The writes that flush the cache also keep the GPU busy while the host launches the call, so that the cost
    of launching is not in the time unless it is longer than they are.
    """

    def __init__(self, device: str):
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.flush = torch.empty(FLUSHED * size, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object], calls: int) -> timing.Sample:
        pairs = []
        for _ in range(calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize(self.device)
        seconds = sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / calls
        return timing.Sample(seconds, 1.0)


def clock_of(device: str) -> timing.Clock:
    """Wall-clock time for the CPU, events for a GPU."""
    return timing.wall if torch.device(device).type == "cpu" else EventClock(device)


def facts(device: str) -> dict[str, Any]:
    """Name, capability, memory, caches, and current clocks and power as the driver reports them."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> dict[str, str] | None:
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (field.strip() for field in done.stdout.splitlines()[0].split(",")), strict=True))


def slug(name: str) -> str:
    """A device's name for use in a file name: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
