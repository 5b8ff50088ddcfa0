"""Two products and one epilogue on Triton (CUTLASS: dual GEMM), and its elementwise gradients.

    p = x A^T + a,  q = z C^T + c,   y = sum_r f(p) h(q)
    dp = g f'(p) h(q),  dq = g f(p) h'(q)

A program computes both sums of a tile of outputs with the engine's main loop, rank after rank, and keeps the
sum over ranks in registers. Where z is x, both products share each tile of x, as gate and shift do.
The gradients are a kernel like those of modulation, with the ranks as an axis in which g does not vary.

Compiled ahead of time and interpreted, not yet run on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import activations
from . import modulate_tiling as axes
from .elementwise import loaded, origin, pointers
from .engine import accumulate, b_operand, remaining, tile, tile_index
from .host import constants, gemm_problem, nonempty
from .kernels import row_vector
from .launch import cdiv, launch, operand
from .tiles import choose

Maybe = Tensor | None


@triton.jit(do_not_specialize_on_alignment=["ranks"])
def _dual_linear_kernel(
    y,  # (pointer, strides of group, row, column)   [M, N]; there is one group, here and below
    p,  # the same, [M, ranks * N], or None
    q,  # as p
    x,  # (pointer, strides of group, row, k)   [M, K]
    z,  # (pointer, strides of group, row, i)   [M, I], or None: z is x
    v,  # (pointer, strides of group, column, k)   [ranks * N, K], or None if there is no k
    u,  # (pointer, strides of group, column, i)   [ranks * N, I], or None if there is no i
    bias_x,  # (pointer, strides of group, column), or None
    bias_z,  # as bias_x
    M,
    N,
    I,  # noqa: E741
    K,
    ranks,
    ACTIVATION_X: tl.constexpr,
    ACTIVATION_Z: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STYLE: tl.constexpr,
    INDEX: tl.constexpr,  # dtype of offsets within a tile
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    group, m_tile_index, n_tile_index = tile_index(M, N, BM, BN)
    row, column = m_tile_index * BM, n_tile_index * BN
    rows, columns = tl.arange(0, BM).to(INDEX), tl.arange(0, BN).to(INDEX)
    k_range = tl.arange(0, BK).to(INDEX)
    m_rows, m_columns = rows < remaining(M, row, BM), columns < remaining(N, column, BN)
    m_tile = m_rows[:, None] & m_columns[None, :]
    p_x, o_x = tile(x[0] + row * x[2], x[2], x[3], rows, k_range)
    a_x = p_x, o_x, m_rows[:, None], x[3]
    total = tl.zeros((BM, BN), ACCUMULATE)
    for rank in range(ranks):
        first = tl.cast(rank, tl.int64) * N + column
        acc = tl.zeros((BM, BN), ACCUMULATE)
        second = tl.zeros((BM, BN), ACCUMULATE)
        if v is not None:
            b_v = b_operand(v, group, first, columns, m_columns, k_range)
            b_u = None
            if z is None:
                b_u = b_operand(u, group, first, columns, m_columns, k_range)
            acc, second = accumulate(
                acc, second, a_x, b_v, b_u, None, None, 1, 0, K, True, STYLE, PRECISION, BK
            )
        if z is not None:
            if u is not None:
                p_z, o_z = tile(z[0] + row * z[2], z[2], z[3], rows, k_range)
                a_z = p_z, o_z, m_rows[:, None], z[3]
                b_u = b_operand(u, group, first, columns, m_columns, k_range)
                second, _ = accumulate(
                    second, second, a_z, b_u, None, None, None, 1, 0, I, True, STYLE, PRECISION, BK
                )
        if bias_x is not None:
            acc += row_vector(bias_x, group, first, columns, m_columns).to(ACCUMULATE)
        if bias_z is not None:
            second += row_vector(bias_z, group, first, columns, m_columns).to(ACCUMULATE)
        if p is not None:
            p_p, o_p = tile(p[0] + row * p[2] + first * p[3], p[2], p[3], rows, columns)
            tl.store(p_p + o_p, acc, mask=m_tile)
            p_q, o_q = tile(q[0] + row * q[2] + first * q[3], q[2], q[3], rows, columns)
            tl.store(p_q + o_q, second, mask=m_tile)
        total += activations.value(ACTIVATION_X, acc) * activations.value(ACTIVATION_Z, second)
    p_y, o_y = tile(y[0] + row * y[2] + column * y[3], y[2], y[3], rows, columns)
    tl.store(p_y + o_y, total, mask=m_tile)


@triton.jit(do_not_specialize_on_alignment=["M", "outer_0", "outer_1", "outer_2"])
def _dual_linear_grads_kernel(
    p_grad,
    p_p,
    p_q,
    p_dp,
    p_dq,  # with the strides of dp
    M,
    N,
    outer_0,  # sizes of the outer axes
    outer_1,
    outer_2,
    grad_strides,  # row, column, (outer axes), (depth axes); likewise below
    p_strides,
    q_strides,
    d_strides,
    GRAD_BY_ROW: tl.constexpr,
    GRAD_BY_COLUMN: tl.constexpr,
    ACTIVATION_X: tl.constexpr,
    ACTIVATION_Z: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    sizes = outer_0, outer_1, outer_2
    index = tl.program_id(0)
    n_tiles, m_tiles = tl.cdiv(N, BN), tl.cdiv(M, BM)
    i_n = (index % n_tiles).to(tl.int64) * BN + tl.arange(0, BN)
    index = index // n_tiles
    i_m = (index % m_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    i_outer = index // m_tiles
    m_m, m_n = i_m < M, i_n < N

    o_grad = origin(i_outer, sizes, grad_strides[2])
    b_grad = loaded(p_grad, grad_strides, o_grad, i_m, i_n, m_m, m_n, GRAD_BY_ROW, GRAD_BY_COLUMN)
    b_p = loaded(p_p, p_strides, origin(i_outer, sizes, p_strides[2]), i_m, i_n, m_m, m_n, True, True)
    b_q = loaded(p_q, q_strides, origin(i_outer, sizes, q_strides[2]), i_m, i_n, m_m, m_n, True, True)
    b_dp = activations.tangent(ACTIVATION_X, b_p, b_grad * activations.value(ACTIVATION_Z, b_q))
    b_dq = activations.tangent(ACTIVATION_Z, b_q, b_grad * activations.value(ACTIVATION_X, b_p))
    m_tile = m_m[:, None] & m_n[None, :]
    o_d = origin(i_outer, sizes, d_strides[2])
    dest = pointers(p_dp, d_strides, o_d, i_m, i_n, True, True)
    tl.store(dest, b_dp.to(dest.dtype.element_ty), m_tile)
    dest = pointers(p_dq, d_strides, o_d, i_m, i_n, True, True)
    tl.store(dest, b_dq.to(dest.dtype.element_ty), m_tile)


def dual_linear(
    x: Tensor,
    z: Maybe,
    weight_x: Tensor,
    weight_z: Tensor,
    bias_x: Maybe,
    bias_z: Maybe,
    activation_x: str,
    activation_z: str,
    ranks: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, p and q of ``mi_kernels::dual_linear``; shapes as in schema.py."""
    rows, width, context = x.shape[0], x.shape[1], (x if z is None else z).shape[1]
    features = weight_x.shape[0]
    out = features // ranks
    y = x.new_empty(rows, out)
    p, q = (x.new_empty(rows if keep else 0, features) for _ in "pq")
    v, u = nonempty(weight_x), nonempty(weight_z)
    # Tiles are loaded from these; a product without features loads none.
    read = (None if v is None else x, None if u is None else z, v, u)
    sizes = 1, rows, out, ranks, max(width, context)
    problem = gemm_problem("dual_linear", x, sizes, *read, second=z is None)
    config = choose(problem)
    operands = {
        "y": operand(y, 3),
        "p": operand(p, 3) if keep else None,
        "q": operand(q, 3) if keep else None,
        "x": operand(x, 3),
        "z": operand(z, 3),
        "v": operand(v, 3),
        "u": operand(u, 3),
        "bias_x": operand(bias_x, 2),
        "bias_z": operand(bias_z, 2),
    }
    arguments = operands | {
        "M": rows,
        "N": out,
        "I": context,
        "K": width,
        "ranks": ranks,
        "ACTIVATION_X": activation_x,
        "ACTIVATION_Z": activation_z,
        **constants(config, x.dtype, operands),
    }
    programs = cdiv(rows, config.BM) * cdiv(out, config.BN)
    launch(x.device, _dual_linear_kernel, programs, arguments, config.warps, config.stages)
    return y, p, q


