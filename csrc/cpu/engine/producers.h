// Producers of the A operand. gemm() in engine.h says what a producer has.
#pragma once

#include "cpu/engine/engine.h"

namespace mi_kernels::MI_ISA {

// Rows of a strided matrix.
template <class Mul, class S>
struct MatrixProducer {
  static constexpr bool direct = false, copies = true;
  View<S> view;  // mn along rows
  bool copy_allowed() const { return view.k_stride == 1; }
  void copy_rows(int64_t m0, int64_t m1, int64_t k0, int64_t depth, typename Mul::Elem* out, int64_t stride) const {
    for (int64_t m = m0; m < m1; ++m) copy_row<Mul>(&view(m, k0), depth, out + (m - m0) * stride);
  }
  void pack_rows(int64_t m0, int64_t m1, int64_t k0, int64_t depth, typename Mul::Word* out) const {
    const int64_t words = ceil_div(depth, Mul::pair), whole = view.mn_stride == 1 ? depth / Mul::pair : 0;
    const int64_t full = m0 + (m1 - m0) / kTileM * kTileM;
    // Neighbouring rows are neighbours in memory: each step along K reads a few cache lines of the whole block, too few
    // for the hardware prefetcher. Two words along K at a time, so that a whole cache line is written.
    constexpr int64_t kAhead = 8, kLine = 64 / int64_t(sizeof(S));
    int64_t k = 0;
    for (; k + 2 <= whole; k += 2) {
      const S* a = &view(m0, k0 + k * Mul::pair);
      const S* ahead = a + kAhead * Mul::pair * view.k_stride;
      for (int64_t r = 0; k + kAhead + 2 <= whole && r < 2 * Mul::pair; ++r)
        for (int64_t m = 0; m < full - m0; m += kLine) __builtin_prefetch(ahead + r * view.k_stride + m);
      const S* b = a + Mul::pair * view.k_stride;
      const int64_t next = Mul::pair == 1 ? 0 : view.k_stride;
      for (int64_t m = 0; m < full - m0; m += kTileM) {
        auto* line = out + m * words + k * kTileM;
        store(line, load_words_mn<Mul, kTileM>(a + m, a + m + next));
        store(line + kTileM, load_words_mn<Mul, kTileM>(b + m, b + m + next));
      }
    }
    for (; k < whole; ++k) {
      const S* first = &view(m0, k0 + k * Mul::pair);
      const S* second = Mul::pair == 1 ? first : first + view.k_stride;
      for (int64_t m = 0; m < full - m0; m += kTileM)
        store(out + m * words + k * kTileM, load_words_mn<Mul, kTileM>(first + m, second + m));
    }
    for (int64_t m = m0; m < m1; m += kTileM) {
      const int64_t done = m < full ? whole : 0;
      if (done < words)
        pack<Mul>(view.at(m, k0 + done * Mul::pair), min(m1 - m, kTileM), kTileM, depth - done * Mul::pair,
                  out + (m - m0) * words + done * kTileM);
    }
  }
};

// Rows (a, f) of W for two of its axes, f being the faster one; the third one is K. They are read in place where they
// are evenly spaced in memory.
template <class Mul, class S>
struct WeightProducer {
  using Word = typename Mul::Word;
  static constexpr bool direct = kSameElement<Mul, S>, copies = true;
  const S* data;
  int64_t outer_stride, row_stride, k_stride, extent;
  bool padded = false;  // rows are zero-padded to a whole word

