// Epilogues: what becomes of a finished tile. Planes are laid out as engine.h says.
#pragma once

#include "cpu/engine/engine.h"

namespace mi_kernels::MI_ISA {

// planes[feature m] += tile row m, or = where the planes are fresh.
template <class Mul>
struct AddRows {
  typename Mul::Acc* planes;
  int64_t features;
  bool fresh = false;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<typename Mul::Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    auto* plane = planes + first * L * features + m * N * L;
    unroll<kRows>([&](auto r) {
      if (r < valid) {
        unroll<N>([&](auto n) {
          auto* p = plane + (r * N + n) * L;
          store(p, fresh ? tile.acc[r][n] : load<V>(p) + tile.acc[r][n]);
        });
      }
    });
  }
};

// y[o] += sum over the outer feature of outer[i] * tile row (o, i).
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
    if (valid == kRows && i + kRows <= extent) {
      unroll<N>([&](auto n) {
        auto* p = yp + (o * N + n) * L;
        V even{}, odd{};  // the tile is summed by itself: the running sum is rounded once a tile
        unroll<kRows>([&](auto r) { (r % 2 ? odd : even) += tile.acc[r][n] * load<V>(op + ((i + r) * N + n) * L); });
        store(p, load<V>(p) + (even + odd));
      });
      return;
    }
    unroll<kRows>([&](auto r) {
      if (r < valid) {
        unroll<N>([&](auto n) {
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
    const bool whole = valid == kRows && j + kRows <= width;
    if (whole && want_x) {
      unroll<N>([&](auto n) {
        const V zi = load<V>(z + zs + (i * N + n) * L);
        unroll<kRows>([&](auto r) {
          auto* p = dx + xs + ((j + r) * N + n) * L;
          store(p, load<V>(p) + zi * tile.acc[r][n]);
        });
      });
    }
    if (whole && want_z) {
      unroll<N>([&](auto n) {
        auto* p = dz + zs + (i * N + n) * L;
        V even{}, odd{};  // the tile is summed by itself: the running sum is rounded once a tile
        unroll<kRows>(
            [&](auto r) { (r % 2 ? odd : even) += tile.acc[r][n] * load<V>(x + xs + ((j + r) * N + n) * L); });
        store(p, load<V>(p) + (even + odd));
      });
    }
    if (whole) return;
    unroll<kRows>([&](auto r) {
      if (r < valid) {
        unroll<N>([&](auto n) {
          const int64_t xn = xs + (j * N + n) * L, zn = zs + (i * N + n) * L;
          if (want_x) store(dx + xn, load<V>(dx + xn) + load<V>(z + zn) * tile.acc[r][n]);
          if (want_z) store(dz + zn, load<V>(dz + zn) + load<V>(x + xn) * tile.acc[r][n]);
        });
        if (++j == width) j = 0, ++i;
      }
    });
  }
};

// planes[f] += scale[o] * tile row (o, f): the derivative by the feature f that the product did not sum over.
template <class Mul>
struct ScaleRows {
  typename Mul::Acc* planes;
  const typename Mul::Acc* scale;
  int64_t extent, outputs;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<typename Mul::Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    auto* plane = planes + first * L * extent;
    const auto* factor = scale + first * L * outputs;
    int64_t o = m / extent, f = m - o * extent;
    unroll<kRows>([&](auto r) {
      if (r < valid) {
        unroll<N>([&](auto n) {
          auto* p = plane + (f * N + n) * L;
          store(p, load<V>(p) + tile.acc[r][n] * load<V>(factor + (o * N + n) * L));
        });
        if (++f == extent) f = 0, ++o;
      }
    });
  }
};

// A vector of lanes, of which `valid` are wanted, to a row whose lanes are `stride` apart.
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

// out[m, lane] = tile + what `planes` hold of it, if anything, + bias[lane]: a finished sum, stored as it is.
template <class Mul, class S>
struct StoreSums {
  using Acc = typename Mul::Acc;
  S* out;
  int64_t stride, width;
  const Acc* bias;    // whole vectors, or null
  const Acc* planes;  // of `rows` features, or null
  int64_t rows;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    constexpr int L = Tile<Mul, N>::lanes;
    Acc sums[kRows * N * L];
    unroll<kRows>([&](auto r) { unroll<N>([&](auto n) { store(sums + (r * N + n) * L, tile.acc[r][n]); }); });
    finish<N>(sums, m, valid, first);
  }

 private:
  // Out of line: where this is inlined registers are short, and accumulators live in memory while they are summed.
  template <int N>
  __attribute__((noinline)) void finish(const Acc* sums, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<Acc>;
    constexpr int L = Simd<Acc>::lanes;
    const Acc* plane = planes ? planes + first * L * rows + m * N * L : nullptr;
    for (int64_t r = 0; r < valid; ++r) {
      for (int n = 0; n < N; ++n) {
        const int64_t lane = (first + n) * L;
        V sum = load<V>(sums + (r * N + n) * L);
        if (plane) sum += load<V>(plane + (r * N + n) * L);
        if (bias) sum += load<V>(bias + lane);
        store_lanes<Acc>(out + (m + r) * stride + lane, 1, width - lane, sum);
      }
    }
  }
};

// Another epilogue, for rows that are counted from elsewhere.
template <class Epilogue>
struct Shifted {
  const Epilogue& epilogue;
  int64_t shift;
  template <class Tile>
  MI_INLINE void operator()(const Tile& tile, int64_t m, int64_t valid, int64_t first) const {
    epilogue(tile, m + shift, valid, first);
  }
};

}  // namespace mi_kernels::MI_ISA
