"""
FiLM and adaptive norms
=======================

A context that scales and shifts features is the cheapest multiplicative interaction, and the one that is used
most: FiLM in vision, adaLN in diffusion transformers.
"""

# %%
# FiLM: a question about an image
# -------------------------------
#
# The network sees an image and a question, "is this digit d?", and answers yes or no. Half of the answers are
# yes, so that a network that cannot use the question only guesses. ``mi.nn.FiLM`` makes scale and shift of
# each channel from the question, and applies both in one pass over the feature maps (Perez et al., AAAI
# 2018). ``examples/film_digits.py`` of the repository is a longer version.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mi_kernels as mi

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
labels = torch.from_numpy(digits.target).long()


class Answer(nn.Module):
    def __init__(self, film, channels=16):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = mi.nn.FiLM(channels, context_features=10) if film else None
        self.decide = nn.Linear(channels, 1)

    def forward(self, images, question):  # [B, 1, 8, 8] and [B, 10] -> [B]
        maps = self.second(F.relu(self.first(images)))
        if self.film is not None:
            maps = self.film(maps, question)
        return self.decide(F.relu(maps).amax((2, 3))).squeeze(-1)


def draw(count, known):
    chosen = torch.randint(1400, (count,)) if known else torch.randint(1400, len(labels), (count,))
    right = torch.rand(count) < 0.5
    asked = torch.where(right, labels[chosen], (labels[chosen] + torch.randint(1, 10, (count,))) % 10)
    return images[chosen], F.one_hot(asked, 10).float(), right.float()


def train(model, steps=200):
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=8e-3), []
    for _ in range(steps):
        batch, question, answer = draw(128, known=True)
        loss = F.binary_cross_entropy_with_logits(model(batch, question), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


plt.figure(figsize=(6, 3.2), layout="constrained")
for film in (False, True):
    model = Answer(film)
    plt.plot(train(model), label="with FiLM" if film else "without conditioning")
    with torch.no_grad():
        batch, question, answer = draw(2000, known=False)
        right = ((model(batch, question) > 0) == answer.bool()).float().mean().item()
    name = "with FiLM" if film else "without conditioning"
    print(f"{name}: {100 * right:.0f} % right on images it has not seen")
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()

# %%
# Scale and shift that are there already
# --------------------------------------
#
# ``mi.modulate`` is the elementwise part alone, with PyTorch's broadcasting; ``mi.diagonal`` makes both of a
# context. The activation and the offset of the scale belong to the same pass.

x, z = torch.randn(8, 64), torch.randn(8, 10)
scale, shift = torch.randn(8, 64), torch.randn(8, 64)
y = mi.modulate(x, scale, shift, scale_offset=1.0)
assert (y - ((1 + scale) * x + shift)).norm() <= 1e-5 * y.norm()  # float32, to rounding

A, a = torch.randn(64, 10), torch.randn(64)
y = mi.diagonal(x, z, A, a, activation="sigmoid")  # a gate
assert (y - (torch.sigmoid(z @ A.T + a) * x)).norm() <= 1e-5 * y.norm()  # float32, to rounding

# %%
# adaLN: a norm that a context modulates
# --------------------------------------
#
# norm(x) * (1 + scale) + shift with scale and shift made of a context: one pass over the tokens instead of a
# norm and two elementwise operations. Contexts ``[B, C]`` are one for each sample.

tokens, context = torch.randn(8, 100, 64), torch.randn(8, 32)
norm = mi.nn.AdaLayerNorm(64, context_features=32)
print(norm(tokens, context).shape)
print(mi.explain(norm, tokens, context))

# %%
# adaLN-Zero: the block of diffusion transformers
# -----------------------------------------------
#
# ``mi.nn.AdaLNZeroBlock`` takes any attention and any MLP. The gated residual x + gate * h is added in the
# pass of the norm behind it, and with ``defer=True`` the last one of a block is left to the first norm of the
# next. Blocks begin as the identity, since their gates start at zero.

blocks = [
    mi.nn.AdaLNZeroBlock(nn.Identity(), nn.Linear(64, 64), features=64, context_features=32) for _ in range(2)
]
last = mi.nn.AdaLayerNorm(64, context_features=32)
y, residual = blocks[0](tokens, context, defer=True)
y, residual = blocks[1](y, context, residual, defer=True)
x_new, y = last(y, context, residual)
assert (x_new - tokens).norm() <= 1e-5 * x_new.norm()  # float32, to rounding
