"""
A biaffine parser
=================

Graph-based dependency parsers score every pair of words: how well does word m as the head of word l do (Dozat
and Manning, ICLR 2017)? The score is biaffine in both, y[l, m] = [x_l; 1]^T W [x'_m; 1]. ``mi.biaffine``
computes it for all pairs without padded copies of the inputs.
"""

# %%
# Sentences of a small language
# -----------------------------
#
# Words have a class each, and every word but the root depends on the nearest word to its left whose class is
# one lower, or on the root. The parser has to find the heads from the words alone.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import mi_kernels as mi

torch.manual_seed(0)
WORDS, CLASSES, LENGTH = 60, 4, 12


def draw(count):
    """Words [count, LENGTH] and heads; word 0 is the root."""
    words = torch.randint(1, WORDS, (count, LENGTH))
    words[:, 0] = 0
    kind = words % CLASSES
    here, there = torch.arange(LENGTH), torch.arange(LENGTH)
    fits = (kind[:, None, :] + 1 == kind[:, :, None]) & (there[None, None, :] < here[None, :, None])
    return words, torch.where(fits, there, 0).amax(-1)


class Parser(nn.Module):
    def __init__(self, features=48):
        super().__init__()
        self.embed = nn.Embedding(WORDS, features)
        self.place = nn.Embedding(LENGTH, features)
        self.dependent = nn.Sequential(nn.Linear(features, features), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU())
        # One score for each pair; a constant 1 beside the dependent's features gives each head a bias of its
        # own.
        self.arcs = mi.nn.Biaffine(features, features, 1, ones=(True, False), channels_first=True)

    def forward(self, words):  # [B, L] -> scores [B, L, L] of word l's head m
        x = self.embed(words) + self.place(torch.arange(words.shape[1]))
        return self.arcs(self.dependent(x), self.head(x)).squeeze(1)


# %%
# Training
# --------

parser = Parser()
optimizer, losses = torch.optim.Adam(parser.parameters(), lr=5e-3), []
for _ in range(250):
    words, heads = draw(64)
    loss = F.cross_entropy(parser(words)[:, 1:].flatten(0, 1), heads[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

words, heads = draw(500)
with torch.no_grad():
    scores = parser(words)
right = (scores[:, 1:].argmax(-1) == heads[:, 1:]).float().mean().item()
print(f"heads that are right in new sentences: {100 * right:.0f} %")

figure, (left, middle) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.plot(losses)
left.set_xlabel("step")
left.set_ylabel("loss")
middle.imshow(scores[0].softmax(-1))
middle.plot(heads[0, 1:], range(1, LENGTH), "rx", markersize=5)
middle.set_xlabel("head")
middle.set_ylabel("word")
middle.set_title("one sentence; crosses: the true heads", fontsize=9)
plt.show()

# %%
# Labels
# ------
#
# Scores of every label for every pair are the same call with more outputs. ``ones=(True, True)`` adds a row
# and a column to the weight instead of a feature to each input.

dependents, candidates = torch.randn(2, 20, 48), torch.randn(2, 20, 48)
weight = torch.randn(40, 49, 49)  # [O, I1 + 1, I2 + 1]
y = mi.biaffine(dependents, candidates, weight, ones=(True, True))  # [2, 20, 20, 40]
padded = [F.pad(t, (0, 1), value=1.0) for t in (dependents, candidates)]
assert (
    y - (torch.einsum("bli,oij,bmj->blmo", padded[0], weight, padded[1]))
).norm() <= 1e-5 * y.norm()  # float32, to rounding

# %%
# What runs
# ---------
#
# The layer W x'_m of each position of one sequence is generated and applied to the other one. No tensor holds
# a pair of feature vectors:

print(mi.explain("biaffine", dependents, candidates, weight, ones=(True, True)))
