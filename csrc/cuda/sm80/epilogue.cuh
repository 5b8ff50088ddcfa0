// The accumulators of a tile, through shared memory to the epilogue.
#pragma once

#include "cuda/common/epilogue.cuh"
#include "cuda/common/grid.h"
#include "cuda/sm80/engine.cuh"

namespace mi_kernels::cuda {

// A tile [rows][epilogue_pitch]; of a dual tile the second accumulators are the second half of the columns.
template <class Arch, class Mma>
MI_DEVICE void store_accumulators(const typename Mma::Accumulators& acc, typename Mma::Acc* shared) {
  using Tile = typename Mma::Tile;
  const int thread = Arch::thread();
  Arch::sync_block();
  MI_UNROLL
  for (int s = 0; s < Tile::kAccumulators; ++s)
    shared[Tile::row(thread, s) * epilogue_pitch<Mma>() + Tile::col(thread, s, Mma::kDual)] = acc.at(s);
  Arch::sync_block();
}

// Shared memory gives neighbouring threads neighbouring results, and the code of the activation is inlined once instead
// of once per accumulator.
template <class Arch, class Mma>
MI_DEVICE void store_tile(const Epilogue<typename Mma::T>& epilogue, const typename Mma::Accumulators& acc,
                          const TileCoord& t) {
  using Acc = typename Mma::Acc;
  using Tile = typename Mma::Tile;
  constexpr int kPitch = epilogue_pitch<Mma>(), kCols = Mma::kDual ? Tile::kCols / 2 : Tile::kCols;
  auto* shared = reinterpret_cast<Acc*>(Arch::shared());
  const int thread = Arch::thread();
  store_accumulators<Arch, Mma>(acc, shared);
  MI_NO_UNROLL
  for (int at = thread; at < Tile::kRows * kCols; at += kEngineThreads) {
    const int r = at / kCols, c = at % kCols;
    const int64_t row = t.row_tile * Tile::kRows + r, col = t.col_tile * kCols + c;
    if (row >= epilogue.rows || col >= epilogue.cols) continue;
    const Acc sum = shared[r * kPitch + c], second = Mma::kDual ? shared[r * kPitch + kCols + c] : Acc(0);
    epilogue.store(t.split, t.group, row, col, sum, second);
  }
}

}  // namespace mi_kernels::cuda
