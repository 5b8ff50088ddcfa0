"""The demonstration's data (pairs of images of digits), model and training history."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_OUT_IMAGES = 360  # of 1797
WARM_UP_STEPS = 3  # not timed


class Images:
    """Labelled images, from which pairs are sampled."""

    def __init__(self, pixels: Tensor, labels: Tensor):  # [N, 64], [N]
        order = torch.argsort(labels, stable=True)
        self.pixels = pixels[order]
        self.counts = torch.bincount(labels, minlength=10)
        self.starts = self.counts.cumsum(0) - self.counts

    def pairs(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Two batches of images and whether they show the same digit, in half of the cases.

        The two images of a pair are always different images.
        """
        same = torch.arange(count) % 2 == 0
        digit = torch.randint(10, (count,), generator=generator)
        other = torch.where(same, digit, (digit + torch.randint(1, 10, (count,), generator=generator)) % 10)
        index, shift = torch.randint(1 << 40, (2, count), generator=generator)
        size = self.counts[digit]
        first = index % size
        second = torch.where(same, (first + 1 + shift % (size - 1)) % size, shift % self.counts[other])
        left, right = self.starts[digit] + first, self.starts[other] + second
        return self.pixels[left], self.pixels[right], same.float()


def load_images(seed: int) -> tuple[Images, Images]:
    """scikit-learn's digits, split by images: no held-out image is ever seen in training."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.data).float() / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, train = order[:HELD_OUT_IMAGES], order[HELD_OUT_IMAGES:]
    return Images(pixels[train], labels[train]), Images(pixels[held_out], labels[held_out])


class SameDigit(nn.Module):
    """Do two images show the same digit? One encoder for both, compared by a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.compare = nn.Bilinear(64, 64, 64)
        self.decide = nn.Sequential(nn.ReLU(), nn.Linear(64, 1))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # [B, 64], [B, 64] -> [B], a logit
        """The logit of each pair ``[B]``, of images ``[B, 64]``."""
        return self.decide(self.compare(self.encode(left), self.encode(right))).squeeze(-1)


@dataclass
class Run:
    """One of the two models with its training history."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    extra_bytes: int = 0

    @classmethod
    def new(cls, name: str, seed: int, change: Callable[[nn.Module], nn.Module]) -> "Run":
        torch.manual_seed(seed)
        model = change(SameDigit())
        return cls(name, model, torch.optim.Adam(model.parameters(), lr=1e-3))

    def step(self, left: Tensor, right: Tensor, same: Tensor) -> float:
        loss = F.binary_cross_entropy_with_logits(self.model(left, right), same)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, left: Tensor, right: Tensor, same: Tensor) -> float:
        return ((self.model(left, right) > 0) == same.bool()).float().mean().item()

    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)