def dual_linear_grads(
    grad: Tensor, p: Tensor, q: Tensor, activation_x: str, activation_z: str, ranks: int
) -> Tensor:
    """(dp | dq) of ``mi_kernels::dual_linear_grads``."""
    rows, features = p.shape
    d = p.new_empty(rows, 2 * features)
    if p.numel() == 0:
        return d
    shape = rows, ranks, features // ranks
    halves = d.view(rows, 2, *shape[1:]).unbind(1)
    grad = grad.unsqueeze(1).expand(shape)
    p, q = p.unflatten(1, shape[1:]), q.unflatten(1, shape[1:])
    operands = halves[0], grad, p, q
    strides = tuple(tuple(t.stride()) for t in operands)
    plan = axes.tiling(shape, strides, (False,) * 3, p.element_size())
    assert plan is not None  # three axes are never too many
    arguments = {
        **{"p_grad": grad, "p_p": p, "p_q": q, "p_dp": halves[0], "p_dq": halves[1]},
        **{"M": plan.rows.size, "N": plan.columns.size},
        **{f"outer_{axis}": outer.size for axis, outer in enumerate(plan.outer)},
        **{"grad_strides": plan.strides(1), "p_strides": plan.strides(2), "q_strides": plan.strides(3)},
        "d_strides": plan.strides(0),
        **dict(zip(("GRAD_BY_ROW", "GRAD_BY_COLUMN"), plan.varies(1), strict=True)),
        **{"ACTIVATION_X": activation_x, "ACTIVATION_Z": activation_z, "BM": plan.BM, "BN": plan.BN},
    }
    launch(p.device, _dual_linear_grads_kernel, plan.programs, arguments, axes.WARPS, 1)
    return d
