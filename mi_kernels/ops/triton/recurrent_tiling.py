"""The form and the tiles of a call of the family recurrent: pure functions of its sizes, not autotuned."""

from typing import NamedTuple

import torch

from .tile_limits import AMD, next_power

# All weights of a step, padded to powers of two, that a program may hold on chip: for tensor cores as
# operands spread over its warps; else every thread has all of K.
HELD_BYTES = 64 << 10
HELD_BYTES_WITHOUT_TENSOR_CORES = 16 << 10
# Bytes of a row of accumulators of 8 warps: of gates, of which there are many tiles (twice as much spills up
# to 136 bytes), and of the products W_i x.
HELD_GATES, HELD_PRODUCTS = 1 << 10, 4 << 10
LEAST = 16  # of each axis of a product
MOST_ROWS = 64


class Sizes(NamedTuple):
    """Of a call: ``steps`` T, ``rows`` B, ``units`` H, ``state`` P, ``factors`` M or X, ``gates``."""

    steps: int
    rows: int
    units: int
    state: int
    factors: int
    gates: int


class Tile(NamedTuple):
    """Blocks of rows, of units or columns, and of K, with warps and stages."""

    BM: int
    BU: int
    BK: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """Of a program that makes all steps: rows, units, features of the state, factors."""

    BM: int
    BU: int
    BP: int
    BK: int
    warps: int


def padded(size: int) -> int:
    return max(next_power(size), LEAST)


def whole(
    sizes: Sizes, dtype: torch.dtype, dense: bool, factored: bool, hh: bool, hr: bool, tensor_cores: bool
) -> Blocks | None:
    """The blocks of a program that makes all steps, or None where it cannot hold the weights."""
    found, most = None, HELD_BYTES if tensor_cores else HELD_BYTES_WITHOUT_TENSOR_CORES
    # Of 128 columns 4 warps spill up to 320 bytes; so do 8 warps of whose tiles one has 16 columns.
    for least, warps in ((LEAST, 4), (2 * LEAST, 8)):
        units, state = (max(padded(size), least) for size in (sizes.units, sizes.state))
        factors = padded(sizes.factors) if dense else max(padded(sizes.factors), least)
        columns = next_power(sizes.gates) * units
        elements = (columns * factors + factors * state) * factored + columns * state * hh
        elements += units * state * (hr + factors * dense)
        widest = LEAST * max(columns, units * state * dense, factors, state)
        found = Blocks(LEAST, units, state, factors, warps)
        held = elements * dtype.itemsize
        if widest <= LEAST * 64 and held <= most // 2:
            break
    wide = max(dtype.itemsize, 4)
    if held > most or columns * wide > HELD_GATES or units * state * dense * wide > HELD_PRODUCTS:
        return None
    return found


def rows_of_a_block(rows: int) -> int:
    return min(padded(rows), MOST_ROWS)


def step(
    sizes: Sizes,
    columns: int,
    gates: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    deep: int,
    tensor_cores: bool,
    aligned: bool,
) -> Tile:
    """The tile of a launch of a step; ``deep``: the longest sum of its products; ``aligned``: whether their
    operands are loaded 16 bytes at a time (host.vectorizable)."""
    rows = rows_of_a_block(sizes.rows)
    # 64 columns spill up to 1056 bytes in the backward pass of a GRU, and 48 without tensor cores.
    widest = 64 // (2 if sizes.gates == 3 else 1) // (1 if tensor_cores else 2) // next_power(gates)
    units = max(min(padded(columns), widest), LEAST)
    if dtype == torch.float64 or capability == AMD:
        return Tile(rows, min(units, 32), LEAST, 4, 1 if capability == AMD else 2)
    # Unaligned, every element has its own address: 4 warps spill up to 128 bytes, twice as deep up to 168.
    depth = min(padded(deep), max((128 if aligned else 64) // dtype.itemsize, LEAST))
    return Tile(rows, units, depth, 4 if aligned else 8, 3 if dtype.itemsize == 2 else 2)
