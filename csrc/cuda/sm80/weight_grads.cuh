// dW = g^T (z x), and dU or dV = g^T z or x. The sums are over rows, so both operands are MN-major.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/sm80/epilogue.cuh"

namespace mi_kernels::cuda {

template <class Arch, class Mma, bool kGenerated>
MI_DEVICE void weight_grads_block(const WeightGradsParams<typename Mma::T>& params) {
  using Tile = typename Mma::Tile;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  const int64_t row0 = t.row_tile * Tile::kRows, col0 = t.col_tile * Tile::kCols;
  const int64_t k0 = t.split * params.grid.split_size;
  const int64_t stages = stages_in_split(params.grid, t.split, params.k, Mma::kStageK);
  typename Mma::Accumulators acc;
  const auto multiply = [&](const auto& b) {
    mainloop<Arch, Mma, Major::mn, Major::mn>(in_group<Mma>(params.grad, t.group), b, row0, col0, k0, stages, 1, acc,
                                              NoOp{});
  };
  if constexpr (kGenerated) {
    auto zx = params.zx;
    zx.to_group(t.group);
    multiply(zx);
  } else {
    multiply(in_group<Mma>(params.features, t.group));
  }
  store_tile<Arch, Mma>(params.epilogue, acc, t);
}

}  // namespace mi_kernels::cuda
