"""
A drop-in for nn.Bilinear
=========================

A model that compares two inputs with ``nn.Bilinear`` keeps its code, its parameters and its optimiser;
``mi.convert`` changes the layer in place. Afterwards it computes the same numbers, and no longer works output
by output.
"""

# %%
# A model as one finds it
# -----------------------
#
# Do two images of handwritten digits show the same digit? Both are encoded by one network, and a bilinear
# layer compares the codes. The task needs products of features: no sum of two scores, one for each image, can
# answer it.

import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mi_kernels as mi

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float().flatten(1) / 16
labels = torch.from_numpy(digits.target)


class Compare(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 48), nn.Tanh())
        self.compare = nn.Bilinear(48, 48, 1)

    def forward(self, a, b):
        return self.compare(self.encode(a), self.encode(b)).squeeze(-1)


# %%
# Convert it
# ----------
#
# ``convert`` changes the class of the layer and leaves its parameters where they are: whatever refers to them
# (optimisers, state dicts, hooks) goes on working. The report says what happened to each layer.

plain = Compare()
fused = mi.convert(copy.deepcopy(plain))
print(mi.conversion_report(fused))

# %%
# Train both
# ----------
#
# From the same start, on the same pairs, the losses agree up to rounding. Training magnifies rounding, so the
# curves come apart a little in the end, as they do when the order of a sum changes.


def pairs(count, generator):
    first = torch.randint(1400, (count,), generator=generator)
    second = torch.randint(1400, (count,), generator=generator)
    same = torch.rand(count, generator=generator) < 0.5  # for these, an image of the same digit
    order = labels[:1400].argsort(stable=True)
    starts = torch.searchsorted(labels[:1400][order], torch.arange(11))
    width = (starts[1:] - starts[:-1])[labels[first]]
    found = order[starts[labels[first]] + (torch.rand(count, generator=generator) * width).long()]
    second = torch.where(same, found, second)
    return images[first], images[second], (labels[first] == labels[second]).float()


def train(model, steps=150):
    generator, losses = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        a, b, same = pairs(256, generator)
        loss = F.binary_cross_entropy_with_logits(model(a, b), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


losses = {"nn.Bilinear": train(plain), "converted": train(fused)}
difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
print(f"largest difference of the losses: {difference:.1e}")

plt.figure(figsize=(6, 3.2), layout="constrained")
for (name, curve), style in zip(losses.items(), ("-", "--"), strict=True):
    plt.plot(curve, style, label=name)
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()

# %%
# What is different
# -----------------
#
# ``nn.Bilinear`` wants equal leading dimensions; the converted layer broadcasts. It has a rule for
# ``torch.vmap``, follows autocast, and holds nothing of the size of z times x. ``mi.explain`` says how it
# would run:

code = torch.randn(1000, 48)
print(mi.explain(fused.compare, code, code))

# %%
# The way back
# ------------
#
# State dicts of both are the same, and ``to="torch"`` makes plain layers again.

plain.load_state_dict(fused.state_dict())
print(type(mi.convert(fused, to="torch").compare).__name__)
