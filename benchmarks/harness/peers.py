"""The alternatives, each a function (x [B, X], z [B, Z], weight) -> y [B, O], and the GEMM of equal work.

A rival gets W in the memory layout that suits it, arranged before the clock starts, and returns its
gradient in that layout. Whoever writes such a form by hand would store W that way too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_kernels.ops import counts

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Sizes(NamedTuple):
    B: int
    Z: int
    X: int
    O: int  # noqa: E741


@dataclass(frozen=True)
class Peer:
    """One alternative.

    Attributes:
        make: gives the function for these sizes; what it prepares is not timed.
        temporary: elements of its largest intermediate, to skip what would not fit into memory.
        order: dimensions of W [O, Z, X] in the order in which this rival stores them.
        package: what has to be installed, as PyPI calls it; one of several, with | between them.
    """

    name: str
    make: Callable[[Sizes], Function]
    temporary: Callable[[Sizes], int]
    order: tuple[int, int, int] = (0, 1, 2)
    package: str | None = None

    def missing(self) -> str | None:
        """The package that is not installed, or None."""
        names = [] if self.package is None else self.package.split("|")
        return self.package if names and all(installed(name) is None for name in names) else None

    def arrange(self, weight: Tensor) -> Tensor:  # [O, Z, X] -> the layout of this rival
        return weight.detach().permute(self.order).contiguous()


def installed(package: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch_bilinear(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return F.bilinear(z, x, weight)


def _einsum(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    # Left to right: makes [B, O, X]. The caller keeps PyTorch from using opt_einsum here.
    return torch.einsum("bi,oij,bj->bo", z, weight, x)


def _materialised(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    product = (z[:, :, None] * x[:, None, :]).flatten(1)  # [B, Z X]
    return product @ weight.flatten(1).t()


def _x_first(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:  # weight [O, Z, X]
    out, context, _ = weight.shape
    return torch.bmm((x @ weight.flatten(0, 1).t()).view(-1, out, context), z[:, :, None]).squeeze(2)


def _z_first(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:  # weight [Z, O, X]
    _, out, width = weight.shape
    return torch.bmm((z @ weight.flatten(1)).view(-1, out, width), x[:, :, None]).squeeze(2)


def _opt_einsum(sizes: Sizes) -> Function:
    import opt_einsum

    shapes = ((sizes.B, sizes.Z), (sizes.O, sizes.Z, sizes.X), (sizes.B, sizes.X))
    best = opt_einsum.contract_expression("bi,oij,bj->bo", *shapes, optimize="optimal")
    return lambda x, z, weight: best(z, weight, x)


def _cuequivariance(method: str, sizes: Sizes) -> Function:
    """Its methods are ``naive`` (PyTorch) and CUDA kernels: ``fused_tp`` for contractions of three and four

    operands, ``uniform_1d``, which it takes where no method is named.
    """
    import cuequivariance
    import cuequivariance_torch

    product = cuequivariance.SegmentedTensorProduct.from_subscripts("wuv,u,v,w")
    dims = {"u": sizes.Z, "v": sizes.X, "w": sizes.O}
    product.add_path(None, None, None, None, c=1.0, dims=dims)
    polynomial = cuequivariance.SegmentedPolynomial.eval_last_operand(product)
    module = cuequivariance_torch.SegmentedPolynomial(polynomial, method=method)
    if module.method != method:  # it silently falls back to another method
        raise RuntimeError(f"cuequivariance takes {module.method} for {method}")
    return lambda x, z, weight: module([weight.reshape(1, -1), z, x])[0]


def _e3nn(sizes: Sizes) -> Function:
    from e3nn import o3

    module = o3.FullyConnectedTensorProduct(
        *(f"{size}x0e" for size in (sizes.Z, sizes.X, sizes.O)),
        shared_weights=True,
        internal_weights=False,
        irrep_normalization="none",
        path_normalization="none",
    )
    return lambda x, z, weight: module(z, x, weight.reshape(-1))


def _rows_by(*letters: str) -> Callable[[Sizes], int]:
    def elements(sizes: Sizes) -> int:
        count = sizes.B
        for letter in letters:
            count *= getattr(sizes, letter)
        return count

    return elements


PEERS = {
    peer.name: peer
    for peer in (
        Peer("F.bilinear", lambda sizes: _torch_bilinear, _rows_by("X")),
        Peer("einsum", lambda sizes: _einsum, _rows_by("O", "X")),
        Peer("opt_einsum", _opt_einsum, lambda s: s.B * s.O * min(s.Z, s.X), package="opt_einsum"),
        Peer("materialised", lambda sizes: _materialised, _rows_by("Z", "X")),
        Peer("x-first", lambda sizes: _x_first, _rows_by("O", "Z")),
        Peer("z-first", lambda sizes: _z_first, _rows_by("O", "X"), order=(1, 0, 2)),
        Peer(
            "cuequivariance",
            partial(_cuequivariance, "naive"),
            _rows_by("O", "X"),
            package="cuequivariance-torch",
        ),
        Peer("e3nn", _e3nn, _rows_by("Z", "X"), order=(1, 2, 0), package="e3nn"),
    )
}
# Rivals that run on GPUs only.
GPU_PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            f"cuequivariance {method}",
            partial(_cuequivariance, method),
            lambda sizes: 0,
            package="cuequivariance-ops-torch-cu13|cuequivariance-ops-torch-cu12",
        )
        for method in ("fused_tp", "uniform_1d")
    )
}
COMPILED = "compile:"  # prefix of a rival under torch.compile


def find(name: str) -> Peer:
    """The rival of this name, perhaps with the prefix ``compile:``; ValueError where there is none."""
    known = PEERS | GPU_PEERS
    peer = known.get(name.removeprefix(COMPILED))
    if peer is None:
        raise ValueError(f"--rivals: no rival is called {name!r}; there are {', '.join(known)}")
    return peer


def compiled(function: Function) -> Function:
    """Under torch.compile for exactly these sizes. A graph break is an error, not a silent way out."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def gemms(work: str, sizes: Sizes) -> tuple[int, int, int]:
    """How many GEMMs of 2 B Z X O operations a pass needs: (y = P W^T, T = g W, dW = g^T P).

    Those of the double backward are as many as mi_kernels.ops.counts.double_backward has.
    """
    held = work == "double-backward" and counts.holds_pairs(*sizes, torch.float32)
    return (2, 2, 1) if held else {"forward": (1, 0, 0), "forward+backward": (1, 1, 1)}.get(work, (3, 2, 2))


