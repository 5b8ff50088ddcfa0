// The operands of the small-batch kernels, which are read straight to registers.
#pragma once

#include "cuda/common/operands.cuh"
#include "cuda/small_batch/tile.h"

namespace mi_kernels::cuda {

template <class T>
inline constexpr int kSmallBatchRows = small_batch_rows(int(sizeof(T)));

// Rows of z x, whose element (i, j) is factor(row, i) times the one at(row, j), and rows of a matrix, where i is 0 and
// the factor 1. Rows past the end read as the last one, and their results are not stored.
template <class T>
struct ProductRows {
  const OuterProducts<T>& of;
  const T *z, *x;
  MI_DEVICE ProductRows(const OuterProducts<T>& p, int64_t group)
      : of(p), z(p.z + group * p.z_group), x(p.x + group * p.x_group) {}
  MI_DEVICE int64_t clamped(int64_t row) const { return row < of.rows ? row : of.rows - 1; }
  MI_DEVICE const T* at(int64_t row, int64_t j) const { return x + clamped(row) * of.x_row + j * of.x_col; }
  MI_DEVICE AccOf<T> factor(int64_t row, int64_t i) const {
    return AccOf<T>(z[clamped(row) * of.z_row + i * of.z_col]);
  }
};
template <class T>
struct MatrixRows {
  const MatrixOperand<T>& of;
  const T* data;
  MI_DEVICE MatrixRows(const MatrixOperand<T>& m, int64_t group) : of(m), data(m.data + group * m.group_stride) {}
  MI_DEVICE int64_t clamped(int64_t row) const { return row < of.outer_size ? row : of.outer_size - 1; }
  MI_DEVICE const T* at(int64_t row, int64_t k) const {
    return data + clamped(row) * of.outer_stride + k * of.inner_stride;
  }
  MI_DEVICE AccOf<T> factor(int64_t, int64_t) const { return AccOf<T>(1); }
};

// A whole chunk, or one element.
template <int kCount, class T>
MI_DEVICE Chunk<T> load_elements(const T* src) {
  if constexpr (kCount > 1) return load_chunk(src);
  Chunk<T> c;
  c.element[0] = *src;
  return c;
}

// Sums `count` values `stride` apart into the first of them; `index` is this thread's among them, and
// `values` its own. Every thread of the block has to call it, and may overwrite its values afterwards.
template <class Arch, int kCount, class Acc>
MI_DEVICE void tree_sum(Acc* values, int index, int count, int stride) {
  MI_NO_UNROLL
  for (int half = count / 2; half > 0; half /= 2) {
    Arch::sync_block();
    if (index < half) {
      MI_UNROLL
      for (int v = 0; v < kCount; ++v) values[v * kSmallBatchThreads] += values[v * kSmallBatchThreads + half * stride];
    }
  }
  Arch::sync_block();
}

}  // namespace mi_kernels::cuda
