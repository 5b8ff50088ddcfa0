"""
A hypernetwork without loops
============================

A hypernetwork computes the weights of a layer from a context: W' = z W + V and b' = U z + c. Applied to x
this is the multiplicative interaction y = z^T W x + U z + V x + c, so no layer has to be built, stacked or
looped over.
"""

# %%
# One layer for each task
# -----------------------
#
# Every task is a random linear map, made from a few hidden numbers: an embedding of the task is what the
# network learns, and the layer that it generates is what the task needs.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import mi_kernels as mi

torch.manual_seed(0)
TASKS, HIDDEN, X, OUT = 50, 4, 16, 8
maps = torch.einsum("ti,iox->tox", torch.randn(TASKS, HIDDEN), torch.randn(HIDDEN, OUT, X)) / X**0.5


def draw(count):
    task, x = torch.randint(TASKS, (count,)), torch.randn(count, X)
    return x, task, torch.einsum("box,bx->bo", maps[task], x)


# %%
# ``mi.nn.HyperLinear`` is such a layer; ``context_network`` turns whatever describes a task into the context
# z.

hyper = mi.nn.HyperLinear(
    X, out_features=OUT, context_features=HIDDEN, context_network=nn.Embedding(TASKS, HIDDEN)
)


class Concatenated(nn.Module):
    """The usual alternative: embedding and input side by side, and a hidden layer."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(TASKS, HIDDEN)
        self.layers = nn.Sequential(nn.Linear(X + HIDDEN, width), nn.ReLU(), nn.Linear(width, OUT))

    def forward(self, x, task):
        return self.layers(torch.cat([x, self.embed(task)], -1))


def train(model, steps=250):
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        x, task, y = draw(256)
        loss = F.mse_loss(model(x, task), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


models = {"HyperLinear": hyper, "concatenation": Concatenated()}
plt.figure(figsize=(6, 3.2), layout="constrained")
for name, model in models.items():
    count = sum(p.numel() for p in model.parameters())
    plt.semilogy(train(model), label=f"{name}, {count} parameters")
plt.xlabel("step")
plt.ylabel("mean squared error")
plt.legend()
plt.show()

# %%
# Many rows of one context
# ------------------------
#
# Where rows share a context, its layer is generated once and applied to all of them, if that is cheaper.
# Nothing is expanded, and the result is the same:

tokens, z = torch.randn(6, 100, X), torch.randn(6, HIDDEN)
W, U, V, c = torch.randn(OUT, HIDDEN, X), torch.randn(OUT, HIDDEN), torch.randn(OUT, X), torch.randn(OUT)
y = mi.interaction(tokens, z[:, None], W, U, V, c)  # [6, 100, OUT]
layers, biases = mi.generate(z, W, U, V, c)  # [6, OUT, X] and [6, OUT]
assert (
    y - (mi.apply_generated(tokens, layers[:, None], biases[:, None]))
).norm() <= 1e-5 * y.norm()  # float32, to rounding

# %%
# ``mi.explain`` says what a call would do. Here are 500 tokens of each context, and larger layers:

shapes = (8, 500, 128), (8, 1, 32), (128, 32, 128)
print(mi.explain("interaction", *map(torch.empty, shapes)).why)

# %%
# Groups of unequal length
# ------------------------
#
# Rows in any order, each of a group: ``segment_ids`` says of which. No padding and no loop.

rows, group = torch.randn(500, X), torch.randint(6, (500,))
y = mi.interaction(rows, z, W, U, V, c, segment_ids=group)
assert (y - (mi.interaction(rows, z[group], W, U, V, c))).norm() <= 1e-5 * y.norm()  # float32, to rounding

# %%
# A plain layer for one context
# -----------------------------
#
# To deploy one task alone, bind its context: the result is an ``nn.Linear`` that knows nothing of this
# package.

fixed = hyper.bind(torch.tensor(7))
x = torch.randn(5, X)
print(fixed)
assert (fixed(x) - (hyper(x, torch.full((5,), 7)))).norm() <= 1e-5 * fixed(x).norm()  # float32, to rounding

# %%
# A head that is there already
# ----------------------------
#
# Many hypernetworks end with a linear layer whose output is cut into weights and biases. ``split_head`` views
# its parameters as W, U, V and c, so the forward pass changes and the checkpoint does not.

head = nn.Linear(HIDDEN, OUT * X + OUT)
weight, bias = mi.split_head(head.weight, head.bias, [(OUT, X), (OUT,)])
fused = mi.interaction(x, z[:5], weight.weight, bias.weight, weight.bias, bias.bias)
made = head(z[:5])
by_hand = torch.einsum("box,bx->bo", made[:, : OUT * X].view(5, OUT, X), x) + made[:, OUT * X :]
assert (fused - by_hand).norm() <= 1e-5 * fused.norm()  # float32, to rounding
