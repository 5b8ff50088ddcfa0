"""Arguments of the dense interaction with weights of each sample, or chosen by index."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import Shape

Lead = tuple[int, ...]


@dataclass(frozen=True)
class Batched(Shape):
    """Sizes with leading dimensions of W, U, V and c; with ``ids`` they are (G,), or none."""

    leads: tuple[Lead, Lead, Lead, Lead] = ((), (), (), ())
    ids: Lead | None = None  # the shape of weight_ids

    @property
    def lead(self) -> torch.Size:
        of_weights = self.leads if self.ids is None else (self.ids,)
        return torch.broadcast_shapes(self.batch, self.z_batch, *of_weights)

    def sizes(self) -> tuple[Lead, ...]:
        x, z, *weights = super().sizes()
        return x, z, *((*lead, *own) for lead, own in zip(self.leads, weights, strict=True))

    def weight_ids(self, device: str | torch.device = "cpu") -> Tensor | None:
        if self.ids is None:
            return None
        groups = max(lead[0] for lead in self.leads if lead)
        generator = torch.Generator().manual_seed(1)
        return torch.randint(groups, self.ids, generator=generator).to(device)


def _all(*lead: int) -> tuple[Lead, Lead, Lead, Lead]:
    return lead, lead, lead, lead


PER_SAMPLE = (
    Batched("rows", (7,), 3, 5, 4, leads=_all(7)),
    Batched("tokens", (3, 8), 4, 5, 6, (3, 1), leads=_all(3, 1)),
    Batched("tokens-and-contexts", (3, 8), 4, 5, 6, leads=_all(3, 1)),
    Batched("scores", (1, 9), 4, 6, 1, (5, 1), leads=_all(5, 1)),
    Batched("inputs-shared", (5, 1), 4, 6, 3, (5, 9), leads=_all(5, 1)),
    Batched("weights-inside", (4, 6), 3, 5, 2, leads=_all(6)),
    Batched("weights-between", (2, 4, 1), 3, 5, 2, (4, 3), leads=_all(2, 1, 3)),
    Batched("only-weights", (), 3, 5, 2, leads=_all(6)),
    Batched("one-weight", (4,), 3, 5, 2, leads=_all(1)),
    Batched("different", (6, 2), 3, 5, 4, leads=((6, 1), (), (6, 2), (2,))),
    Batched("bias-alone", (6,), 3, 5, 4, leads=((), (), (), (6,))),
    Batched("product-shared", (6,), 3, 5, 4, leads=((), (6,), (6,), ())),
    Batched("many-rows", (3, 40), 12, 33, 17, leads=_all(3, 1)),
    Batched("no-samples", (0,), 3, 5, 4, leads=_all(0)),
    Batched("no-input", (4,), 3, 0, 5, leads=_all(4)),
    Batched("no-context", (4,), 0, 3, 5, leads=_all(4)),
)
BY_INDEX = (
    Batched("relations", (40,), 3, 5, 4, leads=_all(6), ids=(40,)),
    Batched("more-weights", (5,), 3, 5, 4, leads=_all(50), ids=(5,)),
    Batched("index-per-sample", (3, 8), 4, 5, 6, leads=_all(4), ids=(3, 1)),
    Batched("index-per-token", (3, 8), 4, 5, 6, (3, 1), leads=_all(4), ids=(3, 8)),
    Batched("all-tails", (1, 30), 4, 6, 1, (12, 1), leads=_all(3), ids=(12, 1)),
    Batched("one-index", (9,), 4, 6, 3, leads=_all(3), ids=()),
    Batched("partly-chosen", (9,), 4, 6, 3, leads=((3,), (), (), (3,)), ids=(9,)),
    Batched("bias-chosen", (9,), 4, 6, 3, leads=((), (), (), (3,)), ids=(9,)),
    Batched("no-rows", (0,), 4, 6, 3, leads=_all(3), ids=(0,)),
    Batched("many-rows", (500,), 12, 33, 17, leads=_all(7), ids=(500,)),
)