def gemm(
    work: str, sizes: Sizes, dtype: torch.dtype, transposed: bool, device: str = "cpu"
) -> Callable[[], tuple]:
    """torch.mm of the same work on a ready P [B, Z X], into ready results; W as [O, Z X] or [Z X, O].

    Not a rival: P is given, and nothing is reduced to dx and dz. It shows what the machine can do.
    """
    B, Z, X, O = sizes  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((B, Z * X), (B, O), (Z * X, O) if transposed else (O, Z * X))
    p, g, stored = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    w = stored.t() if transposed else stored  # [O, Z X]
    y, t, dw = torch.empty_like(g), torch.empty_like(p), torch.empty_like(stored)
    forward, input_grads, weight_grads = gemms(work, sizes)

    def run() -> tuple:
        for _ in range(forward):
            torch.mm(p, w.t(), out=y)
        for _ in range(input_grads):
            torch.mm(g, w, out=t)
        for _ in range(weight_grads):
            torch.mm(p.t(), g, out=dw) if transposed else torch.mm(g.t(), p, out=dw)
        return ()

    return run


def triton_gemm(work: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Callable[[], tuple]:
    """The same work by the main loop of our Triton kernels as a plain product, with nothing generated.

    What Triton reaches on this GPU: the limit of the kernels that generate their operand.
    """
    from mi_kernels.ops.triton import interaction as triton

    B, Z, X, O = sizes  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)
    shapes = (B, Z * X), (B, O), (O, Z * X)
    p, g, w = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    no_context = p[:, :0]
    forward, input_grads, weight_grads = gemms(work, sizes)

    def run() -> tuple:
        for _ in range(forward):
            triton.forward(p, no_context, None, None, w, None)
        for _ in range(input_grads):
            triton.forward(g, no_context, None, None, w.t(), None)
        for _ in range(weight_grads):
            triton.weight_grads(g, p, no_context, False, False, True, False)
        return ()

    return run


def onednn_gemm(work: str, sizes: Sizes) -> Callable[[], tuple]:
    """The same work in float32 by oneDNN, which torch.mm uses for 16 bits but not for float32.

    torch.mm in float32 is MKL where torch was built with it, and MKL leaves AVX-512 unused on CPUs that are
    not Intel's: there it says little about the machine. Operands are ready in the layout that suits each
    product, results are new.
    """
    B, Z, X, O = sizes  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    p, g, w = (torch.randn(shape, generator=generator) for shape in ((B, Z * X), (B, O), (O, Z * X)))
    # F.linear(a, b) = a b^T: y = P W^T, T = g (W^T)^T, dW = g^T (P^T)^T
    forms = ((p, w), (g, w.t()), (g.t(), p.t()))
    pairs = []
    for (left, right), count in zip(forms, gemms(work, sizes), strict=True):
        if count:
            pairs += [(left.contiguous().to_mkldnn(), right.contiguous().to_mkldnn())] * count

    def run() -> tuple:
        with torch.no_grad():
            for left, right in pairs:
                F.linear(left, right)
        return ()

    return run


def gemm_elements(work: str, sizes: Sizes) -> int:
    """Elements of P and, where they are needed, of T and of a transposed P."""
    return sizes.B * sizes.Z * sizes.X * (3 if gemms(work, sizes)[1] else 1)
