"""A character-level multiplicative LSTM, trained on the documentation of this repository.

    python examples/char_mlstm.py [--kind mi_gru] [--hidden 128] [--steps 400]

The model predicts the next character of docs/*.md and README.md. In a multiplicative LSTM each character
chooses the matrix between two states (Krause et al., 2016), in an LSTM it can only shift what the gates see.
Both have the same number of parameters, and see the same windows of the text. What counts is the loss on
parts of the text that were held out, in bits per character: with 1 bit, two characters are equally likely.
"""

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mi_kernels as mi

ROOT = Path(__file__).resolve().parents[1]
BLOCK, WINDOW, ROWS, EMBEDDING = 1024, 64, 32, 48
KINDS = {
    "mlstm": mi.nn.MultiplicativeLSTM,
    "mrnn": mi.nn.MultiplicativeRNN,
    "mi_rnn": mi.nn.MultiplicativeIntegrationRNN,
    "mi_lstm": mi.nn.MultiplicativeIntegrationLSTM,
    "mi_gru": mi.nn.MultiplicativeIntegrationGRU,
    "second_order": mi.nn.SecondOrderRNN,
}


class Characters(nn.Module):
    """Scores of the next character, after each one of [T, B]."""

    def __init__(self, layer: type[nn.Module], hidden: int, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.layer = layer(EMBEDDING, hidden)
        self.decide = nn.Linear(hidden, characters)

    def forward(self, text: Tensor) -> Tensor:
        output, _ = self.layer(self.embedding(text))
        return self.decide(output)


def read() -> str:
    return "".join(path.read_text() for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"])


def encode(text: str) -> tuple[Tensor, Tensor, int]:
    """Blocks of characters [N, BLOCK] to train on, each tenth one held out, and the number of characters."""
    known = {character: index for index, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[character] for character in text])
    blocks = numbers[: len(numbers) // BLOCK * BLOCK].view(-1, BLOCK)
    held_out = torch.arange(len(blocks)) % 10 == 9
    return blocks[~held_out], blocks[held_out], len(known)


def bits_of_frequencies(text: str) -> float:
    """What a character costs if nothing is known but how frequent each one is."""
    counts = Counter(text).values()
    return sum(count * math.log2(len(text) / count) for count in counts) / len(text)


def bits(model: nn.Module, text: Tensor) -> Tensor:
    """The mean loss in bits per character of [T, B]: each is predicted from those before it."""
    scores = model(text[:-1])
    return F.cross_entropy(scores.flatten(0, 1), text[1:].flatten()) / math.log(2)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make(kind: str, hidden: int, characters: int) -> nn.Module:
    """A model with a layer of that kind, or of nn.LSTM."""
    return Characters(nn.LSTM if kind == "lstm" else KINDS[kind], hidden, characters)


def hidden_of_lstm(least: int, characters: int) -> int:
    """The size of the smallest nn.LSTM whose model has at least so many parameters."""
    with torch.device("meta"):
        return next(
            hidden for hidden in range(1, 10_000) if parameters(make("lstm", hidden, characters)) >= least
        )


def train(model: nn.Module, blocks: Tensor, held_out: Tensor, steps: int) -> float:
    """Bits per character of what was held out."""
    torch.manual_seed(0)  # both models see the same windows
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=5e-4)
    for step in range(steps):
        rows, starts = torch.randint(len(blocks), (ROWS,)), torch.randint(BLOCK - WINDOW, (ROWS,))
        window = blocks[rows[:, None], starts[:, None] + torch.arange(WINDOW + 1)]
        loss = bits(model, window.t())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // 4, 1) == 0:
            print(f"  step {step + 1}: {loss.item():.3f} bits per character")
    with torch.no_grad():
        return bits(model, held_out.t()).item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints, and returns, bits per character of what was held out, by model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kind", choices=KINDS, default="mlstm")
    parser.add_argument("--hidden", type=int, default=128, help="units of the multiplicative RNN")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="a few steps of a small model")
    given = parser.parse_args(arguments)
    hidden, steps = (32, 40) if given.quick else (given.hidden, given.steps)
    text = read()
    blocks, held_out, characters = encode(text)
    found = {"frequencies": bits_of_frequencies(text)}
    print(f"{len(text)} characters, {characters} different: {found['frequencies']:.3f} bits by frequency")
    torch.manual_seed(0)
    ours = make(given.kind, hidden, characters)
    units = hidden_of_lstm(parameters(ours), characters)
    for name, model in {given.kind: ours, "nn.LSTM": make("lstm", units, characters)}.items():
        print(f"{name}: {hidden if model is ours else units} units, {parameters(model)} parameters")
        start = time.perf_counter()
        found[name] = train(model, blocks, held_out, steps)
        print(f"  held out: {found[name]:.3f} bits per character, {time.perf_counter() - start:.0f} s")
    return found


if __name__ == "__main__":
    main()
