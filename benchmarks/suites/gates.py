"""Gates, modulation and mixtures against eager PyTorch, torch.compile of it, and torch.addcmul forms.

    python benchmarks/suites/gates.py --threads 2 --output benchmarks/results/NAME.json

How a case is measured stands in cases.py. Modulation also meets a copy: `clone` allocates its result as we
do, and `copy_` writes into memory that is there.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case

# (name, x, scale)
MODULATIONS = (
    ("tokens-cached", (8, 256, 512), (8, 1, 512)),
    ("tokens", (16, 1024, 1024), (16, 1, 1024)),
    ("maps-7x7", (64, 512, 7, 7), (64, 512, 1, 1)),
    ("maps", (16, 256, 64, 64), (16, 256, 1, 1)),
    ("rows", (65536, 256), (256,)),
    ("full", (16384, 1024), (16384, 1024)),
)
# (name, rows, Z, X)
DIAGONALS = (
    ("small", 256, 64, 128),
    ("odd", 1000, 33, 77),
    ("middle", 4096, 64, 256),
    ("wide", 2048, 512, 1024),
    ("square", 4096, 256, 512),
    ("long", 32768, 32, 64),
)


def modulations(shapes: Sequence[tuple] = MODULATIONS) -> Iterator[Case]:
    """adaLN on tokens, FiLM on feature maps, one scale for all rows, and a scale of the size of x."""
    functions = {
        OURS: lambda x, s, t: mi.modulate(x, s, t, activation="sigmoid", scale_offset=1.0),
        "eager": lambda x, s, t: (torch.sigmoid(s) + 1) * x + t,
        "addcmul": lambda x, s, t: torch.addcmul(t, torch.sigmoid(s) + 1, x),
    }
    for name, x, scale in shapes:
        yield Case("modulate", name, (x, scale, scale), functions, copies=True)


def mixtures() -> Iterator[Case]:
    """A gate for each sample, for each row, for each feature map, and a gate of the size of the tensors."""

    def eager(a, b, gate):
        return b + torch.sigmoid(gate) * (a - b)

    def lerp(a, b, gate):
        return torch.lerp(b, a, torch.sigmoid(gate))

    for name, a, gate in (
        ("tokens-cached", (8, 256, 512), (8, 1, 512)),
        ("tokens", (16, 1024, 1024), (16, 1, 1024)),
        ("rows", (65536, 256), (65536, 1)),
        ("maps-7x7", (64, 512, 7, 7), (64, 512, 1, 1)),
        ("maps", (16, 256, 64, 64), (16, 256, 1, 1)),
        ("full", (16384, 1024), (16384, 1024)),
    ):
        torch._dynamo.reset()  # its limit of recompilations counts all sizes together
        functions = {
            OURS: mi.mix,
            "eager": eager,
            "lerp": lerp,
            "compiled eager": torch.compile(eager, dynamic=False, fullgraph=True),
            "compiled lerp": torch.compile(lerp, dynamic=False, fullgraph=True),
        }
        yield Case("mix", name, (a, a, gate), functions, copies=True)


def mixed() -> Iterator[Case]:
    """Features in 16 bits with modulation in float32, as diffusers has them."""
    functions = {
        OURS: lambda x, s, t: mi.modulate(x, s, t, scale_offset=1.0),
        "eager": lambda x, s, t: x * (1 + s) + t,
        "addcmul": lambda x, s, t: torch.addcmul(t, x, s + 1),
    }
    for name, x, scale in (
        ("tokens-small", (2, 64, 256), (2, 1, 256)),
        ("tokens", (8, 1024, 768), (8, 1, 768)),
        ("maps", (16, 256, 32, 32), (16, 256, 1, 1)),
    ):
        yield Case("mixed", name, (x, scale, scale), functions, mixed=True)


def diagonals(shapes: Sequence[tuple] = DIAGONALS) -> Iterator[Case]:
    def eager(x, z, a, b, c, d):
        return torch.sigmoid(F.linear(z, a, b)) * x + F.linear(z, c, d)

    def addcmul(x, z, a, b, c, d):
        return torch.addcmul(F.linear(z, c, d), torch.sigmoid(F.linear(z, a, b)), x)

    def one_product(x, z, a, b, c, d):
        gate, shift = F.linear(z, torch.cat([a, c]), torch.cat([b, d])).chunk(2, -1)
        return torch.addcmul(shift, torch.sigmoid(gate), x)

    functions = {
        OURS: lambda x, z, a, b, c, d: mi.diagonal(x, z, a, b, c, d, activation="sigmoid"),
        "eager": eager,
        "addcmul": addcmul,
        "one product": one_product,
    }
    for name, rows, z, x in shapes:
        sizes = ((rows, x), (rows, z), (x, z), (x,), (x, z), (x,))
        yield Case("diagonal", name, sizes, functions, scaled=2)


def blocks() -> Iterator[Case]:
    """layer_norm -> modulate -> residual, which torch.compile turns into one loop nest."""

    def eager(x, scale, shift):
        return x + (F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)

    def ours(x, scale, shift):
        return x + mi.modulate(F.layer_norm(x, x.shape[-1:]), scale, shift, scale_offset=1.0)

    for name, x in (("cached", (4, 64, 512)), ("tokens", (8, 256, 1024)), ("long", (16, 1024, 1024))):
        torch._dynamo.reset()  # its limit of recompilations counts all sizes together
        compiled_ours, compiled_eager = (
            torch.compile(function, dynamic=False, fullgraph=True) for function in (ours, eager)
        )
        functions = {
            OURS: compiled_ours,
            "not compiled": ours,
            "eager": eager,
            "compiled eager": compiled_eager,
        }
        scale = (x[0], 1, x[2])
        yield Case("compiled block", name, (x, scale, scale), functions)


FAMILIES = {
    "modulate": modulations,
    "mix": mixtures,
    "mixed": mixed,
    "diagonal": diagonals,
    "block": blocks,
}


def main(argv: list[str] | None = None) -> int:
    options = cases.parser("Gates and modulation against PyTorch.", FAMILIES).parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/gates.py", *(sys.argv[1:] if argv is None else argv)]
    cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
