// The forward pass of a small batch, which is bound by reading W: W is read once, with neither tiles, which would be
// padding for the most part, nor shared memory on the way. The threads of a block are laid out along the reduction,
// each with kSmallBatchOutputs rows of W, whose next chunks are in flight while the current ones are multiplied. The
// products z x are computed in the accumulator's dtype, once for all outputs of a block.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/small_batch/small_batch_operands.cuh"

namespace mi_kernels::cuda {

template <class T>
using SmallBatchAccumulators = AccOf<T>[kSmallBatchRows<T>][kSmallBatchOutputs];

// Adds a(row, k) b(col, k) for k from `begin` to `end`, k = (i, j) with j below `width`. A thread reads kCount elements
// at a time, a chunk or one, and its neighbours those next to them.
template <class Arch, class T, int kCount, class A>
MI_DEVICE void stream_weights(const A& a, int64_t width, const MatrixRows<T>& b, int64_t row0, int64_t col0,
                              int64_t begin, int64_t end, SmallBatchAccumulators<T>& acc) {
  using Acc = AccOf<T>;
  constexpr int64_t kStride = kSmallBatchThreads * kCount;
  int64_t k = begin + Arch::thread() * kCount;
  if (k >= end) return;
  const int64_t i_stride = kStride / width, j_stride = kStride - i_stride * width;
  int64_t i = k / width, j = k - i * width;
  Chunk<T> next[kSmallBatchOutputs];
  const auto fetch = [&] {
    MI_UNROLL
    for (int m = 0; m < kSmallBatchOutputs; ++m) next[m] = load_elements<kCount>(b.at(col0 + m, k));
  };
  fetch();
  MI_NO_UNROLL
  while (true) {
    Chunk<T> weight[kSmallBatchOutputs], values[kSmallBatchRows<T>];
    Acc factor[kSmallBatchRows<T>];
    MI_UNROLL
    for (int m = 0; m < kSmallBatchOutputs; ++m) weight[m] = next[m];
    k += kStride;
    if (k < end) fetch();
    MI_UNROLL
    for (int r = 0; r < kSmallBatchRows<T>; ++r) {
      values[r] = load_elements<kCount>(a.at(row0 + r, j));
      factor[r] = a.factor(row0 + r, i);
    }
    MI_UNROLL
    for (int e = 0; e < kCount; ++e) {
      MI_UNROLL
      for (int r = 0; r < kSmallBatchRows<T>; ++r) {
        const Acc product = factor[r] * Acc(values[r].element[e]);
        MI_UNROLL
        for (int m = 0; m < kSmallBatchOutputs; ++m) acc[r][m] += product * Acc(weight[m].element[e]);
      }
    }
    if (k >= end) return;
    i += i_stride;
    j += j_stride;
    if (j >= width) {
      j -= width;
      ++i;
    }
  }
}

// The products with W of this split and, in the first one, those with U and V.
template <class Arch, class T, int kCount>
MI_DEVICE void add_small_batch_terms(const ForwardParams<T>& params, const TileCoord& t,
                                     SmallBatchAccumulators<T>& acc) {
  const int64_t row0 = t.row_tile * kSmallBatchRows<T>, col0 = t.col_tile * kSmallBatchOutputs;
  const int64_t begin = t.split * params.grid.split_size;
  const int64_t end = params.k - begin < params.grid.split_size ? params.k : begin + params.grid.split_size;
  stream_weights<Arch, T, kCount>(ProductRows<T>(params.zx, t.group), params.zx.width,
                                  MatrixRows<T>(params.weight, t.group), row0, col0, begin, end, acc);
  MI_NO_UNROLL
  for (int q = 0; q < 2 && t.split == 0; ++q)
    stream_weights<Arch, T, kCount>(MatrixRows<T>(params.linear_a[q], t.group), params.linear_k[q],
                                    MatrixRows<T>(params.linear_b[q], t.group), row0, col0, 0, params.linear_k[q], acc);
}

template <class T>
constexpr int small_batch_forward_shared_bytes() {
  return kSmallBatchRows<T> * kSmallBatchOutputs * (kSmallBatchThreads + 1) * int(sizeof(AccOf<T>));
}

template <class Arch, class T>
MI_DEVICE void small_batch_forward_block(const ForwardParams<T>& params) {
  using Acc = AccOf<T>;
  constexpr int kValues = kSmallBatchRows<T> * kSmallBatchOutputs, kPitch = kSmallBatchThreads + 1;
  constexpr int kThreadsPerValue = kSmallBatchThreads / kValues;  // that sum one result
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  SmallBatchAccumulators<T> acc = {};
  if (params.vectorized)
    add_small_batch_terms<Arch, T, kChunk<T>>(params, t, acc);
  else
    add_small_batch_terms<Arch, T, 1>(params, t, acc);
  // Over the threads of the block, in a fixed order.
  auto* shared = reinterpret_cast<Acc*>(Arch::shared());
  const int thread = Arch::thread(), value = thread / kThreadsPerValue;
  MI_UNROLL
  for (int v = 0; v < kValues; ++v) shared[v * kPitch + thread] = acc[v / kSmallBatchOutputs][v % kSmallBatchOutputs];
  Arch::sync_block();
  Acc sum = 0;
  MI_NO_UNROLL
  for (int other = thread % kThreadsPerValue; other < kSmallBatchThreads; other += kThreadsPerValue)
    sum += shared[value * kPitch + other];
  Arch::sync_block();
  shared[thread] = sum;
  Arch::sync_block();
  const int64_t row = t.row_tile * kSmallBatchRows<T> + thread / kSmallBatchOutputs,
                col = t.col_tile * kSmallBatchOutputs + thread % kSmallBatchOutputs;
  if (thread >= kValues || row >= params.epilogue.rows || col >= params.epilogue.cols) return;
  sum = 0;
  MI_NO_UNROLL
  for (int other = 0; other < kThreadsPerValue; ++other) sum += shared[thread * kThreadsPerValue + other];
  params.epilogue.store(t.split, t.group, row, col, sum, Acc(0));
}

}  // namespace mi_kernels::cuda
