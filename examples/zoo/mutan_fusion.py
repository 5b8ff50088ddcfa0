"""MUTAN, the fusion of question and image in visual question answering, without its rank-wise products.

    python examples/zoo/mutan_fusion.py

Ben-younes et al. (ICCV 2017) fuse q and v with Tucker's decomposition whose core is a sum of R matrices of
rank one for each output (equations 5 to 8): z = sum_r (M_r q') * (N_r v') with q' = tanh(W_q q) and
v' = tanh(W_v v). Written from the formula, with the sizes of the published model: 360 features of each,
360 outputs, R = 10; M and N are one layer of R * 360 outputs each, as in block.bootstrap.pytorch. Questions
and images are synthetic: the answer is an entry of a table, its row is in one and its column in the other.
"""

import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main, steps_of
from torch import Tensor, nn

import mi_kernels as mi

KINDS, ANSWERS, BATCH = 8, 10, 128


class Published(nn.Module):
    """z = sum_r (M_r q) * (N_r v), for q [B, I] and v [B, J]."""

    def __init__(self, first: int, second: int, out: int, rank: int) -> None:
        super().__init__()
        self.rank, self.out = rank, out
        self.merge_q = nn.Linear(first, rank * out, bias=False)
        self.merge_v = nn.Linear(second, rank * out, bias=False)

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        product = self.merge_q(q) * self.merge_v(v)
        return product.view(-1, self.rank, self.out).sum(1)


class Ours(Published):
    """The same parameters; the arguments are views of them: [R, O, I] and [R, O, J]."""

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        terms = self.rank, self.out
        return mi.low_rank(q, v, *(m.weight.unflatten(0, terms) for m in (self.merge_q, self.merge_v)))


class Answers(nn.Module):
    def __init__(self, fusion: type[Published], size: int, rank: int) -> None:
        super().__init__()
        self.question, self.image = (nn.Sequential(nn.Linear(64, size), nn.Tanh()) for _ in range(2))
        self.fusion = fusion(size, size, size, rank)
        self.head = nn.Linear(size, ANSWERS)

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        return self.head(self.fusion(self.question(q), self.image(v)))


def train(fusion: type[Published], steps: int, size: int, rank: int) -> tuple[list[float], float]:
    """(losses, accuracy on other draws)."""
    torch.manual_seed(0)
    table = torch.randint(ANSWERS, (KINDS, KINDS))
    of_q, of_v = torch.randn(2, KINDS, 64)
    model = Answers(fusion, size, rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        q, v = torch.randint(KINDS, (2, count))
        noise = torch.randn(2, count, 64)
        return of_q[q] + noise[0], of_v[v] + noise[1], table[q, v]

    def loss(_: int) -> Tensor:
        q, v, answer = draw(BATCH)
        return F.cross_entropy(model(q, v), answer)

    losses = fit(loss, optimizer, steps)
    with torch.no_grad():
        q, v, answer = draw(2000)
        return losses, (model(q, v).argmax(1) == answer).float().mean().item()


def run(steps: int, quick: bool) -> Result:
    size, rank = (24, 3) if quick else (360, 10)

    def make(dtype: torch.dtype, batch: int) -> tuple[Step, Step]:
        theirs, ours = (kind(size, size, size, rank).to(dtype) for kind in (Published, Ours))
        ours.load_state_dict(theirs.state_dict())
        inputs = (torch.randn(batch, size, dtype=dtype, requires_grad=True) for _ in range(2))
        return steps_of(ours, theirs, *inputs)

    batches = [40] if quick else [128, 512]
    comparisons = [compare(f"batch {n}", lambda dtype, n=n: make(dtype, n), quick) for n in batches]
    small = (24, 3) if quick else (64, 5)
    (theirs, before), (ours, after) = (train(kind, steps, *small) for kind in (Published, Ours))
    scores = {"accuracy": f"theirs {100 * before:.1f} %, ours {100 * after:.1f} %"}
    return Result(comparisons, {"theirs": theirs, "ours": ours}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=600))
