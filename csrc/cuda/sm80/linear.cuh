// Input gradients through U or V alone: g M.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/sm80/epilogue.cuh"

namespace mi_kernels::cuda {

template <class Arch, class Mma>
MI_DEVICE void linear_block(const LinearParams<typename Mma::T>& params) {
  using Tile = typename Mma::Tile;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  typename Mma::Accumulators acc;
  mainloop<Arch, Mma, Major::k, Major::mn>(
      in_group<Mma>(params.grad, t.group), in_group<Mma>(params.matrix, t.group), t.row_tile * Tile::kRows,
      t.col_tile * Tile::kCols, t.split * params.grid.split_size,
      stages_in_split(params.grid, t.split, params.k, Mma::kStageK), 1, acc, NoOp{});
  store_tile<Arch, Mma>(params.epilogue, acc, t);
}

}  // namespace mi_kernels::cuda
