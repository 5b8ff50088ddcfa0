// Row producers: what a tile's rows are made of. See contract() in engine.h for what they offer.
#pragma once

#include "cpu/engine/engine.h"

namespace mi_kernels::MI_ISA {

// Rows of a strided matrix.
template <class Mul, class S>
struct MatrixRows {
  static constexpr bool direct = false, copies = true;
  View<S> view;  // w along rows
  bool copy_allowed() const { return view.k_stride == 1; }
  void copy_rows(int64_t m0, int64_t m1, int64_t k0, int64_t depth, typename Mul::Elem* out, int64_t stride) const {
    for (int64_t m = m0; m < m1; ++m) copy_row<Mul>(&view(m, k0), depth, out + (m - m0) * stride);
  }
  void pack_rows(int64_t m0, int64_t m1, int64_t k0, int64_t depth, typename Mul::Word* out) const {
    const int64_t words = ceil_div(depth, Mul::pair), whole = view.w_stride == 1 ? depth / Mul::pair : 0;
    const int64_t full = m0 + (m1 - m0) / kRows * kRows;
    // Neighbouring rows are neighbours in memory: every K visits the whole block, a few lines in a run, too few for
    // the hardware to run ahead. Two words along K at a time: with kRows of each a whole line is written.
    constexpr int64_t kAhead = 8, kLine = 64 / int64_t(sizeof(S));
    int64_t k = 0;
    for (; k + 2 <= whole; k += 2) {
      const S* a = &view(m0, k0 + k * Mul::pair);
      const S* ahead = a + kAhead * Mul::pair * view.k_stride;
      for (int64_t r = 0; k + kAhead + 2 <= whole && r < 2 * Mul::pair; ++r)
        for (int64_t m = 0; m < full - m0; m += kLine) __builtin_prefetch(ahead + r * view.k_stride + m);
      const S* b = a + Mul::pair * view.k_stride;
      const int64_t next = Mul::pair == 1 ? 0 : view.k_stride;
      for (int64_t m = 0; m < full - m0; m += kRows) {
        auto* line = out + m * words + k * kRows;
        store(line, load_across<Mul, kRows>(a + m, a + m + next));
        store(line + kRows, load_across<Mul, kRows>(b + m, b + m + next));
      }
    }
    for (; k < whole; ++k) {
      const S* first = &view(m0, k0 + k * Mul::pair);
      const S* second = Mul::pair == 1 ? first : first + view.k_stride;
      for (int64_t m = 0; m < full - m0; m += kRows)
        store(out + m * words + k * kRows, load_across<Mul, kRows>(first + m, second + m));
    }
    for (int64_t m = m0; m < m1; m += kRows) {
      const int64_t done = m < full ? whole : 0;
      if (done < words)
        pack<Mul>(view.at(m, k0 + done * Mul::pair), min(m1 - m, kRows), kRows, depth - done * Mul::pair,
                  out + (m - m0) * words + done * kRows);
    }
  }
};

// Rows (o, f) of W over one of its two feature axes, the other one along K; in place where they follow each
// other in memory.
template <class Mul, class S>
struct WeightRows {
  static constexpr bool direct = kSameElement<Mul, S>, copies = true;
  const S* data;
  int64_t out_stride, row_stride, k_stride, extent;
  bool padded = false;  // with zeros, so that a word may be read across the end of a row

  // A pair that would read beyond the last element along K has to be copied with a zero.
  bool in_place_allowed(int64_t depth) const {
    return k_stride == 1 && (row_stride * extent == out_stride || extent == 0) && (depth % Mul::pair == 0 || padded);
  }
  MI_INLINE DirectRows<Mul> in_place(int64_t m, int64_t k) const
    requires direct
  {
    return {data + m * row_stride + k, row_stride};
  }
  bool copy_allowed() const { return k_stride == 1; }
  void copy_rows(int64_t m0, int64_t m1, int64_t k0, int64_t depth, typename Mul::Elem* out, int64_t stride) const {
    int64_t o = m0 / extent, f = m0 - o * extent;
    for (int64_t m = m0; m < m1; ++m) {
      copy_row<Mul>(data + o * out_stride + f * row_stride + k0, depth, out + (m - m0) * stride);
      if (++f == extent) f = 0, ++o;
    }
  }
  void pack_rows(int64_t m0, int64_t m1, int64_t k0, int64_t depth, typename Mul::Word* out) const {
    const int64_t words = ceil_div(depth, Mul::pair);
    int64_t o = m0 / extent, f = m0 - o * extent, m = m0;
    while (m < m1) {  // runs of rows of one output
      const View<S> run{data + o * out_stride + f * row_stride + k0 * k_stride, row_stride, k_stride};
      const int64_t count = min(extent - f, m1 - m);
      const int64_t tile_end = (m - m0) % kRows == 0 ? count / kRows * kRows : 0;
      if (tile_end > 0 || (count == m1 - m && (m - m0) % kRows == 0)) {
        const int64_t packed = tile_end > 0 ? tile_end : count;
        MatrixRows<Mul, S>{run}.pack_rows(0, packed, 0, depth, out + (m - m0) * words);
        m += packed, f += packed;
      } else {  // a tile that spans outputs, row by row
        typename Mul::Word* tile = out + (m - m0) / kRows * kRows * words;
        for (int64_t k = 0; k < words; ++k) tile[k * kRows + (m - m0) % kRows] = word_at<Mul>(run, 0, k, depth);
        m += 1, f += 1;
      }
      if (f == extent) f = 0, ++o;
    }
    for (int64_t r = m1 - m0; r % kRows != 0; ++r)  // rows beyond the last one of a tile built row by row
      for (int64_t k = 0; k < words; ++k) out[r / kRows * kRows * words + k * kRows + r % kRows] = {};
  }
};

// Rows (o, f) = g[o, b] * factor[f, b] along the batch, of operands that were transposed so that b is contiguous.
template <class Mul>
struct ProductRows {
  using Acc = typename Mul::Acc;
  using Elem = typename Mul::Elem;
  static constexpr bool direct = false, copies = true;
  const Acc *grad, *factor;  // [o][stride], [f][stride], zeros from the last row of the batch to the stride
  int64_t stride, extent;

  // Elements from one feature to the next, for vectors and for pairs.
  static constexpr int64_t padded(int64_t batch) {
    constexpr int64_t whole = Simd<Acc>::lanes * Mul::pair;
    return ceil_div(batch, whole) * whole;
  }
  bool copy_allowed() const { return true; }
  // The depth is of no interest: rows are zero up to the stride.
  void copy_rows(int64_t m0, int64_t m1, int64_t k0, int64_t, Elem* out, int64_t out_stride) const {
    constexpr int L = Simd<Acc>::lanes;
    int64_t o = m0 / extent, f = m0 - o * extent;
    for (int64_t m = m0; m < m1; ++m, out += out_stride) {
      const Acc *g = grad + o * stride + k0, *values = factor + f * stride + k0;
      const auto product = [&](int64_t k) { return load_acc<L>(g + k) * load_acc<L>(values + k); };
      int64_t k = 0;
      for (; k + L <= out_stride; k += L) store_acc<L>(out + k, product(k));
      if (k < out_stride) {
        Elem last[L];
        store_acc<L>(last, product(k));
        __builtin_memcpy(out + k, last, size_t(out_stride - k) * sizeof(Elem));
      }
      if (++f == extent) f = 0, ++o;
    }
  }
};

}  // namespace mi_kernels::MI_ISA
