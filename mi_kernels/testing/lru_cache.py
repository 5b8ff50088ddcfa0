"""A cache of tensors, bounded in bytes: the least recently used go first. And random numbers from one."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


class LRUCache:
    """Values by name; the least recently used go while all together are larger than ``most`` bytes."""

    def __init__(self, most: int):
        self.most, self.bytes = most, 0
        self._found: dict[Hashable, tuple[Any, int]] = {}  # the one used last at the end

    def get(self, name: Hashable) -> Any:
        """None where nothing has this name."""
        if name not in self._found:
            return None
        self._found[name] = self._found.pop(name)
        return self._found[name][0]

    def keep(self, name: Hashable, value: Any, size: int) -> Any:
        """The value itself, which has this size in bytes."""
        self.bytes += size - self._found.pop(name, (None, 0))[1]
        self._found[name] = value, size
        while self.bytes > self.most:
            self.bytes -= self._found.pop(next(iter(self._found)))[1]
        return value

    def of(self, name: Hashable, make: Callable[[], Any], size_of: Callable[[Any], int]) -> Any:
        """The value of this name, made where it is not known."""
        value = self.get(name)
        if value is None:
            value = make()
            self.keep(name, value, size_of(value))
        return value


_DRAWN = LRUCache(64 << 20)  # the same numbers in every dtype, of values and of gradients


def normal(sizes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    """Tensors of these sizes in float64, one after the other from a seed. LRUCache: not to be changed."""

    def drawn() -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]

    return _DRAWN.of((tuple(sizes), seed), drawn, bytes_of)
