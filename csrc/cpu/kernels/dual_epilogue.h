// The epilogue of a product of two linear forms, y = f(p) h(q) summed over ranks, on a tile of q and finished panels of
// p.
#pragma once

#include "cpu/engine/epilogues.h"
#include "cpu/kernels/modulate_runs.h"

namespace mi_kernels::MI_ISA {

// In place; one copy of the code for all epilogues.
template <class Acc>
__attribute__((noinline)) void activate(Activation activation, Acc* values, int64_t count) {
  if (activation != Activation::identity) activate_run<Acc>({activation}, values, 1, count, values);
}

template <class Mul, class S>
struct StoreDual {
  using Acc = typename Mul::Acc;
  const DualEpilogue& dual;
  int64_t rank, rows, outputs, lane_count;  // `outputs`: of a row of y
  const Acc *panels_p, *panels_q;           // sums of p, and of q without this tile, or null
  Acc* panels_y;                            // sums over the ranks before this one, or null if there is one rank
  const Acc *bias_p, *bias_q;               // whole vectors, or null
  S *out, *kept_p, *kept_q;                 // from the first row and lane on; kept_p and kept_q may be null

  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    constexpr int L = Tile<Mul, N>::lanes;
    alignas(64) Acc q[kTileM * N * L];
    prefetch<N>(m, first);
    unroll<kTileM>(
        [&](auto r) MI_INLINED { unroll<N>([&](auto n) MI_INLINED { store(q + (r * N + n) * L, tile.acc[r][n]); }); });
    finish<N>(q, m, valid, first);
  }

 private:
  // The rows of the next tile: short runs far apart, which the hardware does not foresee.
  template <int N>
  MI_INLINE void prefetch(int64_t m, int64_t first) const {
    constexpr int L = Simd<Acc>::lanes;
    constexpr int64_t kLine = 64 / int64_t(sizeof(S));
    const int64_t lane = first * L, end = min(m + 2 * kTileM, rows);
    for (int64_t row = m + kTileM; row < end; ++row)
      for (int64_t l = 0; l < N * L; l += kLine) {
        if (kept_p) __builtin_prefetch(kept_p + row * dual.ranks * outputs + lane + l, 1);
        if (kept_q) __builtin_prefetch(kept_q + row * dual.ranks * outputs + lane + l, 1);
        __builtin_prefetch(out + row * outputs + lane + l, 1);
      }
  }

  // Not inlined, as in StoreOutputs.
  template <int N>
  __attribute__((noinline)) void finish(Acc* q, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<Acc>;
    constexpr int L = Simd<Acc>::lanes;
    alignas(64) Acc p[kTileM * N * L];
    const int64_t at = (first * rows + m * N) * L, features = dual.ranks * outputs;
    const auto for_vectors = [&](auto&& f) {  // f(vector of the tile, row, lane)
      for (int64_t r = 0; r < valid; ++r)
        for (int n = 0; n < N; ++n) f((r * N + n) * L, m + r, (first + n) * L);
    };
    for_vectors([&](int64_t i, int64_t row, int64_t lane) {
      V of_p = load<V>(panels_p + at + i), of_q = load<V>(q + i);
      if (panels_q) of_q += load<V>(panels_q + at + i);
      if (bias_p) of_p += load<V>(bias_p + lane);
      if (bias_q) of_q += load<V>(bias_q + lane);
      const int64_t to = row * features + lane;
      if (kept_p) store_lanes<Acc>(kept_p + to, 1, lane_count - lane, of_p);
      if (kept_q) store_lanes<Acc>(kept_q + to, 1, lane_count - lane, of_q);
      store(p + i, of_p);
      store(q + i, of_q);
    });
    activate(dual.activation_p, p, valid * N * L);
    activate(dual.activation_q, q, valid * N * L);
    for_vectors([&](int64_t i, int64_t row, int64_t lane) {
      V y = load<V>(p + i) * load<V>(q + i);
      if (rank > 0) y += load<V>(panels_y + at + i);
      if (rank + 1 < dual.ranks)
        store(panels_y + at + i, y);
      else
        store_lanes<Acc>(out + row * outputs + lane, 1, lane_count - lane, y);
    });
  }
};

}  // namespace mi_kernels::MI_ISA