  bool even() const { return row_stride * extent == outer_stride || extent == 0; }
  // A pair that would extend beyond the last element along K has to be copied and zero-padded.
  bool in_place_allowed(int64_t depth) const { return k_stride == 1 && even() && (depth % Mul::pair == 0 || padded); }
  MI_INLINE DirectA<Mul> in_place(int64_t m, int64_t k) const
    requires direct
  {
    return {data + m * row_stride + k, row_stride};
  }
  bool copy_allowed() const { return k_stride == 1; }
  void copy_rows(int64_t m0, int64_t m1, int64_t k0, int64_t depth, typename Mul::Elem* out, int64_t stride) const {
    int64_t a = m0 / extent, f = m0 - a * extent;
    for (int64_t m = m0; m < m1; ++m) {
      copy_row<Mul>(data + a * outer_stride + f * row_stride + k0, depth, out + (m - m0) * stride);
      if (++f == extent) f = 0, ++a;
    }
  }
  void pack_rows(int64_t m0, int64_t m1, int64_t k0, int64_t depth, Word* out) const {
    if (even()) return MatrixProducer<Mul, S>{{data, row_stride, k_stride}}.pack_rows(m0, m1, k0, depth, out);
    const int64_t words = ceil_div(depth, Mul::pair);
    int64_t a = m0 / extent, f = m0 - a * extent, m = m0;
    while (m < m1) {  // whole tiles of one run of f at once, and tiles of several runs
      const int64_t tiles = min(extent - f, m1 - m) / kTileM, left = min(m1 - m, kTileM);
      Word* tile = out + (m - m0) * words;
      if (tiles > 0 || extent - f >= left) {
        const int64_t rows = tiles > 0 ? tiles * kTileM : left;
        const S* run = data + a * outer_stride + f * row_stride;
        MatrixProducer<Mul, S>{{run, row_stride, k_stride}}.pack_rows(0, rows, k0, depth, tile);
        m += rows, f += rows;
      } else {
        pack_tile(a, f, left, k0, depth, tile);
        m += left, f += left;
      }
      a += f / extent, f %= extent;
    }
  }
  // Into the second level of the cache: a line of each k where rows are contiguous. Tiles share lines.
  void prefetch_tile(int64_t m, int64_t k0, int64_t depth) const {
    if (row_stride != 1 || m * int64_t(sizeof(S)) % 64 >= kTileM * int64_t(sizeof(S))) return;
    const int64_t a = m / extent;
    const S* row = data + a * outer_stride + (m - a * extent) + k0 * k_stride;
    for (int64_t k = 0; k < depth; ++k) __builtin_prefetch(row + k * k_stride, 0, 2);
  }

 private:
  // A tile of several runs of f. Two contiguous runs, in order in memory, are read as two vectors, each of which stays
  // within the memory of the tile.
  void pack_tile(int64_t a, int64_t f, int64_t rows, int64_t k0, int64_t depth, Word* out) const {
    const int64_t words = ceil_div(depth, Mul::pair), first = extent - f;
    const S* starts[kTileM] = {};
    for (int64_t r = 0; r < rows; ++r) {
      starts[r] = data + a * outer_stride + f * row_stride + k0 * k_stride;
      if (++f == extent) f = 0, ++a;
    }
    int64_t k = 0;
    if (rows == kTileM && row_stride == 1 && outer_stride >= extent && first + extent >= kTileM) {
      using Lanes = Vec<Word, kTileM>;
      using Int = decltype(Lanes{} < Lanes{});
      using Lane = __typeof__(Int{}[0]);
      Int lane{};
      unroll<kTileM>([&](auto l) MI_INLINED { lane[l.value] = l; });
      const Int low = lane < Int{} + Lane(first);
      const int64_t next = Mul::pair == 1 ? 0 : k_stride;
      for (; k < depth / Mul::pair; ++k) {
        const S *p = starts[0] + k * Mul::pair * k_stride, *q = starts[first] - first + k * Mul::pair * k_stride;
        const Lanes v = load_words_mn<Mul, kTileM>(p, p + next), w = load_words_mn<Mul, kTileM>(q, q + next);
        store(out + k * kTileM, low ? v : w);
      }
    }
    for (; k < words; ++k)
      for (int64_t r = 0; r < kTileM; ++r)
        out[k * kTileM + r] = r < rows ? word_at<Mul>(View<S>{starts[r], 0, k_stride}, 0, k, depth) : Word{};
  }
};

// Generated rows (o, f): products g[o, b] * factor[f, b], K being the batch. Both factors are transposed, so that b is
// contiguous.
template <class Mul>
struct ProductProducer {
  using Acc = typename Mul::Acc;
  using Elem = typename Mul::Elem;
  static constexpr bool direct = false, copies = true;
  const Acc *grad, *factor;  // [o][stride] and [f][stride], zero beyond the batch
  int64_t stride, extent;

  // The stride: whole vectors of whole pairs.
  static constexpr int64_t padded(int64_t batch) {
    constexpr int64_t whole = Simd<Acc>::lanes * Mul::pair;
    return ceil_div(batch, whole) * whole;
  }
  bool copy_allowed() const { return true; }
  // The depth is not needed: rows are zero up to the stride.
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
