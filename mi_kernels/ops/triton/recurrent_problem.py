"""A call of the family recurrent: its sizes and weights, and how its kernels are launched."""

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..dtypes import accumulation_dtype
from ..precision import precision
from ..recurrent.forms import DENSE, FACTORED, GRU, form_of
from . import recurrent_tiling as tiling
from .host import vectorizable
from .launch import cdiv, launch, operand, target

Maybe = Tensor | None
Operand = tuple[Any, ...] | None
Product = tuple[Maybe, Maybe, int]  # a [T, B, K] or [B, K], w [N, K] or [N, I, K], K
NO_PRODUCT: Product = (None, None, 0)


class Problem:
    """Sizes and weights of a call, and how its kernels are launched."""

    def __init__(
        self,
        gates_x: Tensor,
        factors_x: Maybe,
        h0: Tensor,
        weights: Sequence[Maybe],
        integration: Maybe,
        lengths: Maybe,
        kind: str,
        activation: str,
        reverse: bool,
    ) -> None:
        self.like, self.factors_x, self.lengths = gates_x, factors_x, lengths
        self.weight_hh, self.weight_hm, self.weight_mh, self.weight, self.weight_hr = weights
        self.integration, self.reverse, self.activation = integration, reverse, activation
        self.form = form_of(kind, self.weight_hm)
        self.dtype, self.wide = gates_x.dtype, accumulation_dtype(gates_x.dtype)
        self.T, self.B, self.N = gates_x.shape
        self.H, self.P = self.N // self.form.gates, h0.shape[1]
        self.M = 0 if factors_x is None else factors_x.shape[2]
        self.sizes = tiling.Sizes(self.T, self.B, self.H, self.P, self.M, self.form.gates)
        self.factored, self.dense = self.form.structure == FACTORED, self.form.structure == DENSE
        # The columns of a GRU that one product has: r and z.
        self.columns = 2 * self.H if self.form.cell == GRU else self.N
        self.gates = 2 if self.form.cell == GRU else self.form.gates

    def blocks(self) -> tiling.Blocks | None:
        hh, hr = self.weight_hh is not None, self.weight_hr is not None
        return tiling.whole(self.sizes, self.dtype, self.dense, self.factored, hh, hr, self.tensor_cores)

    @property
    def tensor_cores(self) -> bool:
        return self.dtype.itemsize == 2 or precision(self.dtype) == "tf32"

    def empty(self, *sizes: int, wide: bool = False) -> Tensor:
        return self.like.new_empty(sizes, dtype=self.wide if wide else None)

    def steps_of(self, features: int, wanted: bool = True, wide: bool = False) -> Tensor:
        """A result [T, B, features], or one without elements."""
        return self.empty(self.T, self.B, features, wide=wide) if wanted else self.empty(0, wide=wide)

    def state(self, given: Maybe, features: int, wide: bool) -> list[Tensor]:
        """Two buffers, the first of which has the state that is given, or zeros."""
        dtype = self.wide if wide else self.dtype
        buffers = [self.empty(self.B, features, wide=wide) for _ in range(2)]
        if given is None:
            buffers[0].zero_()
        else:
            buffers[0].copy_(given.to(dtype))
        return buffers

    def sums(self, BM: int) -> Maybe:
        if self.integration is None:
            return None
        return self.like.new_zeros(2, cdiv(self.B, BM), 4, self.N, dtype=torch.float64)

    def split_hh(self) -> tuple[Maybe, Maybe]:
        """weight_hh, or that of the first two gates of a GRU and that of the last."""
        if self.form.cell != GRU:
            return self.weight_hh, None
        assert self.weight_hh is not None
        return self.weight_hh[: self.columns], self.weight_hh[self.columns :]

    def constants(self) -> dict[str, Any]:
        return {
            "ACTIVATION": self.activation,
            "ACCUMULATE": tl.float64 if self.wide == torch.float64 else tl.float32,
            "PRECISION": precision(self.dtype),
        }

    def launch_whole(
        self, kernel: Any, blocks: tiling.Blocks, transposed: bool, others: dict[str, Any]
    ) -> None:
        hh, weight_n = self.split_hh()
        weights = {"weight_hh": hh, "weight_n": weight_n, "weight_hm": self.weight_hm}
        weights |= {"weight_mh": self.weight_mh, "weight": self.weight, "weight_hr": self.weight_hr}
        if transposed:
            weights = {name: turned(t) for name, t in weights.items()}
        found: dict[str, Any] = {
            name: operand(t, 3 if name == "weight" else 2) for name, t in weights.items()
        }
        found |= {name: argument(name, t) for name, t in others.items()}
        found |= {"integration": operand(self.integration, 2), "lengths": operand(self.lengths, 1)}
        found |= {"T": self.T, "B": self.B, "H": self.H, "P": self.P, "M": self.M}
        found |= self.constants() | {"CELL": self.form.cell, "GATES": self.gates, "REVERSE": self.reverse}
        found |= {"BM": blocks.BM, "BU": blocks.BU, "BP": blocks.BP, "BK": blocks.BK}
        # One stage: loads of a later step must not pass the stores of an earlier one.
        found["INDEX"] = index(found)
        launch(self.like.device, kernel, cdiv(self.B, blocks.BM), found, blocks.warps, 1)

    def launch_step(
        self,
        kernel: Any,
        role: str,
        t: int,
        columns: int,
        per_unit: int = 1,
        *,
        first: Product = NO_PRODUCT,
        second: Product = NO_PRODUCT,
        dense: Product = NO_PRODUCT,
        constants: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """One launch: ``others`` are tensors [T, B, N] or [B, N] by their names in the kernel."""
        dtype, capability = self.dtype, target(self.like.device).capability
        deep = max(product[2] for product in (first, second, dense))
        aligned = all(is_aligned(product) for product in (first, second, dense))
        tile = tiling.step(self.sizes, columns, per_unit, dtype, capability, deep, self.tensor_cores, aligned)
        found: dict[str, Any] = dict.fromkeys(kernel.arg_names)
        found |= {name: argument(name, t) for name, t in others.items()}
        names = (("a1", "w1", "K1"), ("a2", "w2", "K2"), ("x", "w", "X"))
        for (a, w, K), product in zip(names, (first, second, dense), strict=True):
            dims = 3 if w == "w" else 2
            found |= {a: steps_operand(product[0]), w: operand(product[1], dims), K: product[2]}
        found |= {"integration": operand(self.integration, 2), "lengths": operand(self.lengths, 1)}
        found |= {"step": t, "T": self.T, "B": self.B, "C": columns, "ROLE": role, "GATES": per_unit}
        found |= {"BM": tile.BM, "BU": tile.BU, "BK": tile.BK} | self.constants() | (constants or {})
        found["INDEX"] = index(found)
        programs = cdiv(self.B, tile.BM) * cdiv(columns, tile.BU)
        launch(self.like.device, kernel, programs, found, tile.warps, tile.stages)

    def cell_products(self, m: Maybe, h: Tensor) -> dict[str, Any]:
        """What the gates (of a GRU the first two) are sums of, but for x."""
        found: dict[str, Any] = {"second": (h, self.split_hh()[0], self.P)}
        if self.factored:
            found["first"] = (m, self.weight_hm, self.M)
        if self.dense:
            found["dense"] = (self.factors_x, self.weight, self.M)
        return found


def is_aligned(product: Product) -> bool:
    a, w, _ = product
    return w is None or a is None or vectorizable(a) and vectorizable(w, -w.dim())


def index(arguments: dict[str, Any]) -> Any:
    """The dtype of offsets within a tile: some rows of an operand, all columns; all of a weight."""
    far = 0
    for name, one in arguments.items():
        if isinstance(one, tuple):
            steps, sizes = one[0].stride(), one[0].shape
            if not name.startswith("w"):
                steps, sizes = steps[-2:], (min(tiling.MOST_ROWS, *sizes[-2:-1] or (1,)), *sizes[-1:])
            far = max(far, sum(size * step for size, step in zip(sizes, steps, strict=False)))
    # Masked rows and columns of a tile may be beyond the sizes.
    return tl.int64 if far >= 1 << 28 else tl.int32


def steps_operand(tensor: Maybe) -> Operand:
    """Of [T, B, N] or [B, N]."""
    return operand(tensor, 3)


def argument(name: str, value: Any) -> Any:
    """A tensor as an operand, but for sums, which are contiguous; what is no tensor as it is."""
    return value if name.startswith("sums") or not isinstance(value, Tensor) else steps_operand(value)


def turned(weight: Maybe) -> Maybe:
    """With the axes of outputs and of the state in each other's place."""
    return None if weight is None else weight.transpose(0, 1)


def there(tensor: Tensor, wanted: bool) -> Maybe:
    return tensor if wanted else None
