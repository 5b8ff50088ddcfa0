// The forward pass of a small batch whose W is contiguous along the outputs. A thread has kCount neighbouring outputs,
// of all rows of the block. The threads of a group are laid out along the outputs, the groups of a block along the
// reduction (i, j), whose next rows of W are in flight together. The products z x are computed in the accumulator's
// dtype.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/small_batch/small_batch_operands.cuh"

namespace mi_kernels::cuda {

template <class T>
constexpr int small_batch_forward_n_major_shared_bytes() {
  return kSmallBatchThreads * kChunk<T> * kSmallBatchRows<T> * int(sizeof(AccOf<T>));
}

// A sum in float32 that adds a block of terms at a time: one sequential sum would round more than PyTorch's do.
template <class T, int kCount>
struct BlockedSums {
  using Acc = AccOf<T>;
  static constexpr bool kBlocked = sizeof(T) == 4;
  static constexpr int kTerms = 256;
  Acc value[kSmallBatchRows<T>][kCount] = {}, total[kBlocked ? kSmallBatchRows<T> : 1][kCount] = {};
  int terms = 0;
  MI_DEVICE void added(int count) {
    if constexpr (kBlocked) {
      terms += count;
      if (terms >= kTerms) flush();
    }
  }
  MI_DEVICE void flush() {
    if constexpr (kBlocked) {
      MI_UNROLL
      for (int r = 0; r < kSmallBatchRows<T>; ++r) {
        MI_UNROLL
        for (int e = 0; e < kCount; ++e) {
          total[r][e] += value[r][e];
          value[r][e] = 0;
        }
      }
      terms = 0;
    }
  }
  MI_DEVICE Acc at(int r, int e) const {
    if constexpr (kBlocked) return total[r][e] + value[r][e];
    return value[r][e];
  }
};

// The products with W for k = (i, j) = begin + thread_group, and every `thread_groups` further, below `end`; `out` is
// the thread's first output.
template <class T, int kCount>
MI_DEVICE void stream_n_major_weights(const ForwardParams<T>& params, const TileCoord& t, int thread_group,
                                      int thread_groups, int64_t begin, int64_t end, int64_t out,
                                      BlockedSums<T, kCount>& sums) {
  using Acc = AccOf<T>;
  constexpr int kRows = kSmallBatchRows<T>, kInFlight = kSmallBatchInFlight;
  const ProductRows<T> zx(params.zx, t.group);
  const int64_t width = zx.of.width, row0 = t.row_tile * kRows, k_stride = params.weight.outer_stride;
  const int64_t i_step = thread_groups / width, j_step = thread_groups - i_step * width;
  int64_t k = begin + thread_group, i = k / width, j = k - i * width;
  const T* weight = params.weight.data + t.group * params.weight.group_stride + k * k_stride + out;
  MI_NO_UNROLL
  for (; k < end; k += kInFlight * thread_groups, weight += kInFlight * thread_groups * k_stride) {
    Chunk<T> chunk[kInFlight];
    MI_UNROLL
    for (int q = 0; q < kInFlight; ++q)
      if (k + q * thread_groups < end) chunk[q] = load_elements<kCount>(weight + q * thread_groups * k_stride);
    MI_UNROLL
    for (int q = 0; q < kInFlight; ++q) {
      if (k + q * thread_groups >= end) break;
      MI_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Acc product = zx.factor(row0 + r, i) * Acc(*zx.at(row0 + r, j));
        MI_UNROLL
        for (int e = 0; e < kCount; ++e) sums.value[r][e] += product * Acc(chunk[q].element[e]);
      }
      i += i_step;
      j += j_step;
      if (j >= width) {
        j -= width;
        ++i;
      }
    }
    sums.added(kInFlight);
  }
}

template <class Arch, class T, int kCount>
MI_DEVICE void small_batch_forward_n_major(const ForwardParams<T>& params) {
  using Acc = AccOf<T>;
  constexpr int kRows = kSmallBatchRows<T>;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  const int group_threads = small_batch_group_threads(ceil_div(params.epilogue.cols, kCount), kCount > 1);
  const int thread_groups = kSmallBatchThreads / group_threads;
  const int thread_rank = Arch::thread() % group_threads, thread_group = Arch::thread() / group_threads;
  const int64_t row0 = t.row_tile * kRows, out = (t.col_tile * group_threads + thread_rank) * kCount;
  const int64_t begin = t.split * params.grid.split_size;
  const int64_t end = params.k - begin < params.grid.split_size ? params.k : begin + params.grid.split_size;
  BlockedSums<T, kCount> sums;
  if (out < params.epilogue.cols) {
    stream_n_major_weights<T, kCount>(params, t, thread_group, thread_groups, begin, end, out, sums);
    // U and V are shared among the splits.
    const int64_t linear_begin = t.split * thread_groups + thread_group;
    const int64_t linear_step = params.grid.splits * thread_groups;
    MI_NO_UNROLL
    for (int q = 0; q < 2; ++q) {
      const MatrixRows<T> a(params.linear_a[q], t.group), b(params.linear_b[q], t.group);
      MI_NO_UNROLL
      for (int64_t k = linear_begin; k < params.linear_k[q]; k += linear_step) {
        MI_UNROLL
        for (int e = 0; e < kCount; ++e) {
          const Acc element = Acc(*b.at(out + e, k));
          MI_UNROLL
          for (int r = 0; r < kRows; ++r) sums.value[r][e] += Acc(*a.at(row0 + r, k)) * element;
        }
        sums.added(1);
      }
    }
  }
  auto* shared = reinterpret_cast<Acc*>(Arch::shared()) + Arch::thread();
  MI_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MI_UNROLL
    for (int e = 0; e < kCount; ++e) shared[(r * kCount + e) * kSmallBatchThreads] = sums.at(r, e);
  }
  tree_sum<Arch, kRows * kCount>(shared, thread_group, thread_groups, group_threads);
  if (thread_group > 0) return;
  MI_NO_UNROLL
  for (int v = 0; v < kRows * kCount; ++v) {
    const int64_t row = row0 + v / kCount, col = out + v % kCount;
    if (row < params.epilogue.rows && col < params.epilogue.cols)
      params.epilogue.store(t.split, t.group, row, col, shared[v * kSmallBatchThreads], Acc(0));
  }
}

template <class Arch, class T>
MI_DEVICE void small_batch_forward_n_major_block(const ForwardParams<T>& params) {
  if (params.weight.vectorized)
    small_batch_forward_n_major<Arch, T, kChunk<T>>(params);
  else
    small_batch_forward_n_major<Arch, T, 1>(params);
}

}  // namespace mi_kernels::cuda
