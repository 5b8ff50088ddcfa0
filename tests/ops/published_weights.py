"""Published layers whose weights are generated, kept for each sample, or chosen by an id.

Plain PyTorch of explicit tensors, written from the formulas: what tests compare with. No layer here is a
module, as what differs between packages is the arithmetic and how weights lie in memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Heads. Of each form: (what the head gives [B, P], x [B, X]) -> y [B, O], and how the head is laid out.


def linear(context: int, size: int, bias: bool = True, **options: Any) -> nn.Linear:
    """A head whose bias is as large as its weight."""
    head = nn.Linear(context, size, bias, **{"dtype": torch.float64} | options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def nn_conv(generated: Tensor, x: Tensor) -> Tensor:
    """The message of torch_geometric's NNConv: x W, [X, O] with no bias."""
    weight = generated.view(-1, x.shape[-1], generated.shape[-1] // x.shape[-1])
    return torch.matmul(x.unsqueeze(1), weight).squeeze(1)


def apg(generated: Tensor, x: Tensor) -> Tensor:
    """FuxiCTR's APG with a generated bias: x W + b, b before [X, O]."""
    out = generated.shape[-1] // (x.shape[-1] + 1)
    bias, weight = generated[:, :out], generated[:, out:].reshape(-1, x.shape[-1], out)
    return torch.bmm(x.unsqueeze(1), weight).squeeze(1) + bias


def list_of_shapes(generated: Tensor, x: Tensor) -> Tensor:
    """hypnettorch, hyper-nn, hyperlight: the shapes [O, X] and [O] of an nn.Linear, one after the other."""
    width = x.shape[-1]
    out = generated.shape[-1] // (width + 1)
    weight, bias = generated.split([out * width, out], -1)
    return torch.bmm(weight.view(-1, out, width), x.unsqueeze(-1)).squeeze(-1) + bias


def bias_first(generated: Tensor, x: Tensor) -> Tensor:
    out = generated.shape[-1] // (x.shape[-1] + 1)
    return torch.einsum("boj,bj->bo", generated[:, out:].view(-1, out, x.shape[-1]), x) + generated[:, :out]


HEADS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "NNConv": (nn_conv, {"order": "in,out", "bias": None}),
    "APG": (apg, {"order": "in,out", "bias": "first"}),
    "shapes": (list_of_shapes, {"order": "out,in", "bias": "last"}),
    "bias first": (bias_first, {"order": "out,in", "bias": "first"}),
}
