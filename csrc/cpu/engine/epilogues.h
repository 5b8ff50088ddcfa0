// Epilogues: what happens to a finished tile. engine.h has the layout of panels of accumulators.
#pragma once

#include "cpu/engine/engine.h"

namespace mi_kernels::MI_ISA {

// panels[feature m] += tile row m; with `overwrite`, panels[feature m] = tile row m.
template <class Mul>
struct Accumulate {
  typename Mul::Acc* panels;
  int64_t features;
  bool overwrite = false;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<typename Mul::Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    auto* panel = panels + first * L * features + m * N * L;
    unroll<kTileM>([&](auto r) MI_INLINED {
      if (r < valid) {
        unroll<N>([&](auto n) MI_INLINED {
          auto* p = panel + (r * N + n) * L;
          store(p, overwrite ? tile.acc[r][n] : load<V>(p) + tile.acc[r][n]);
        });
      }
    });
  }
};

// y[o] += the sum over i of outer[i] * tile row (o, i), i being the outer axis.
template <class Mul>
struct ReduceOuter {
  typename Mul::Acc* y;
  const typename Mul::Acc* outer;
  int64_t outputs, extent;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<typename Mul::Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    auto* yp = y + first * L * outputs;
    const auto* op = outer + first * L * extent;
    int64_t o = m / extent, i = m - o * extent;
    if (valid == kTileM && i + kTileM <= extent) {
      unroll<N>([&](auto n) MI_INLINED {
        auto* p = yp + (o * N + n) * L;
        V even{}, odd{};  // first the sum of the tile, so that the running sum is rounded once for each tile
        unroll<kTileM>(
            [&](auto r) MI_INLINED { (r % 2 ? odd : even) += tile.acc[r][n] * load<V>(op + ((i + r) * N + n) * L); });
        store(p, load<V>(p) + (even + odd));
      });
      return;
    }
    unroll<kTileM>([&](auto r) MI_INLINED {
      if (r < valid) {
        unroll<N>([&](auto n) MI_INLINED {
          auto* p = yp + (o * N + n) * L;
          store(p, load<V>(p) + tile.acc[r][n] * load<V>(op + (i * N + n) * L));
        });
        if (++i == extent) i = 0, ++o;
      }
    });
  }
};

// dx[j] += z[i] * T(i, j) and dz[i] += x[j] * T(i, j), from one tile of T.
template <class Mul>
struct ReduceBoth {
  using Acc = typename Mul::Acc;
  Acc *dx, *dz;
  const Acc *x, *z;
  int64_t context, width;
  bool want_x, want_z;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    const int64_t xs = first * L * width, zs = first * L * context;
    int64_t i = m / width, j = m - i * width;
    const bool whole = valid == kTileM && j + kTileM <= width;
    if (whole && want_x) {
      unroll<N>([&](auto n) MI_INLINED {
        const V zi = load<V>(z + zs + (i * N + n) * L);
        unroll<kTileM>([&](auto r) MI_INLINED {
          auto* p = dx + xs + ((j + r) * N + n) * L;
          store(p, load<V>(p) + zi * tile.acc[r][n]);
        });
      });
    }
    if (whole && want_z) {
      unroll<N>([&](auto n) MI_INLINED {
        auto* p = dz + zs + (i * N + n) * L;
        V even{}, odd{};  // first the sum of the tile, so that the running sum is rounded once for each tile
        unroll<kTileM>([&](auto r) MI_INLINED {
          (r % 2 ? odd : even) += tile.acc[r][n] * load<V>(x + xs + ((j + r) * N + n) * L);
        });
        store(p, load<V>(p) + (even + odd));
      });
    }
    if (whole) return;
    unroll<kTileM>([&](auto r) MI_INLINED {
      if (r < valid) {
        unroll<N>([&](auto n) MI_INLINED {
          const int64_t xn = xs + (j * N + n) * L, zn = zs + (i * N + n) * L;
          if (want_x) store(dx + xn, load<V>(dx + xn) + load<V>(z + zn) * tile.acc[r][n]);
          if (want_z) store(dz + zn, load<V>(dz + zn) + load<V>(x + xn) * tile.acc[r][n]);
        });
        if (++j == width) j = 0, ++i;
      }
    });
  }
};

