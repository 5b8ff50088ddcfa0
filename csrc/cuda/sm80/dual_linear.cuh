// Two products and their epilogue, y = sum over ranks of f(p) h(q): p and q of a tile of outputs, one rank after
// another.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/sm80/epilogue.cuh"

namespace mi_kernels::cuda {

// The sum over the ranks stays in shared memory, behind that of the engine.
template <class Mma>
int dual_linear_shared_bytes(int64_t ranks) {
  constexpr int kTotals = Mma::Tile::kRows * (Mma::Tile::kCols / 2) * int(sizeof(typename Mma::Acc));
  return engine_shared_bytes<Mma>() + (ranks > 1 ? kTotals : 0);
}

// Adds one rank. A thread owns the same outputs in each, so that totals need no barrier.
template <class Arch, class Mma>
MI_DEVICE void add_rank(const DualLinearEpilogue<typename Mma::T>& epilogue, const typename Mma::Accumulators& acc,
                        int64_t rank, int64_t row0, int64_t col0) {
  using T = typename Mma::T;
  using Acc = typename Mma::Acc;
  using Tile = typename Mma::Tile;
  constexpr int kPitch = epilogue_pitch<Mma>(), kCols = Tile::kCols / 2;
  auto* sums = reinterpret_cast<Acc*>(Arch::shared());
  auto* totals = reinterpret_cast<Acc*>(Arch::shared() + engine_shared_bytes<Mma>());
  store_accumulators<Arch, Mma>(acc, sums);
  MI_NO_UNROLL
  for (int at = Arch::thread(); at < Tile::kRows * kCols; at += kEngineThreads) {
    const int r = at / kCols, c = at % kCols;
    const int64_t row = row0 + r, col = col0 + c;
    if (row >= epilogue.rows || col >= epilogue.cols) continue;
    Acc total = epilogue.product(rank, row, col, sums[r * kPitch + c], sums[r * kPitch + kCols + c]);
    if (rank > 0) total += totals[at];
    if (rank + 1 < epilogue.ranks)
      totals[at] = total;
    else
      epilogue.y[row * epilogue.cols + col] = T(total);
  }
}

template <class Arch, class Mma>
MI_DEVICE void dual_linear_block(const DualLinearParams<typename Mma::T>& params) {
  using Tile = typename Mma::Tile;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  const int64_t row0 = t.row_tile * Tile::kRows, col0 = t.col_tile * (Tile::kCols / 2);
  const auto stages = [&](int s) { return ceil_div(params.k[s], Mma::kStageK); };
  MI_NO_UNROLL
  for (int64_t rank = 0; rank < params.epilogue.ranks; ++rank) {
    typename Mma::Accumulators acc;
    MatrixPair<typename Mma::T> b[2] = {params.b[0], params.b[1]};
    b[0].to_group(rank);
    b[1].to_group(rank);
    if (params.shared) {
      mainloop<Arch, Mma, Major::k, Major::k>(params.a[0], b[0], row0, col0, 0, stages(0), 1, acc, NoOp{});
    } else {
      // Not with zeros in place of the other weight: 0 times an infinite x would be NaN.
      mainloop<Arch, Mma, Major::k, Major::k, Sums::first>(params.a[0], b[0], row0, col0, 0, stages(0), 1, acc, NoOp{});
      mainloop<Arch, Mma, Major::k, Major::k, Sums::second>(params.a[1], b[1], row0, col0, 0, stages(1), 1, acc,
                                                            NoOp{});
    }
    add_rank<Arch, Mma>(params.epilogue, acc, rank, row0, col0);
  }
}

}  // namespace mi_kernels::cuda
