// dx and dz of a small batch: W is read once. A thread has kCount neighbouring inputs j, of all rows of the block, and
// sums T_ij = sum_o g[o] W[o, i, j] over the outputs of its split for one context i after another. z_i T_ij is added to
// its dx, and the sums over j of x_j T_ij are dz_i. The threads of a group are laid out along j, the groups of a block
// along i.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/small_batch/small_batch_operands.cuh"

namespace mi_kernels::cuda {

// Outputs whose chunks of W are in flight together.
template <class T>
inline constexpr int kOutputsInFlight = sizeof(T) == 8 ? 2 : 4;

template <class T>
constexpr int small_batch_input_grads_shared_bytes() {
  return kSmallBatchThreads * kChunk<T> * kSmallBatchRows<T> * int(sizeof(AccOf<T>));
}

// sums[r][e] = sum over o from `begin` to `end` of g[row0 + r, o] W[o, ...], `weight` being W[0, ...].
template <class T, int kCount>
MI_DEVICE void sum_over_outputs(const MatrixRows<T>& grad, const T* weight, int64_t out_stride, int64_t row0,
                                int64_t begin, int64_t end, AccOf<T> (&sums)[kSmallBatchRows<T>][kCount]) {
  using Acc = AccOf<T>;
  weight += begin * out_stride;
  MI_NO_UNROLL
  for (int64_t o = begin; o < end; o += kOutputsInFlight<T>) {
    Chunk<T> chunk[kOutputsInFlight<T>];
    MI_UNROLL
    for (int d = 0; d < kOutputsInFlight<T>; ++d)
      if (o + d < end) chunk[d] = load_elements<kCount>(weight + d * out_stride);
    MI_UNROLL
    for (int d = 0; d < kOutputsInFlight<T>; ++d) {
      if (o + d >= end) break;
      MI_UNROLL
      for (int r = 0; r < kSmallBatchRows<T>; ++r) {
        const Acc g = Acc(*grad.at(row0 + r, o + d));
        MI_UNROLL
        for (int e = 0; e < kCount; ++e) sums[r][e] += g * Acc(chunk[d].element[e]);
      }
    }
    weight += kOutputsInFlight<T> * out_stride;
  }
}

template <class Arch, class T, int kCount>
MI_DEVICE void small_batch_input_grads(const InputGradsParams<T>& params) {
  using Acc = AccOf<T>;
  constexpr int kRows = kSmallBatchRows<T>;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  const InputGradsSplits& splits = params.splits;
  const int group_threads = splits.group_threads, thread_groups = kSmallBatchThreads / group_threads;
  const int thread_rank = Arch::thread() % group_threads, thread_group = Arch::thread() / group_threads;
  // Splits are over the contexts first and over the outputs second.
  const int64_t context_split = t.split % splits.context_splits, out_split = t.split / splits.context_splits;
  const int64_t row0 = t.row_tile * kRows, j = (t.col_tile * group_threads + thread_rank) * kCount;
  const int64_t i_begin = context_split * params.grid.split_size, o_begin = out_split * splits.out_split_size;
  const int64_t i_end =
      i_begin + params.grid.split_size < params.context ? i_begin + params.grid.split_size : params.context;
  const int64_t o_end = o_begin + splits.out_split_size < params.k ? o_begin + splits.out_split_size : params.k;
  const MatrixRows<T> grad(params.grad, t.group), weight(params.weight, t.group);
  const auto row = [&](int r) { return grad.clamped(row0 + r); };
  const T* z = params.z + t.group * params.z_group;
  const T* x = params.x + t.group * params.x_group;
  auto* shared = reinterpret_cast<Acc*>(Arch::shared()) + Arch::thread();
  const bool in_bounds = j < params.width;
  Acc x_values[kRows][kCount] = {}, dx[kRows][kCount] = {};
  if (params.dz && in_bounds) {
    MI_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MI_UNROLL
      for (int e = 0; e < kCount; ++e) x_values[r][e] = Acc(x[row(r) * params.x_row + (j + e) * params.x_col]);
    }
  }
  MI_NO_UNROLL
  for (int64_t i0 = i_begin; i0 < i_end; i0 += thread_groups) {
    const int64_t i = i0 + thread_group;
    Acc sums[kRows][kCount] = {}, dz[kRows] = {};
    if (in_bounds && i < i_end) {
      sum_over_outputs<T, kCount>(grad, weight.data + i * params.weight.context_stride + j, params.weight.outer_stride,
                                  row0, o_begin, o_end, sums);
      MI_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Acc factor = params.dx ? Acc(z[row(r) * params.z_row + i * params.z_col]) : Acc(0);
        MI_UNROLL
        for (int e = 0; e < kCount; ++e) {
          if (params.dx) dx[r][e] += factor * sums[r][e];
          dz[r] += x_values[r][e] * sums[r][e];
        }
      }
    }
    if (!params.dz) continue;
    MI_UNROLL
    for (int r = 0; r < kRows; ++r) shared[r * kSmallBatchThreads] = dz[r];
    tree_sum<Arch, kRows>(shared, thread_rank, group_threads, 1);
    if (thread_rank == 0 && i < i_end) {
      MI_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (row0 + r < params.rows)
          params.dz[(((out_split * params.grid.col_tiles + t.col_tile) * params.grid.groups + t.group) * params.rows +
                     row0 + r) *
                        params.context +
                    i] = shared[r * kSmallBatchThreads];
    }
  }
  if (!params.dx) return;
  MI_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MI_UNROLL
    for (int e = 0; e < kCount; ++e) shared[(r * kCount + e) * kSmallBatchThreads] = dx[r][e];
  }
  tree_sum<Arch, kRows * kCount>(shared, thread_group, thread_groups, group_threads);
  if (thread_group > 0 || !in_bounds) return;
  MI_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MI_UNROLL
    for (int e = 0; e < kCount; ++e)
      if (row0 + r < params.rows)
        params.dx[((t.split * params.grid.groups + t.group) * params.rows + row0 + r) * params.width + j + e] =
            shared[(r * kCount + e) * kSmallBatchThreads];
  }
}

template <class Arch, class T>
MI_DEVICE void small_batch_input_grads_block(const InputGradsParams<T>& params) {
  if (params.vectorized)
    small_batch_input_grads<Arch, T, kChunk<T>>(params);
  else
    small_batch_input_grads<Arch, T, 1>(params);
}

}  // namespace mi_kernels::cuda