// panels[f] += scale[a] * tile row (a, f), a being one of `factors` outer features or outputs.
template <class Mul>
struct ScaleAccumulate {
  typename Mul::Acc* panels;
  const typename Mul::Acc* scale;
  int64_t extent, factors;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<typename Mul::Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    auto* panel = panels + first * L * extent;
    const auto* factor = scale + first * L * factors;
    int64_t a = m / extent, f = m - a * extent;
    if (valid == kTileM && f + kTileM <= extent) {
      unroll<N>([&](auto n) MI_INLINED {
        const V scale_vector = load<V>(factor + (a * N + n) * L);
        unroll<kTileM>([&](auto r) MI_INLINED {
          auto* p = panel + ((f + r) * N + n) * L;
          store(p, load<V>(p) + tile.acc[r][n] * scale_vector);
        });
      });
      return;
    }
    unroll<kTileM>([&](auto r) MI_INLINED {
      if (r < valid) {
        unroll<N>([&](auto n) MI_INLINED {
          auto* p = panel + (f * N + n) * L;
          store(p, load<V>(p) + tile.acc[r][n] * load<V>(factor + (a * N + n) * L));
        });
        if (++f == extent) f = 0, ++a;
      }
    });
  }
};

// Stores the first `valid` lanes of a vector at elements that are `stride` apart.
template <class Acc, class Out>
MI_INLINE void store_lanes(Out* to, int64_t stride, int64_t valid, const Vec<Acc>& value) {
  constexpr int L = Simd<Acc>::lanes;
  if (valid >= L && stride == 1) {
    store_acc<L>(to, value);
  } else {
    Acc values[L];
    store(values, value);
    for (int64_t l = 0; l < min(valid, L); ++l) from_acc(values[l], to[l * stride]);
  }
}

template <class Acc, class In>
MI_INLINE Vec<Acc> load_lanes(const In* from, int64_t stride, int64_t valid) {
  constexpr int L = Simd<Acc>::lanes;
  if (valid >= L && stride == 1) return __builtin_convertvector(load_acc<L>(from), Vec<Acc>);
  Acc values[L] = {};
  for (int64_t l = 0; l < min(valid, L); ++l) values[l] = to_acc(from[l * stride]);
  return load<Vec<Acc>>(values);
}

// out[m, lane] = tile + panels, if there are any, + bias[lane] + addend[m, lane].
template <class Mul, class S>
struct StoreOutputs {
  using Acc = typename Mul::Acc;
  static constexpr bool half_tiles = true;  // its rows are those of the batch, which may be few
  S* out;
  int64_t stride, lane_count;
  const Acc* bias;    // whole vectors, or null
  const Acc* panels;  // with `rows` features, or null
  int64_t rows;
  const S* addend = nullptr;  // or null; its lanes are contiguous
  int64_t addend_stride = 0;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    // Most tiles are whole, and after a short sum storing them takes as long as the sum: straight from the registers.
    if (valid == kTileM && (first + N) * L <= lane_count && !panels && !addend) {
      S* to = out + m * stride + first * L;
      if (bias)
        unroll<kTileM>([&](auto r) MI_INLINED {
          unroll<N>([&](auto n) MI_INLINED {
            store_acc<L>(to + r * stride + n * L, V(tile.acc[r][n] + load<V>(bias + (first + n) * L)));
          });
        });
      else
        unroll<kTileM>([&](auto r) MI_INLINED {
          unroll<N>([&](auto n) MI_INLINED { store_acc<L>(to + r * stride + n * L, tile.acc[r][n]); });
        });
      return;
    }
    Acc sums[kTileM * N * L];
    unroll<kTileM>([&](auto r) MI_INLINED {
      unroll<N>([&](auto n) MI_INLINED { store(sums + (r * N + n) * L, tile.acc[r][n]); });
    });
    finish<N>(sums, m, valid, first);
  }

 private:
  // Not inlined: with this code in it, the loop over K would run out of registers for its accumulators.
  template <int N>
  __attribute__((noinline)) void finish(const Acc* sums, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<Acc>;
    constexpr int L = Simd<Acc>::lanes;
    const Acc* panel = panels ? panels + first * L * rows + m * N * L : nullptr;
    for (int64_t r = 0; r < valid; ++r) {
      for (int n = 0; n < N; ++n) {
        const int64_t lane = (first + n) * L;
        V sum = load<V>(sums + (r * N + n) * L);
        if (panel) sum += load<V>(panel + (r * N + n) * L);
        if (bias) sum += load<V>(bias + lane);
        if (addend) sum += load_lanes<Acc>(addend + (m + r) * addend_stride + lane, 1, lane_count - lane);
        store_lanes<Acc>(out + (m + r) * stride + lane, 1, lane_count - lane, sum);
      }
    }
  }
};

// An epilogue whose rows are numbered from an offset.
template <class Epilogue>
struct OffsetRows {
  const Epilogue& epilogue;
  int64_t offset;
  template <class Tile>
  MI_INLINE void operator()(const Tile& tile, int64_t m, int64_t valid, int64_t first) const {
    epilogue(tile, m + offset, valid, first);
  }
};

}  // namespace mi_kernels::MI_ISA
