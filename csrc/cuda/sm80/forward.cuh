// y = z^T W x + U z + V x + bias, then the gate if there is one.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/sm80/epilogue.cuh"

namespace mi_kernels::cuda {

// U z + V x, which the first split adds.
template <class Arch, class Mma>
MI_DEVICE void add_linear_terms(const ForwardParams<typename Mma::T>& params, const TileCoord& t,
                                typename Mma::Accumulators& acc) {
  using Tile = typename Mma::Tile;
  MI_NO_UNROLL
  for (int q = 0; q < 2 && t.split == 0; ++q)
    mainloop<Arch, Mma, Major::k, Major::k>(in_group<Mma>(params.linear_a[q], t.group),
                                            in_group<Mma>(params.linear_b[q], t.group), t.row_tile * Tile::kRows,
                                            t.col_tile * Tile::kCols, 0, ceil_div(params.linear_k[q], Mma::kStageK), 1,
                                            acc, NoOp{});
}

template <class Arch, class Mma, Major kWeightMajor>
MI_DEVICE void forward_block(const ForwardParams<typename Mma::T>& params) {
  using Tile = typename Mma::Tile;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  typename Mma::Accumulators acc;
  if (params.k > 0) {
    auto zx = params.zx;
    zx.to_group(t.group);
    mainloop<Arch, Mma, Major::k, kWeightMajor>(zx, in_group<Mma>(params.weight, t.group), t.row_tile * Tile::kRows,
                                                t.col_tile * Tile::kCols, t.split * params.grid.split_size,
                                                stages_in_split(params.grid, t.split, params.k, Mma::kStageK), 1, acc,
                                                NoOp{});
  }
  add_linear_terms<Arch, Mma>(params, t, acc);
  store_tile<Arch, Mma>(params.epilogue, acc, t);
}

// Without the products z x, which overflow float16: x W_i for one context i after another, scaled by z_i in float.
template <class Arch, class Mma, Major kWeightMajor>
MI_DEVICE void forward_per_context_block(const ForwardParams<typename Mma::T>& params) {
  using Tile = typename Mma::Tile;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  const int64_t row0 = t.row_tile * Tile::kRows, i0 = t.split * params.grid.split_size;
  const int64_t rest = params.zx.context - i0;
  typename Mma::Accumulators acc, total;
  if (params.k > 0) {
    auto zx = params.zx;
    auto weight = params.weight;
    zx.to_group(t.group);
    weight.to_group(t.group);
    weight.data += i0 * weight.context_stride;
    const int64_t contexts = rest < params.grid.split_size ? rest : params.grid.split_size;
    float local_z[Tile::kLocalRows];  // read one context ahead
    const auto read_z = [&](int64_t context) {
      MI_UNROLL
      for (int local = 0; local < Tile::kLocalRows; ++local) {
        const int64_t row = row0 + Tile::row(Arch::thread(), Tile::first_in_local_row(local));
        const bool in_bounds = row < params.epilogue.rows && context < contexts;
        local_z[local] = in_bounds ? float(zx.z[row * zx.z_row + (i0 + context) * zx.z_col]) : 0.0f;
      }
    };
    read_z(0);
    const auto scale_by_z = [&](int64_t context) {
      MI_UNROLL
      for (int s = 0; s < Tile::kAccumulators; ++s) total.value[s] += local_z[Tile::local_row(s)] * acc.at(s);
      acc.clear();
      read_z(context + 1);
    };
    mainloop<Arch, Mma, Major::k, kWeightMajor>(in_group<Mma>(params.linear_a[1], t.group), weight, row0,
                                                t.col_tile * Tile::kCols, 0, ceil_div(params.k, Mma::kStageK), contexts,
                                                acc, scale_by_z);
  }
  add_linear_terms<Arch, Mma>(params, t, total);
  store_tile<Arch, Mma>(params.epilogue, total, t);
}

}  // namespace mi_kernels::cuda
