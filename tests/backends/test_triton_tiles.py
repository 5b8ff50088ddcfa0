"""The host's side of the Triton backend: which tiles are chosen, for which problems, and what limits them."""

import threading
from dataclasses import replace
from itertools import product

import pytest
import torch

from mi_kernels.testing.samples import Shape

pytest.importorskip("triton")

from mi_kernels.ops.triton import gate as diagonal
from mi_kernels.ops.triton import gate as gated
from mi_kernels.ops.triton import host, interaction, plan, tile_limits, tiles
from mi_kernels.ops.triton.launch import recording, target
from mi_kernels.ops.triton.tile_limits import GemmProblem, TileConfig

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = (tile_limits.AMD, (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
PRIMITIVES = ("forward", "linear", "sum", "input_grads", "context_grad", "weight_grad", "matrix_grad")
# Products side by side, rows, columns, and the lengths of both sums.
SIZES = (
    (1, 4096, 256, 32, 256),
    (1, 1000, 75, 17, 100),
    (7, 1, 1, 1, 1),
    (1, 1, 1024, 64, 1024),
    (256, 64, 3, 1, 9000),
)
SPLIT = Shape("split", (20,), 40, 17, 20)


def problems():
    for primitive, dtype, capability in product(PRIMITIVES, DTYPES, CAPABILITIES):
        for sizes, old, aligned in product(SIZES, (False, True), (False, True)):
            for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                yield GemmProblem(primitive, dtype, precision, capability, old, aligned, *sizes)


def test_chosen_tiles_are_valid():
    for problem in problems():
        tile = tiles.choose(problem)
        assert tile_limits.valid(tile, problem), (problem, tile)
        assert min(tile.BM, tile.BN, tile.BK) >= 16
        parts = tiles.splits(problem, tile)
        assert 1 <= parts <= tiles.MAX_SPLITS


def test_small_blackwell_is_a_family():
    """12.1 has the registers and the matrix instruction of 12.0, which tools/aot.py compiles for."""
    for problem in problems():
        if problem.capability == (12, 0):
            assert tiles.choose(replace(problem, capability=(12, 1))) == tiles.choose(problem)


@pytest.mark.parametrize("capability", CAPABILITIES[1:], ids=str)
def test_wide_tiles_hold_one_result(capability):
    """128x256 leaves no registers for partial sums or an activation, and on mma for no generated operand."""
    x, z, w = plan.without_data((32768, 512), (32768, 32), (512, 32, 512), dtype=torch.bfloat16)
    (g, u, a), large = (x, w[..., 0], x[:512]), 128 * 128
    with recording(capability) as launches:
        gated.gated_interaction(x, z, w, None, None, None, "gelu", True)
        diagonal.diagonal(x, z, u, None, None, None, a, "gelu", 0.0, True)
        interaction.input_grads(g[:, :64], z, x, w[:64].mT, None, a[:64], False, True)
        assert all(a.arguments["BM"] * a.arguments["BN"] <= large for a in launches)
        interaction.forward(x, z, w, None, None, None)
    tensor_cores_of_their_own = capability in ((9, 0), (10, 0))
    last = launches[-1].arguments
    assert (last["BM"] * last["BN"] > large) == tensor_cores_of_their_own


def test_candidates_are_valid_and_begin_with_the_choice():
    problem = GemmProblem("forward", torch.bfloat16, "ieee", (9, 0), False, True, 1, 4096, 256, 32, 256)
    found = list(tiles.candidates(problem))
    assert found[0] == tiles.choose(problem) and len(set(found)) == len(found) > 20
    assert all(tile_limits.valid(tile, problem) for tile in found)


def test_the_hazard_of_hopper_is_avoided():
    """Triton before 3.9: no generated operand in registers in a pipelined loop."""
    for problem in problems():
        if problem.capability == (9, 0) and problem.old:
            tile = tiles.choose(problem)
            assert tile.style in ("plain", "promoted") or tile.stages == 1
            for style in ("held", "scaled", "k_scaled"):
                assert not tile_limits.valid(replace(tile, style=style, stages=2), problem)
    problem = GemmProblem("forward", torch.bfloat16, "ieee", (9, 0), True, True, 1, 4096, 256, 32, 256)
    assert tiles.choose(problem).style == "promoted"
    assert tiles.choose(replace(problem, old=False)).style == "held"


def test_a_table_comes_first_if_it_is_valid():
    problem = GemmProblem("forward", torch.bfloat16, "ieee", (9, 0), True, True, 1, 4096, 256, 32, 256)
    good, bad = TileConfig(64, 64, 32, 4, 2, "promoted"), TileConfig(64, 64, 32, 4, 2, "scaled")
    before = tiles.choose(problem)
    with tiles.overriding({problem.key: good}):
        assert tiles.choose(problem) == good
    with tiles.overriding({problem.key: bad}):  # the hazard
        assert tiles.choose(problem) == before


def test_no_tile_reaches_further_than_32_bits():
    """Offsets within a tile are int32 where strides are below WIDE_STRIDE."""
    assert 2 * (tile_limits.LARGEST_BLOCK - 1) * (host.WIDE_STRIDE - 1) < 1 << 31
    problem = GemmProblem("linear", torch.bfloat16, "ieee", (9, 0), False, True, 1, 1 << 20, 16, 1, 16)
    tile = TileConfig(tile_limits.LARGEST_BLOCK, 16, 16, 4, 1, "plain")
    assert tile_limits.valid(tile, problem) and not tile_limits.valid(replace(tile, BM=2 * tile.BM), problem)


def test_a_gate_has_an_entry_of_its_own():
    """A tile that is fastest without one may spill with it."""
    problem = GemmProblem("forward", torch.bfloat16, "ieee", (9, 0), False, True, 1, 32768, 512, 32, 512)
    wide = TileConfig(128, 256, 64, 8, 3, "held")
    with tiles.overriding({problem.key: wide}):
        assert tiles.choose(problem) == wide
        assert tiles.choose(replace(problem, gated=True)) != wide
    assert replace(problem, gated=True).key != problem.key


def rows_of(start, width, dtype=torch.bfloat16, gap=0):
    """Meta tensors of 64 rows whose first element is the one at ``start``."""
    return torch.empty(64, start + width + gap, dtype=dtype, device="meta")[:, start:][:, :width]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (rows_of(0, 256), True),
        (rows_of(0, 264), False),  # 528 bytes
        (rows_of(0, 260, torch.float32), False),
        (rows_of(0, 248, gap=8), False),  # the mask ends within 16 bytes for all that Triton knows
        (rows_of(16, 256), True),
        (rows_of(8, 256, gap=8), True),  # of a pointer bytes count
        (rows_of(1, 256, gap=15), False),
        (rows_of(0, 256, gap=8), False),
        (rows_of(0, 256).mT, True),
        (rows_of(0, 256)[:63].mT, True),
        (rows_of(0, 256).expand(3, 64, 256), True),
        (rows_of(0, 512)[:, ::2], False),
        (rows_of(0, 1).expand(64, 256), True),  # along the rows
        (rows_of(0, 16)[:, :1].expand(64, 256), False),
    ],
)
def test_what_is_read_16_bytes_at_a_time(tensor, expected):
    assert host.vectorizable(tensor) == expected


