"""Arguments of normalisation with modulation: the part of samples.py for them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .lru_cache import normal
from .samples import LAYOUTS, lay_out, made

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Normalization:
    """Arguments of the adaptive-norm block: everything but dtype, device and seed."""

    name: str
    x: Sizes
    gate: Sizes | None = None
    scale: Sizes | None = None
    shift: Sizes | None = None
    residual: bool = False
    affine: str = ""  # of "wb"
    norm: str = "layer"
    groups: int | None = None
    layout: str = "contiguous"
    activation: str = "identity"
    scale_offset: float = 1.0
    mean: float = 0.0  # of x

    def __str__(self) -> str:
        parts = [self.norm, self.name, "" if self.layout == "contiguous" else self.layout]
        parts += ["" if self.activation == "identity" else self.activation]
        parts += ["" if self.groups is None else f"groups{self.groups}"]
        parts += ["" if self.mean == 0 else f"mean{self.mean:g}"]
        return "-".join(part for part in parts if part)

    @property
    def channel(self) -> int:
        """The dimension of the channels."""
        return 1 if self.norm == "group" else len(self.x) - 1

    @property
    def options(self) -> dict[str, Any]:
        numbers = {"scale_offset": self.scale_offset, "activation": self.activation}
        return {"norm": self.norm, "groups": self.groups, **numbers}

    @property
    def shape(self) -> torch.Size:
        """Of the result: with a residual both are one tensor."""
        return torch.Size((2, *self.x) if self.residual else self.x)

    def call(self, module: Any, *tensors: Tensor | None) -> Tensor:
        """The function of a module, the package or the reference, with x_new and y in one tensor."""
        x, h, gate, scale, shift, weight, bias = tensors
        options = self.options | {"weight": weight, "bias": bias}
        if not self.residual:
            return module.norm_modulate(x, scale, shift, **options)
        return torch.stack(module.gated_residual_norm_modulate(x, h, gate, scale, shift, **options))

    def _lay_out(self, tensor: Tensor, expand_dim: int) -> Tensor:
        if self.layout == "channels_last":
            return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 1 else tensor
        if self.layout == "chunks":
            return tensor
        return lay_out(tensor, self.layout, expand_dim=expand_dim)

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> list[Tensor | None]:
        """x, h, gate, scale, shift, weight, bias or None. The same numbers in every dtype, rounded."""
        channels = (self.x[self.channel],)
        sizes = [
            *(self.x, self.x if self.residual else None, self.gate, self.scale, self.shift),
            *(channels if letter in self.affine else None for letter in "wb"),
        ]
        left = iter(normal([size for size in sizes if size is not None], seed))
        tensors: list[Tensor | None] = [
            None if size is None else made(next(left), dtype, device) for size in sizes
        ]
        if self.mean:
            assert tensors[0] is not None
            tensors[0] = (tensors[0].double() + self.mean).to(dtype)
        if self.layout == "chunks":  # of one linear layer's output, as in DiT
            given = [k for k in (2, 3, 4) if tensors[k] is not None]
            whole = torch.cat([t for t in tensors[2:5] if t is not None], self.channel)
            for k, chunk in zip(given, whole.chunk(len(given), self.channel), strict=True):
                tensors[k] = chunk
        dims = (0, 0, -1, -1, -1, 0, 0)
        laid = [None if t is None else self._lay_out(t, dim) for t, dim in zip(tensors, dims, strict=True)]
        return [None if t is None else t.requires_grad_(requires_grad) for t in laid]

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        (values,) = normal([tuple(self.shape)], seed)
        tensor = made(values, dtype, device)
        if self.layout in ("transposed", "gaps", "offset"):
            return lay_out(tensor, self.layout)
        return tensor


def _block(name: str, x: Sizes, context: Sizes, **fields: Any) -> Normalization:
    """With all terms, and contexts of one size."""
    values: dict[str, Any] = {
        "residual": True,
        "affine": "wb",
        "gate": context,
        "scale": context,
        "shift": context,
    }
    return Normalization(name, x, **(values | fields))


TOKENS = _block("tokens", (3, 19, 40), (3, 1, 40))
RMS = replace(TOKENS, norm="rms")
MAPS = _block("maps", (2, 6, 5, 7), (2, 6, 1, 1), norm="group", groups=2)
PLAIN = Normalization("plain", (3, 19, 40))
MODULATED = Normalization("modulated", (3, 19, 40), None, (3, 1, 40), (3, 1, 40))
LARGE_MEAN = replace(MODULATED, mean=1000.0)


def normalizations() -> Iterator[Normalization]:
    """Every pattern of terms, broadcasting, layout and emptiness that normalisation is tested on."""
    for norm in ("layer", "rms"):
        yield from (replace(sample, norm=norm) for sample in _rows())
    yield from _maps()


def _rows() -> Iterator[Normalization]:
    plain = (
        *(TOKENS, PLAIN, MODULATED),
        replace(PLAIN, name="weights", affine="wb"),
        replace(PLAIN, name="scale", scale=(3, 1, 40), affine="b"),
        replace(PLAIN, name="shift", shift=(40,), affine="w"),
        replace(PLAIN, name="residual", residual=True),
        replace(PLAIN, name="gate", residual=True, gate=(3, 1, 40)),
        replace(MODULATED, name="residual-modulated", residual=True),
        # The gradient of a weight is a sum of n, which of one feature is 0 but for PyTorch's rounding.
        _block("one", (1,), (1,), affine="b"),
        _block("one-feature", (9, 1), (9, 1), affine="b"),
        _block("one-row", (33,), (33,)),
        _block("narrow", (31, 5), (31, 5)),
        _block("odd", (6, 33), (1, 33)),
        _block("wide", (2, 5, 384), (2, 1, 384)),
        _block("each", (2, 9, 33), (2, 9, 33)),
        _block("positions", (3, 7, 20), (1, 7, 20)),
        _block("numbers", (3, 7, 20), (1,)),
        _block("per-row", (3, 7, 20), (3, 7, 1)),
        replace(_block("different", (3, 7, 20), (3, 1, 20)), shift=(20,), scale=(7, 1)),
        _block("alternating", (2, 3, 4, 2, 10), (2, 1, 4, 1, 10)),
        _block("four", (2, 3, 4, 33), (3, 1, 33)),
        _block("long-rows", (3, 5000), (3, 1)),
        _block("many-rows", (3000, 8), (8,)),
        _block("threaded", (4, 300, 130), (4, 1, 130)),
        replace(TOKENS, layout="chunks"),
        replace(MODULATED, layout="chunks"),
        LARGE_MEAN,
        replace(TOKENS, mean=1000.0),
    )
    yield from plain
    for sizes in ((0, 3), (3, 0), (0, 0)):
        yield _block("empty", sizes, (1, sizes[1]))
    for layout in LAYOUTS[1:]:
        yield from (replace(sample, layout=layout) for sample in (TOKENS, MODULATED))
    for activation in ("sigmoid", "silu", "relu", "softmax"):
        yield replace(TOKENS, activation=activation, scale_offset=0.5)


def _maps() -> Iterator[Normalization]:
    def of(name: str, x: Sizes, context: Sizes, groups: int) -> Normalization:
        return _block(name, x, context, norm="group", groups=groups)

    plain = Normalization("plain", (2, 6, 5, 7), norm="group", groups=3)
    yield from (replace(MAPS, groups=groups) for groups in (1, 2, 3, 6))
    yield from (plain, replace(plain, name="weights", affine="wb"))
    yield replace(plain, name="modulated", scale=(2, 6, 1, 1), shift=(2, 6, 1, 1))
    yield replace(plain, name="residual", residual=True)
    yield of("channels", (5, 9, 4, 3), (9, 1, 1), 3)
    yield of("vectors", (7, 6), (7, 6), 2)
    yield of("sequence", (3, 8, 33), (3, 8, 1), 4)
    yield of("volume", (2, 4, 3, 2, 5), (2, 4, 1, 1, 1), 2)
    yield of("one-pixel", (3, 6, 1, 1), (3, 6, 1, 1), 2)
    yield of("threaded", (4, 16, 40, 50), (4, 16, 1, 1), 4)
    yield of("pixels", (2, 6, 5, 7), (2, 6, 5, 7), 2)
    yield replace(of("pixels-modulated", (2, 6, 5, 7), (1, 1, 5, 7), 2), gate=(2, 6, 1, 1))
    yield replace(of("pixels-gate", (2, 6, 5, 7), (2, 6, 1, 1), 2), gate=(2, 1, 5, 7))
    yield replace(of("pixels-shift", (2, 6, 5, 7), (2, 6, 1, 1), 2), scale=None, shift=(5, 7))
    yield replace(MAPS, mean=1000.0)
    yield replace(MAPS, layout="chunks")
    for sizes in ((0, 6, 2, 2), (2, 0, 2, 2)):  # without pixels PyTorch has NaN for the gradient of a weight
        yield of("empty", sizes, (1, sizes[1], 1, 1), 2)
    for layout in (*LAYOUTS[1:], "channels_last"):
        yield replace(MAPS, layout=layout)
    yield replace(of("threaded", (4, 16, 40, 50), (4, 16, 1, 1), 4), layout="channels_last")
    yield replace(MAPS, activation="tanh")
