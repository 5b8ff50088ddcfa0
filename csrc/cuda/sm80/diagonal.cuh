// The diagonal form: gate and shift of z in one tile of two accumulators for each output.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/sm80/epilogue.cuh"

namespace mi_kernels::cuda {

template <class Arch, class Mma>
MI_DEVICE void diagonal_block(const DiagonalParams<typename Mma::T>& params) {
  using Tile = typename Mma::Tile;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  const int64_t row0 = t.row_tile * Tile::kRows, col0 = t.col_tile * (Tile::kCols / 2);
  typename Mma::Accumulators acc;
  const auto stages = [&](int q) { return ceil_div(params.k[q], Mma::kStageK); };
  mainloop<Arch, Mma, Major::k, Major::k>(params.a[0], params.b[0], row0, col0, 0, stages(0), 1, acc, NoOp{});
  // Only the gate: a product of x with the zeros in place of a shift would be NaN for an infinite x.
  mainloop<Arch, Mma, Major::k, Major::k, Sums::first>(params.a[1], params.b[1], row0, col0, 0, stages(1), 1, acc,
                                                       NoOp{});
  store_tile<Arch, Mma>(params.epilogue, acc, t);
}

}  // namespace mi_kernels::cuda
