"""The block of DiT: each norm is one pass with its modulation and with the gated residual before it.

    python examples/zoo/dit_block.py

Of x [B, T, C] and a context c [B, C] a diffusion transformer (Peebles and Xie 2023: adaLN-Zero; Stable
Diffusion 3, Flux, PixArt and others have it, too) computes x + g1 attn(norm(x) (1 + s1) + t1), then the same
with an MLP. Written from the formula, with the names of facebookresearch/DiT for the parts of the block;
there `mi.convert` with `mi.nn.rules.dit()` does it in place. In our network the last residual of a block is
added by the first norm of the next one. It learns to take noise off scikit-learn's digits.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main, need, steps_of
from torch import Tensor, nn

import mi_kernels as mi

datasets = need("sklearn.datasets", "scikit-learn")
BATCH, PATCH, SIDE = 32, 2, 8


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def parts(size: int, heads: int) -> tuple[nn.Module, nn.Module]:
    mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU("tanh"), nn.Linear(4 * size, size))
    return Attention(size, heads), mlp


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Published(nn.Module):
    """DiTBlock."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = parts(size, heads)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Ours(mi.nn.AdaLNZeroBlock):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__(*parts(size, heads), features=size, context_features=size)


class Denoiser(nn.Module):
    """Blocks between an embedding of patches and a linear layer; contexts of the digit and of the noise."""

    def __init__(self, block: Any, size: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, size)
        self.position = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, size) * 0.02)
        self.digit, self.level = nn.Embedding(10, size), nn.Linear(1, size)
        self.blocks = nn.ModuleList(block(size, 2) for _ in range(depth))
        self.head = nn.Linear(size, PATCH**2)

    def forward(self, noisy: Tensor, level: Tensor, digit: Tensor) -> Tensor:
        x = self.embed(F.pixel_unshuffle(noisy, PATCH).flatten(2).mT) + self.position
        c = self.digit(digit) + self.level(level[:, None])
        if isinstance(self.blocks[0], Published):
            for block in self.blocks:
                x = block(x, c)
        else:
            residual = None
            for block in self.blocks:
                x, residual = block(x, c, residual, defer=True)
            assert residual is not None
            x = mi.gated_residual(x, *residual)
        return F.pixel_shuffle(self.head(x).mT.unflatten(2, (SIDE // PATCH, -1)), PATCH)


def train(block: Any, steps: int, size: int) -> tuple[list[float], float]:
    """(losses, the mean squared error of held-out images, where 1 is that of no prediction)."""
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    model = Denoiser(block, size, 2)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name:  # as DiT starts, and as ours does by itself
            nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(chosen: Tensor) -> Tensor:
        clean, level = images[chosen], torch.rand(len(chosen))
        noise, share = torch.randn_like(clean), level.view(-1, 1, 1, 1)
        found = model((1 - share) * clean + share * noise, level, labels[chosen])
        return (found - noise).square().mean()

    losses = fit(lambda _: loss(torch.randint(1500, (BATCH,))), optimizer, steps)
    with torch.no_grad():
        return losses, loss(torch.arange(1500, len(images))).item()


def run(steps: int, quick: bool) -> Result:
    def make(dtype: torch.dtype, batch: int, tokens: int, size: int) -> tuple[Step, Step]:
        theirs, ours = (kind(size, size // 64 or 2).to(dtype) for kind in (Published, Ours))
        ours.load_state_dict(theirs.state_dict())
        shapes = (batch, tokens, size), (batch, size)
        x, c = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        return steps_of(ours, theirs, x, c)

    sizes = [(3, 8, 32)] if quick else [(8, 64, 384), (8, 256, 384)]
    comparisons = [
        compare(f"{each[0]} images of {each[1]} tokens", lambda dtype, s=each: make(dtype, *s), quick)
        for each in sizes
    ]
    (theirs, before), (ours, after) = (train(kind, steps, 32 if quick else 64) for kind in (Published, Ours))
    scores = {"error of held-out images": f"theirs {before:.3f}, ours {after:.3f}"}
    return Result(comparisons, {"theirs": theirs, "ours": ours}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=1000))
