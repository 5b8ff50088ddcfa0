"""LayoutLM's relation head, converted by one line: mi.convert(model).

    python examples/zoo/layoutlm_relation.py

The head says which question of a form belongs to which answer: each candidate pair is two vectors of 2 x
768 features, reduced to 384 by two layers each, and scored by nn.Bilinear(384, 384, 2, bias=False) plus
nn.Linear on their concatenation (BiaffineAttention in layoutlmft of microsoft/unilm; Nguyen and Verspoor,
ECIR 2019). Written from the formula and those sizes; the pairs are synthetic, since forms have to be
downloaded.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main
from torch import Tensor, nn

import mi_kernels as mi

HIDDEN = 768


class RelationHead(nn.Module):
    """Two scores of each candidate pair [N, 2], from its head [N, 2 H] and its tail [N, 2 H]."""

    def __init__(self, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.head, self.tail = (
            nn.Sequential(
                nn.Linear(2 * hidden, hidden),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(hidden, hidden // 2),
                nn.ReLU(),
                nn.Dropout(dropout),
            )
            for _ in range(2)
        )
        self.bilinear = nn.Bilinear(hidden // 2, hidden // 2, 2, bias=False)
        self.linear = nn.Linear(hidden, 2)

    def score(self, head: Tensor, tail: Tensor) -> Tensor:
        return self.bilinear(head, tail) + self.linear(torch.cat((head, tail), -1))

    def forward(self, head: Tensor, tail: Tensor) -> Tensor:
        return self.score(self.head(head), self.tail(tail))


def forms(count: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads and tails, each with six hidden traits and noise, and whether they have the same traits."""
    traits, others = torch.randn(2, count, 6)
    of_head, of_tail = torch.randn(2, 6, 2 * hidden) / 6**0.5
    noise = 0.3 * torch.randn(2, count, 2 * hidden)
    label = (torch.rand(count) < 0.5).long()
    tail = torch.where(label.bool().unsqueeze(1), traits, others)
    return traits @ of_head + noise[0], tail @ of_tail + noise[1], label


def train(converted: bool, steps: int, hidden: int, pairs: int) -> tuple[list[float], float]:
    """(losses, accuracy on held-out pairs); the same start and dropout for both."""
    torch.manual_seed(0)
    model = RelationHead(hidden)
    if converted:
        model = mi.convert(model)
    head, tail, label = forms(4 * pairs + 1000, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def loss(step: int) -> Tensor:
        batch = torch.arange(pairs) + pairs * (step % 4)
        return F.cross_entropy(model(head[batch], tail[batch]), label[batch])

    losses = fit(loss, optimizer, steps)
    model.eval()
    with torch.no_grad():
        found = model(head[-1000:], tail[-1000:]).argmax(1)
    return losses, (found == label[-1000:]).float().mean().item()


def run(steps: int, quick: bool) -> Result:
    hidden, sizes = (48, [64]) if quick else (HIDDEN, [300, 1000])

    def make(dtype: torch.dtype, pairs: int, whole: bool) -> tuple[Step, Step]:
        theirs = RelationHead(hidden, dropout=0.0).to(dtype)
        ours = mi.convert(copy.deepcopy(theirs))
        width = 2 * hidden if whole else hidden // 2
        x = [torch.randn(pairs, width, dtype=dtype, requires_grad=True) for _ in range(2)]

        def step(model: RelationHead) -> Step:
            layers = [model] if whole else [model.bilinear, model.linear]
            forward = model.forward if whole else model.score
            return Step(lambda: forward(*x), [*x, *(p for layer in layers for p in layer.parameters())])

        return step(ours), step(theirs)

    comparisons = [
        compare(f"{what}, {pairs} pairs", lambda dtype, n=pairs, w=whole: make(dtype, n, w), quick)
        for pairs in sizes
        for whole, what in ((False, "bilinear + linear"), (True, "whole head"))
    ]
    (theirs, before), (ours, after) = (train(c, steps, hidden, sizes[0]) for c in (False, True))
    scores = {"accuracy on held-out pairs": f"theirs {100 * before:.1f} %, ours {100 * after:.1f} %"}
    return Result(comparisons, {"theirs": theirs, "ours": ours}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=40))
