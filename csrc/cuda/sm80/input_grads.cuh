// dx and dz from one T_i = g W_i: dx = sum_i z_i T_i stays in registers, dz_i = sum_j x_j T_ij is summed over the
// threads that share a row.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/sm80/engine.cuh"

namespace mi_kernels::cuda {

template <class Mma>
constexpr int input_grads_shared_bytes() {
  return kStages * stage_bytes<Mma>() + Mma::Tile::kRows * Mma::Tile::kThreadsPerRow * int(sizeof(typename Mma::Acc));
}

// W_i is the B operand, summed over the outputs: MN-major if W is contiguous along x, K-major along the outputs.
template <class Arch, class Mma, Major kWeightMajor>
MI_DEVICE void input_grads_block(const InputGradsParams<typename Mma::T>& params) {
  using T = typename Mma::T;
  using Acc = typename Mma::Acc;
  using Tile = typename Mma::Tile;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  const int64_t row0 = t.row_tile * Tile::kRows, col0 = t.col_tile * Tile::kCols, i0 = t.split * params.grid.split_size;
  const int64_t rest = params.context - i0, contexts = rest < params.grid.split_size ? rest : params.grid.split_size;
  const int thread = Arch::thread();
  auto grad = params.grad, weight = params.weight;
  grad.to_group(t.group);
  weight.to_group(t.group);
  weight.data += i0 * weight.context_stride;
  const T* z = params.z + t.group * params.z_group;
  const T* x = params.x + t.group * params.x_group;
  // [row][thread of that row]
  auto* dz_shared = reinterpret_cast<Acc*>(Arch::shared() + kStages * stage_bytes<Mma>());
  Acc dx[Tile::kAccumulators] = {};
  T x_fragment[Tile::kAccumulators];
  MI_UNROLL
  for (int s = 0; s < Tile::kAccumulators; ++s) {
    const int64_t row = row0 + Tile::row(thread, s), col = col0 + Tile::col(thread, s, false);
    x_fragment[s] =
        params.dz && row < params.rows && col < params.width ? x[row * params.x_row + col * params.x_col] : T(0.0f);
  }
  typename Mma::Accumulators acc;
  const auto context_done = [&](int64_t context) {
    Acc local_z[Tile::kLocalRows], local_dz[Tile::kLocalRows] = {};
    if (params.dx) {
      MI_UNROLL
      for (int local = 0; local < Tile::kLocalRows; ++local) {
        const int64_t row = row0 + Tile::row(thread, Tile::first_in_local_row(local));
        local_z[local] = row < params.rows ? Acc(z[row * params.z_row + (i0 + context) * params.z_col]) : Acc(0);
      }
    }
    MI_UNROLL
    for (int s = 0; s < Tile::kAccumulators; ++s) {
      const int local = Tile::local_row(s);
      if (params.dx) dx[s] += local_z[local] * acc.at(s);
      // Past the width an accumulator may be 0 * Inf, which is NaN.
      if (col0 + Tile::col(thread, s, false) < params.width) local_dz[local] += Acc(x_fragment[s]) * acc.at(s);
    }
    acc.clear();
    if (!params.dz) return;
    MI_UNROLL
    for (int local = 0; local < Tile::kLocalRows; ++local)
      dz_shared[Tile::row(thread, Tile::first_in_local_row(local)) * Tile::kThreadsPerRow + Tile::rank_in_row(thread)] =
          local_dz[local];
    Arch::sync_block();
    const int64_t row = row0 + thread;
    if (thread >= Tile::kRows || row >= params.rows) return;
    Acc sum = 0;
    MI_NO_UNROLL
    for (int m = 0; m < Tile::kThreadsPerRow; ++m) sum += dz_shared[thread * Tile::kThreadsPerRow + m];
    params.dz[((t.col_tile * params.grid.groups + t.group) * params.rows + row) * params.context + i0 + context] = sum;
  };
  mainloop<Arch, Mma, Major::k, kWeightMajor>(grad, weight, row0, col0, 0, ceil_div(params.k, Mma::kStageK), contexts,
                                              acc, context_done);
  if (!params.dx) return;
  MI_UNROLL
  for (int s = 0; s < Tile::kAccumulators; ++s) {
    const int64_t row = row0 + Tile::row(thread, s), col = col0 + Tile::col(thread, s, false);
    if (row < params.rows && col < params.width)
      params.dx[((t.split * params.grid.groups + t.group) * params.rows + row) * params.width + col] = dx[s];
  }
}

}  // namespace mi_kernels::cuda
