"""MultiBench's multiplicative interaction of two modalities, on digits cut in halves.

    python examples/zoo/multibench_mi.py

MultiplicativeInteractions2Modal(output="matrix") of pliang279/MultiBench (fusions/common_fusions.py; Liang
et al., NeurIPS 2021) is the dense interaction of this package with other names: of m1 [B, N] it generates
a matrix for each sample, m1 W + V, and applies it to m2 [B, M]. Written from the formula, with the sizes
that it has for audiovisual MNIST there: 48 and 192 features, 240 outputs, batches of 40. The data are
scikit-learn's digits: the left half of an image is one modality, the right half the other.
"""

import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main, need, steps_of
from torch import Tensor, nn

import mi_kernels as mi

datasets = need("sklearn.datasets", "scikit-learn")
HELD_OUT = 360


class Published(nn.Module):
    """y = m2 (m1 W + V) + m1 U + b, for m1 [B, N] and m2 [B, M]."""

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_normal_(torch.empty(first, second, out)))
        self.U = nn.Parameter(nn.init.xavier_normal_(torch.empty(first, out)))
        self.V = nn.Parameter(nn.init.xavier_normal_(torch.empty(second, out)))
        self.b = nn.Parameter(nn.init.normal_(torch.empty(out)))

    def forward(self, m1: Tensor, m2: Tensor) -> Tensor:
        generated = torch.einsum("bn,nmd->bmd", m1, self.W) + self.V
        return torch.einsum("bm,bmd->bd", m2, generated) + (m1 @ self.U + self.b)


class Ours(Published):
    """The same parameters; the arguments are views of them: W [O, Z, X], U [O, Z], V [O, X]."""

    def forward(self, m1: Tensor, m2: Tensor) -> Tensor:
        return mi.interaction(m2, m1, self.W.permute(2, 0, 1), self.U.T, self.V.T, self.b)


class Classifier(nn.Module):
    def __init__(self, fusion: nn.Module, first: int, second: int, out: int) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(32, first), nn.LayerNorm(first), nn.ReLU())
        self.right = nn.Sequential(nn.Linear(32, second), nn.LayerNorm(second), nn.ReLU())
        self.fusion, self.head = fusion, nn.Sequential(nn.ReLU(), nn.Linear(out, 10))

    def forward(self, images: Tensor) -> Tensor:  # [B, 8, 8]
        left, right = images[:, :, :4].flatten(1), images[:, :, 4:].flatten(1)
        return self.head(self.fusion(self.left(left), self.right(right)))


def train(fusion: type[Published], steps: int, sizes: tuple[int, int, int]) -> tuple[list[float], float]:
    """(losses, accuracy on held-out images)."""
    torch.manual_seed(0)
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels))
    held_out, seen = order[:HELD_OUT], order[HELD_OUT:]
    model = Classifier(fusion(*sizes), *sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(_: int) -> Tensor:
        batch = seen[torch.randint(len(seen), (40,))]
        return F.cross_entropy(model(images[batch]), labels[batch])

    losses = fit(loss, optimizer, steps)
    with torch.no_grad():
        found = model(images[held_out]).argmax(1)
    return losses, (found == labels[held_out]).float().mean().item()


def run(steps: int, quick: bool) -> Result:
    sizes = (12, 16, 20) if quick else (48, 192, 240)

    def make(dtype: torch.dtype, batch: int) -> tuple[Step, Step]:
        theirs, ours = (kind(*sizes).to(dtype) for kind in (Published, Ours))
        ours.load_state_dict(theirs.state_dict())
        m1, m2 = (torch.randn(batch, size, dtype=dtype, requires_grad=True) for size in sizes[:2])
        return steps_of(ours, theirs, m1, m2)

    batches = [40] if quick else [40, 400]
    comparisons = [compare(f"batch {n}", lambda dtype, n=n: make(dtype, n), quick) for n in batches]
    (theirs, before), (ours, after) = (train(kind, steps, sizes) for kind in (Published, Ours))
    scores = {"accuracy on held-out images": f"theirs {100 * before:.1f} %, ours {100 * after:.1f} %"}
    return Result(comparisons, {"theirs": theirs, "ours": ours}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=300))
