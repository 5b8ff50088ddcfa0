"""Arguments of mixtures: the part of samples.py for them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .samples import LAYOUTS, Modulation


@dataclass(frozen=True)
class Mixing:
    """Arguments of a mixture: everything but dtype, device and seed."""

    name: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    gate: tuple[int, ...]
    layout: str = "contiguous"
    activation: str = "sigmoid"

    def __str__(self) -> str:
        return str(self._tensors)

    @property
    def _tensors(self) -> Modulation:
        """What draws the same tensors."""
        return Modulation(self.name, self.a, self.b, self.gate, self.layout, self.activation)

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}

    @property
    def shape(self) -> torch.Size:
        return self._tensors.shape

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and gate. The same numbers in every dtype, rounded."""
        a, b, gate = self._tensors.arguments(dtype, device, seed, requires_grad)
        assert gate is not None
        return a, b, gate

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        return self._tensors.cotangent(dtype, device, seed)


TOKENS = Mixing("tokens", (3, 19, 40), (3, 19, 40), (3, 1, 40))
MAPS = Mixing("maps", (2, 5, 6, 7), (2, 5, 6, 7), (2, 5, 1, 1))
FULL = Mixing("full", (7, 33), (7, 33), (7, 33))


def mixings() -> Iterator[Mixing]:
    """Every pattern of broadcasting, layout and emptiness that mixtures are tested on."""
    plain = (
        *(TOKENS, MAPS, FULL),
        Mixing("one", (1,), (1,), (1,)),
        Mixing("one-gate", (31, 9), (31, 9), (1,)),
        Mixing("features", (50, 24), (50, 24), (24,)),
        Mixing("rows", (60, 33), (60, 33), (60, 1)),
        Mixing("batch-norm", (6, 4, 5, 3), (6, 4, 5, 3), (1, 4, 1, 1)),
        Mixing("alternating", (3, 4, 5, 2, 6), (3, 4, 5, 2, 6), (3, 1, 5, 1, 6)),
        Mixing("b-broadcasts", (3, 6, 20), (20,), (3, 1, 20)),
        Mixing("a-broadcasts", (5, 1, 8), (5, 4, 8), (4, 1)),
        Mixing("gate-largest", (8,), (3, 1), (3, 8)),
        Mixing("long-rows", (3, 5000), (3, 5000), (3, 1)),
        Mixing("many-rows", (3000, 8), (3000, 8), (8,)),
        Mixing("threaded", (4, 300, 130), (4, 300, 130), (4, 1, 130)),
    )
    yield from plain
    for sizes in ((0, 3), (3, 0), (0, 0)):
        yield Mixing("empty", sizes, (sizes[1],), (1, sizes[1]))
    for layout in LAYOUTS[1:]:
        yield from (replace(sample, layout=layout) for sample in (*plain[:3], plain[6]))
    for sample in (MAPS, plain[7]):
        yield replace(sample, layout="channels_last")
