"""The MLP of LLaMA: gate, activation and product in one pass.

    python examples/zoo/llama_mlp.py

Of x [..., X] the feed-forward layer of LLaMA, Mistral, Qwen and others is D (silu(G x) * V x), with three
linear layers without biases (Touvron et al. 2023; Shazeer 2020: SwiGLU). Written from the formula, with their
names gate_proj, up_proj and down_proj in transformers, where `mi.convert` with `mi.nn.rules.transformers()`
puts mi.glu in its place. The language to learn is synthetic: which symbol comes next depends on the last two.
"""

import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main, steps_of
from torch import Tensor, nn

import mi_kernels as mi

SYMBOLS, BATCH = 24, 64


class Published(nn.Module):
    """y = D (silu(G x) * V x)."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=False)
        self.up_proj = nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Ours(Published):
    """The same parameters, where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(mi.glu(x, self.gate_proj.weight, weight_value=self.up_proj.weight))


class NextSymbol(nn.Module):
    """Two residual MLPs over the embeddings of the last two symbols."""

    def __init__(self, mlp: type[Published], size: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, size // 2)
        self.norms = nn.ModuleList(nn.RMSNorm(size) for _ in range(3))
        self.mlps = nn.ModuleList(mlp(size, hidden) for _ in range(2))
        self.head = nn.Linear(size, SYMBOLS, bias=False)

    def forward(self, symbols: Tensor) -> Tensor:  # [B, 2]
        x = self.embedding(symbols).flatten(1)
        for norm, mlp in zip(self.norms, self.mlps, strict=False):
            x = x + mlp(norm(x))
        return self.head(self.norms[-1](x))


def train(mlp: type[Published], steps: int, sizes: tuple[int, int]) -> tuple[list[float], float]:
    """(losses, how often the likeliest symbol is found)."""
    torch.manual_seed(0)
    following = torch.softmax(4 * torch.randn(SYMBOLS, SYMBOLS, SYMBOLS), -1)
    model = NextSymbol(mlp, *sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(_: int) -> Tensor:
        symbols = torch.randint(SYMBOLS, (BATCH, 2))
        target = torch.multinomial(following[symbols[:, 0], symbols[:, 1]], 1).squeeze(1)
        return F.cross_entropy(model(symbols), target)

    losses = fit(loss, optimizer, steps)
    with torch.no_grad():
        found = model(torch.cartesian_prod(*(torch.arange(SYMBOLS) for _ in range(2)))).argmax(1)
    return losses, (found == following.flatten(0, 1).argmax(1)).float().mean().item()


def run(steps: int, quick: bool) -> Result:
    sizes = (32, 80) if quick else (512, 1408)

    def make(dtype: torch.dtype, rows: int) -> tuple[Step, Step]:
        theirs, ours = (kind(*sizes).to(dtype) for kind in (Published, Ours))
        ours.load_state_dict(theirs.state_dict())
        return steps_of(ours, theirs, torch.randn(rows, sizes[0], dtype=dtype, requires_grad=True))

    rows = [40] if quick else [16, 256, 2048]
    comparisons = [compare(f"{n} tokens", lambda dtype, n=n: make(dtype, n), quick) for n in rows]
    small = (32, 80) if quick else (64, 176)
    (theirs, before), (ours, after) = (train(kind, steps, small) for kind in (Published, Ours))
    scores = {"likeliest symbols found": f"theirs {100 * before:.1f} %, ours {100 * after:.1f} %"}
    return Result(comparisons, {"theirs": theirs, "ours": ours}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=2000))