def test_which_axes_of_the_weight_are_read_16_bytes_at_a_time():
    weight = torch.empty(32, 48, 64, dtype=torch.bfloat16, device="meta")  # axes of a tile are n and k
    for order, expected in (((0, 1, 2), True), ((2, 1, 0), True), ((0, 2, 1), False)):
        assert host.vectorizable(weight.permute(order), -3) == expected


@pytest.mark.parametrize("changed", ["x", "w", "v", "z", "u and z", None])
def test_unaligned_operands_take_small_tiles(changed):
    """z alone is read by the element in any case."""

    def operand(*shape, of):
        gap = 8 if changed and of in changed.split() else 0
        return torch.empty(*shape[:-1], shape[-1] + gap, dtype=torch.float16, device="meta")[..., : shape[-1]]

    x, z, w = operand(4096, 256, of="x"), operand(4096, 32, of="z"), operand(256, 32, 256, of="w")
    u, v = operand(256, 32, of="u"), operand(256, 256, of="v")
    with recording((9, 0)) as launches:
        interaction.forward(x, z, w, u if changed == "u and z" else None, v, None)
    assert (launches[0].arguments["BM"] == 64) == (changed not in ("z", None))


def test_float32_products_are_as_exact_as_asked():
    x, w = torch.empty(64, 32, device="meta"), torch.empty(16, 32, device="meta")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for asked in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = asked
            with recording((9, 0)) as launches:
                interaction.forward(x, x[:, :0], None, None, w, None)
            assert [launch.arguments["PRECISION"] for launch in launches] == [asked]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("sizes", [(4096, 64, 256, 256), (16384, 128, 512, 512), (64, 512, 512, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_is_bounded(sizes, dtype):
    """No tensor of B*Z*X, B*O*X or B*O*Z elements, and in all no more than is said."""
    B, Z, X, O = sizes  # noqa: E741
    shapes = (B, O), (B, X), (B, Z), (O, Z, X), (O, Z), (O, X), (O,)
    grad, x, z, w, u, v, c = tensors = plan.without_data(*shapes, dtype=dtype)
    wide = host.accumulation_dtype(dtype).itemsize
    calls = {
        interaction.forward: (x, z, w, u, v, c),
        interaction.input_grads: (grad, x, z, w, u, v, True, True),
        interaction.weight_grads: (grad, x, z, True, True, True, True),
    }
    own = {t.untyped_storage()._cdata for t in tensors}
    for kernel, arguments in calls.items():
        launches, scratch = plan.record(kernel, arguments, x.device)
        assert scratch <= host.PARTIAL_BYTES + wide * max(tiles.L2_ELEMENTS, B * X * 32)
        for launch in launches:
            for operand in (a[0] for a in launch.arguments.values() if isinstance(a, tuple)):
                if operand.untyped_storage()._cdata not in own and operand.shape[-3:] != w.shape:
                    assert operand.numel() <= max(min(B * Z * X, B * O * X, B * O * Z) / 4, tiles.L2_ELEMENTS)


def test_another_thread_does_not_record():
    """Autograd starts kernels in threads of its own, while this one may ask for a plan."""
    seen = []
    with recording((9, 0)):
        thread = threading.Thread(target=lambda: seen.append(target(torch.device("cpu")).capability))
        thread.start()
        thread.join()
        seen.append(target(torch.device("cpu")).capability)
    assert seen == [(8, 0), (9, 0)]
