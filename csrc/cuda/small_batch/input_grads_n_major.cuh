// dx and dz of a small batch whose W is contiguous along the outputs. A thread has one input j, of all rows of the
// block, and every group_threads-th chunk of outputs; it adds up its part of T_ij = sum_o g[o] W[o, i, j] for a few
// contexts i at once. z_i T_ij is added to its dx, and the sums of x_j T_ij over the threads of the block are dz_i. The
// threads of a group are laid out along the outputs, the groups of a block along j.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/small_batch/small_batch_operands.cuh"

namespace mi_kernels::cuda {

template <class T>
constexpr int small_batch_input_grads_n_major_shared_bytes() {
  return kSmallBatchThreads * kSmallBatchRows<T> * kSmallBatchInFlight * int(sizeof(AccOf<T>));
}

// sums[r][q] += sum over this thread's outputs from `begin` to `end` of g[row0 + r, o] W[o, i + q, j], `weight` being
// W[0, i, j].
template <class T, int kCount>
MI_DEVICE void sum_over_own_outputs(const MatrixRows<T>& grad, const T* weight, int64_t context_stride, int contexts,
                                    int64_t row0, int64_t begin, int64_t end, int64_t step,
                                    AccOf<T> (&sums)[kSmallBatchRows<T>][kSmallBatchInFlight]) {
  using Acc = AccOf<T>;
  MI_NO_UNROLL
  for (int64_t o = begin; o < end; o += step) {
    Chunk<T> chunk[kSmallBatchInFlight];
    MI_UNROLL
    for (int q = 0; q < kSmallBatchInFlight; ++q)
      if (q < contexts) chunk[q] = load_elements<kCount>(weight + q * context_stride + o);
    MI_UNROLL
    for (int r = 0; r < kSmallBatchRows<T>; ++r) {
      MI_UNROLL
      for (int e = 0; e < kCount; ++e) {
        const Acc g = Acc(*grad.at(row0 + r, o + e));
        MI_UNROLL
        for (int q = 0; q < kSmallBatchInFlight; ++q) sums[r][q] += g * Acc(chunk[q].element[e]);
      }
    }
  }
}

template <class Arch, class T, int kCount>
MI_DEVICE void small_batch_input_grads_n_major(const InputGradsParams<T>& params) {
  using Acc = AccOf<T>;
  constexpr int kRows = kSmallBatchRows<T>, kContexts = kSmallBatchInFlight;
  const TileCoord t = tile_coord(params.grid, Arch::block_x());
  const InputGradsSplits& splits = params.splits;
  const int group_threads = splits.group_threads, thread_groups = kSmallBatchThreads / group_threads;
  const int thread_rank = Arch::thread() % group_threads, thread_group = Arch::thread() / group_threads;
  const int64_t context_split = t.split % splits.context_splits, out_split = t.split / splits.context_splits;
  const int64_t row0 = t.row_tile * kRows, j = t.col_tile * thread_groups + thread_group;
  const int64_t i_begin = context_split * params.grid.split_size, o_begin = out_split * splits.out_split_size;
  const int64_t i_end =
      i_begin + params.grid.split_size < params.context ? i_begin + params.grid.split_size : params.context;
  const int64_t o_end = o_begin + splits.out_split_size < params.k ? o_begin + splits.out_split_size : params.k;
  const MatrixRows<T> grad(params.grad, t.group);
  const T* weight = params.weight.data + t.group * params.weight.group_stride + j * params.weight.outer_stride;
  const auto row = [&](int r) { return grad.clamped(row0 + r); };
  const T* z = params.z + t.group * params.z_group;
  const T* x = params.x + t.group * params.x_group;
  auto* shared = reinterpret_cast<Acc*>(Arch::shared()) + Arch::thread();
  // A thread without elements would make 0 times Inf of its sums.
  const bool in_bounds = j < params.width && o_begin + thread_rank * kCount < o_end;
  Acc x_values[kRows] = {}, dx[kRows] = {};
  if (params.dz && in_bounds) {
    MI_UNROLL
    for (int r = 0; r < kRows; ++r) x_values[r] = Acc(x[row(r) * params.x_row + j * params.x_col]);
  }
  MI_NO_UNROLL
  for (int64_t i = i_begin; i < i_end; i += kContexts) {
    const int contexts = i_end - i < kContexts ? int(i_end - i) : kContexts;
    Acc sums[kRows][kContexts] = {};
    if (in_bounds)
      sum_over_own_outputs<T, kCount>(grad, weight + i * params.weight.context_stride, params.weight.context_stride,
                                      contexts, row0, o_begin + thread_rank * kCount, o_end, group_threads * kCount,
                                      sums);
    MI_UNROLL
    for (int q = 0; q < kContexts; ++q) {
      MI_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (params.dx && q < contexts && in_bounds)
          dx[r] += Acc(z[row(r) * params.z_row + (i + q) * params.z_col]) * sums[r][q];
        sums[r][q] *= x_values[r];
      }
    }
    if (!params.dz) continue;
    MI_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MI_UNROLL
      for (int q = 0; q < kContexts; ++q) shared[(r * kContexts + q) * kSmallBatchThreads] = sums[r][q];
    }
    tree_sum<Arch, kRows * kContexts>(shared, Arch::thread(), kSmallBatchThreads, 1);
    // The first threads store the sums, which all are in the column of thread 0.
    const int v = Arch::thread(), r = v / kContexts, q = v % kContexts;
    if (v < kRows * kContexts && row0 + r < params.rows && q < contexts)
      params.dz[(((out_split * params.grid.col_tiles + t.col_tile) * params.grid.groups + t.group) * params.rows +
                 row0 + r) *
                    params.context +
                i + q] = reinterpret_cast<Acc*>(Arch::shared())[v * kSmallBatchThreads];
    Arch::sync_block();  // thread 0 writes its column again
  }
  if (!params.dx) return;
  MI_UNROLL
  for (int r = 0; r < kRows; ++r) shared[r * kSmallBatchThreads] = dx[r];
  tree_sum<Arch, kRows>(shared, thread_rank, group_threads, 1);
  if (thread_rank > 0 || !in_bounds) return;
  MI_UNROLL
  for (int r = 0; r < kRows; ++r)
    if (row0 + r < params.rows)
      params.dx[((t.split * params.grid.groups + t.group) * params.rows + row0 + r) * params.width + j] =
          shared[r * kSmallBatchThreads];
}

template <class Arch, class T>
MI_DEVICE void small_batch_input_grads_n_major_block(const InputGradsParams<T>& params) {
  if (params.vectorized)
    small_batch_input_grads_n_major<Arch, T, kChunk<T>>(params);
  else
    small_batch_input_grads_n_major<Arch, T, 1>(params);
}

}  // namespace mi_kernels::cuda
