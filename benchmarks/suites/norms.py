"""The adaptive-norm block against the forms that an expert writes in PyTorch, each under torch.compile, too.

    python benchmarks/suites/norms.py --threads 2 --rounds 15 --output benchmarks/results/NAME.json

How a case is measured stands in cases.py; the candidates run in one process, in turn. `eager` is the
published formula, `addcmul` the normalisation of PyTorch and one more pass, `hand` an autograd.Function that
saves only x, mean and rstd and calls PyTorch's own kernels, as hand-written fused norms do. `copy_` reads x
and writes as much: its time by ours is the share of the copy's bandwidth. Compiled rivals are candidates of
each case, and so is our call under torch.compile, which is no rival. The cases of `dit` are whole blocks.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case

TOKENS = ((8, 256, 384), (4, 1024, 1152), (64, 197, 768))
MAPS = ((16, 64, 32, 32), (16, 256, 8, 8))
EPS = 1e-6


class Hand(torch.autograd.Function):
    """layer_norm(x) (1 + scale) + shift; the contexts are summed over the tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x, mean, rstd, scale)
        return torch.addcmul(shift, y, 1 + scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, rstd, scale = ctx.saved_tensors
        normed = (x - mean) * rstd
        args = (x, x.shape[-1:], mean, rstd, None, None, [True, False, False])
        dx = torch.ops.aten.native_layer_norm_backward(grad * (1 + scale), *args)[0]
        return dx, (grad * normed).sum(1, keepdim=True).to(x.dtype), grad.sum(1, keepdim=True)


def with_compiled(**functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The functions, and ours and `eager` under torch.compile, to which `addcmul` is the same."""
    torch._dynamo.reset()  # its limit of recompilations counts all sizes together
    compiled = {
        f"compile({name})": torch.compile(function, dynamic=False, fullgraph=True)
        for name, function in functions.items()
        if name in ("ours", "eager")
    }
    return {OURS: functions.pop("ours"), **functions, **compiled}


def contexts(x: tuple[int, ...], each: bool) -> tuple[int, ...]:
    """Of each sample, or of each token."""
    return x if each else (x[0], 1, x[2])


def layers(family: str = "layer", each: bool = False) -> Iterator[Case]:
    def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift

    def addcmul(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)

    def ours(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return mi.norm_modulate(x, scale, shift, eps=EPS)

    hand = {} if each else {"hand": Hand.apply}
    for x in TOKENS:
        size = contexts(x, each)
        functions = with_compiled(ours=ours, eager=eager, addcmul=addcmul, **hand)
        yield Case(family, "x".join(map(str, x)), (x, size, size), functions, copies=True)


def tokens() -> Iterator[Case]:
    """A scale and a shift for each token, as of diffusion forcing."""
    yield from layers("each-token", each=True)


def rms() -> Iterator[Case]:
    def eager(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, EPS) * (1 + scale)

    def ours(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return mi.norm_modulate(x, scale, norm="rms", weight=weight, eps=EPS)

    for x in TOKENS:
        sizes = (x, contexts(x, False), x[-1:])
        yield Case("rms", "x".join(map(str, x)), sizes, with_compiled(ours=ours, eager=eager), copies=True)


def groups() -> Iterator[Case]:
    def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.group_norm(x, 32, eps=EPS) * (1 + scale) + shift

    def addcmul(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift, F.group_norm(x, 32, eps=EPS), 1 + scale)

    def ours(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return mi.norm_modulate(x, scale, shift, norm="group", groups=32, eps=EPS)

    for channels_last in (False, True):
        for x in MAPS:
            size = (*x[:2], 1, 1)
            name = "x".join(map(str, x)) + ("-channels-last" if channels_last else "")
            functions = with_compiled(ours=ours, eager=eager, addcmul=addcmul)
            yield Case("group", name, (x, size, size), functions, copies=True, channels_last=channels_last)


def residuals() -> Iterator[Case]:
    """x_new = x + gate h, and y of x_new: two results."""

    def eager(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        x = x + gate * h
        return x, F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift

    def addcmul(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.addcmul(x, gate, h)
        return x, torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)

    def ours(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return mi.gated_residual_norm_modulate(x, h, gate, scale, shift, eps=EPS)

    for x in TOKENS:
        size = contexts(x, False)
        functions = with_compiled(ours=ours, eager=eager, addcmul=addcmul)
        yield Case("residual", "x".join(map(str, x)), (x, x, size, size, size), functions, copies=True)


def dit_blocks() -> Iterator[Case]:
    """Whole blocks of DiT: adaLN-Zero, attention of 6 or 16 heads, an MLP of four times the width."""

    def attention(x: Tensor, qkv: Tensor, out: Tensor, heads: int) -> Tensor:
        q, k, v = F.linear(x, qkv).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), out)

    def mlp(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, first), approximate="tanh"), second)

    def blocks(heads: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        def plain(
            x: Tensor, c: Tensor, ada: Tensor, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor
        ) -> Tensor:
            b1, s1, g1, b2, s2, g2 = F.linear(F.silu(c), ada).unsqueeze(1).chunk(6, -1)
            x = x + g1 * attention(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + s1) + b1, qkv, out, heads)
            return x + g2 * mlp(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + s2) + b2, up, down)

        def ours(
            x: Tensor, c: Tensor, ada: Tensor, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor
        ) -> Tensor:
            b1, s1, g1, b2, s2, g2 = F.linear(F.silu(c), ada).unsqueeze(1).chunk(6, -1)
            h = attention(mi.norm_modulate(x, s1, b1, eps=EPS), qkv, out, heads)
            x, y = mi.gated_residual_norm_modulate(x, h, g1, s2, b2, eps=EPS)
            return mi.gated_residual(x, mlp(y, up, down), g2)

        return plain, ours

    for name, (batch, length, width), heads in (
        ("S-8x64", (8, 64, 384), 6),
        ("S-8x256", (8, 256, 384), 6),
        ("XL-1x256", (1, 256, 1152), 16),
    ):
        plain, ours = blocks(heads)
        weights = (
            (6 * width, width),
            (3 * width, width),
            (width, width),
            (4 * width, width),
            (width, 4 * width),
        )
        sizes = ((batch, length, width), (batch, width), *weights)
        yield Case("dit", name, sizes, with_compiled(ours=ours, eager=plain), scaled=2)


FAMILIES = {
    "layer": layers,
    "each-token": tokens,
    "rms": rms,
    "group": groups,
    "residual": residuals,
    "dit": dit_blocks,
}


def main(argv: list[str] | None = None) -> int:
    options = cases.parser("The adaptive-norm block against PyTorch.", FAMILIES).parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/norms.py", *(sys.argv[1:] if argv is None else argv)]
    cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
