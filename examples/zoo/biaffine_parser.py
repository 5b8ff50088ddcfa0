"""The head of a biaffine dependency parser: scores of all pairs of words, for arcs and for labels.

    python examples/zoo/biaffine_parser.py

Dozat and Manning, ICLR 2017, as supar has it: s_o(i, j) = [x_i, 1]^T W_o [y_j, 1] of two reductions of the
states of an encoder, of 500 features and one output for arcs (without the 1 of heads), 100 features and an
output for each label. The published form is that einsum, of copies with a column of ones; mi.nn.Biaffine
has the same weight and takes the ones inside. Treebanks have to be downloaded, so the sentences come from
a small grammar in this file, in which the preposition tells what its phrase belongs to. The encoder is one
small BiLSTM instead of three.
"""

import random
import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main, steps_of
from torch import Tensor, nn

import mi_kernels as mi

LABELS = ["root", "det", "amod", "nsubj", "obj", "case", "nmod", "obl", "advmod"]
KINDS, EACH = ["det", "amod", "noun", "verb", "adverb", "nmod", "obl"], 20  # words of a kind


class Published(nn.Module):
    """[B, L, in] twice -> [B, out, L, L]; ``ones`` says which side gets a column of them."""

    def __init__(self, features: int, out: int, ones: tuple[bool, bool]) -> None:
        super().__init__()
        self.ones = ones
        self.weight = nn.Parameter(torch.zeros(out, features + ones[0], features + ones[1]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (
            torch.cat([t, torch.ones_like(t[..., :1])], -1) if one else t
            for t, one in zip((x, y), self.ones, strict=True)
        )
        return torch.einsum("bxi,oij,byj->boxy", x, self.weight, y)


def ours(features: int, out: int, ones: tuple[bool, bool]) -> nn.Module:
    layer = mi.nn.Biaffine(features, features, out, ones=ones, channels_first=True)
    nn.init.zeros_(layer.weight)
    return layer


class Parser(nn.Module):
    """Scores of heads [B, L, L] (dependent, head) and of labels [B, labels, L, L]; word 0 is the root."""

    def __init__(self, biaffine, arc: int = 500, label: int = 100, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(1 + EACH * len(KINDS), hidden)
        self.encode = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        self.sizes = [arc, arc, label, label]
        self.reduce = nn.Sequential(nn.Linear(2 * hidden, 2 * (arc + label)), nn.LeakyReLU(0.1))
        # A one for heads would add the same to all heads of a word.
        self.arc = biaffine(arc, 1, (True, False))
        self.label = biaffine(label, len(LABELS), (True, True))

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        states = self.reduce(self.encode(self.embed(words))[0])
        dependent, head, dependent_l, head_l = states.split(self.sizes, -1)
        return self.arc(dependent, head).squeeze(1), self.label(dependent_l, head_l)


def sentence(draw: random.Random) -> list[list[int]]:
    """(word, head, label) of each word, of the grammar S -> NP verb [NP] [adverb] PP*."""
    words = [[0, 0, 0]]

    def word(kind: str, label: str, head: int = 0) -> int:
        words.append([1 + EACH * KINDS.index(kind) + draw.randrange(EACH), head, LABELS.index(label)])
        return len(words) - 1

    def phrase(label: str, head: int = 0, preposition: str | None = None) -> int:
        first = len(words)
        if preposition:
            word(preposition, "case")
        for kind in ["det", *["amod"] * draw.randrange(3)]:
            word(kind, kind)
        noun = word("noun", label, head)
        for modifier in words[first:noun]:
            modifier[1] = noun
        return noun

    last = phrase("nsubj")
    verb = words[last][1] = word("verb", "root")
    if draw.random() < 0.7:
        last = phrase("obj", verb)
    if draw.random() < 0.5:
        word("adverb", "advmod", verb)
    for _ in range(draw.randrange(3)):  # to the noun before, or to the verb: the preposition tells
        kind = draw.choice(["nmod", "obl"])
        last = phrase(kind, last if kind == "nmod" else verb, kind)
    return words


def corpus(count: int) -> list[Tensor]:
    """Words, heads and labels [count, L], padded; a label of -100 does not count."""
    draw = random.Random(0)
    sentences = [torch.tensor(sentence(draw)) for _ in range(count)]
    words, heads, labels = nn.utils.rnn.pad_sequence(sentences, True, -100).unbind(-1)
    labels[:, 0] = heads[:, 0] = -100
    return [words.clamp(min=0), heads, labels]


def of_head(labels: Tensor, heads: Tensor) -> Tensor:  # [B, labels, L, L], [B, L] -> [B, labels, L]
    index = heads.clamp(min=0)[:, None, :, None].expand(-1, labels.shape[1], -1, 1)
    return labels.gather(-1, index).squeeze(-1)


def train(biaffine, steps: int, sizes: tuple[int, int]) -> tuple[list[float], str]:
    """(losses, attachment scores on 400 held-out sentences: of heads, and of heads with their labels)."""
    torch.manual_seed(0)
    words, heads, labels = corpus(2400)
    model = Parser(biaffine, *sizes)
    torch.manual_seed(0)  # one layer draws its weights before they are zero, the other does not
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss(_: int) -> Tensor:
        batch = torch.randint(2000, (50,))
        arc, label = model(words[batch])
        labelled = F.cross_entropy(of_head(label, heads[batch]), labels[batch])
        return F.cross_entropy(arc.transpose(1, 2), heads[batch]) + labelled

    losses = fit(loss, optimizer, steps)
    with torch.no_grad():
        (arc, label), heads, labels = model(words[2000:]), heads[2000:], labels[2000:]
    counts, found = labels >= 0, arc.argmax(-1)
    right = (found == heads)[counts]
    both = right & (of_head(label, found).argmax(1) == labels)[counts]
    return losses, f"{100 * right.float().mean():.1f} % / {100 * both.float().mean():.1f} %"


def run(steps: int, quick: bool) -> Result:
    def make(dtype: torch.dtype, rows: int, words: int, features: int, out: int) -> tuple[Step, Step]:
        ones = (True, out > 1)  # as above
        layers = [kind(features, out, ones).to(dtype) for kind in (ours, Published)]
        weight = torch.randn_like(layers[0].weight) / features
        x = [torch.randn(rows, words, features, dtype=dtype, requires_grad=True) for _ in range(2)]
        for layer in layers:
            layer.weight.data.copy_(weight)
        return steps_of(*layers, *x)

    full = {"arc": [(40, 20, 500, 1), (8, 100, 500, 1)], "label": [(40, 20, 100, 40), (8, 100, 100, 40)]}
    small = {"arc": [(3, 7, 30, 1)], "label": [(3, 7, 10, 5)]}
    comparisons = [
        compare(f"{name}, {case[0]} x {case[1]} words", lambda dtype, case=case: make(dtype, *case), quick)
        for name, cases in (small if quick else full).items()
        for case in cases
    ]
    sizes = (40, 20) if quick else (500, 100)
    (theirs, before), (own, after) = (train(kind, steps, sizes) for kind in (Published, ours))
    scores = {"unlabelled / labelled attachment on held-out sentences": f"theirs {before}; ours {after}"}
    return Result(comparisons, {"theirs": theirs, "ours": own}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=150))
