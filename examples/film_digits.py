"""A FiLM layer in a small convolutional network, trained on scikit-learn's handwritten digits.

    python examples/film_digits.py

The network sees an image and a question, "is this digit d?", and answers yes or no. The question conditions
the feature maps through FiLM: it scales and shifts each channel (Perez et al., AAAI 2018). The same network
without conditioning cannot know what is asked, and stays at the rate of guessing.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mi_kernels as mi

HELD_OUT = 360


class Answer(nn.Module):
    """Yes or no to "is this digit d?", from an image and a one-hot d."""

    def __init__(self, channels: int = 16, film: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = mi.nn.FiLM(channels, context_features=10) if film else None
        self.decide = nn.Linear(channels, 1)

    def forward(self, images: Tensor, question: Tensor) -> Tensor:  # [B, 1, 8, 8], [B, 10] -> [B]
        maps = self.second(F.relu(self.first(images)))
        if self.film is not None:
            maps = self.film(maps, question)
        return self.decide(F.relu(maps).amax((2, 3))).squeeze(-1)


def draw(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, questions (half of them about the right digit) and answers."""
    chosen = torch.randint(len(labels), (count,))
    right = torch.rand(count) < 0.5
    asked = torch.where(right, labels[chosen], (labels[chosen] + torch.randint(1, 10, (count,))) % 10)
    return images[chosen], F.one_hot(asked, 10).float(), right.float()


def train(film: bool, steps: int) -> tuple[float, float]:
    """(first loss, accuracy on held-out images)."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels))
    held_out, seen = order[:HELD_OUT], order[HELD_OUT:]
    model = Answer(film=film)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = 0.0
    for step in range(steps):
        batch, question, answer = draw(images[seen], labels[seen], 128)
        loss = F.binary_cross_entropy_with_logits(model(batch, question), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
        if (step + 1) % max(steps // 4, 1) == 0:
            print(f"  step {step + 1}: loss {loss.item():.3f}")
    with torch.no_grad():
        batch, question, answer = draw(images[held_out], labels[held_out], 4000)
        accuracy = ((model(batch, question) > 0) == answer.bool()).float().mean().item()
    return first, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    for film in (False, True):
        print("with FiLM" if film else "without conditioning")
        _, accuracy = train(film, steps)
        print(f"  accuracy on held-out images: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
