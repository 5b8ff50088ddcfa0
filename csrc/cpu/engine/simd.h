// Vectors, conversions and transposes for one instruction set.
//
// The code uses the compiler's vector types, so that one source serves every target; where these do not suffice, an
// intrinsic stands beside portable code. Each instruction set has its own namespace (MI_ISA): the linker must never
// merge inline functions of two instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/engine/min_max.h"

#define MI_INLINE inline __attribute__((always_inline))
// Of a lambda: what `unroll` repeats has to become straight code, or its arrays of vectors are in memory.
#define MI_INLINED __attribute__((always_inline))

namespace mi_kernels::MI_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T, int N = kVectorBytes / int(sizeof(T))>
struct Simd {
  typedef T type __attribute__((vector_size(N * sizeof(T)), may_alias));
  static constexpr int lanes = N;
};
// A vector of N lanes, by default a whole register.
template <class T, int N = Simd<T>::lanes>
using Vec = typename Simd<T, N>::type;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
MI_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
MI_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class T, class V>
MI_INLINE void store(T* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Calls f(0), ..., f(N - 1) with constant indices, so that arrays indexed by them are kept in registers.
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class F>
MI_INLINE void unroll(F&& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    unroll<N, I + 1>(f);
  }
}

// Scalar conversions between storage and accumulation type, which is float for 16 bits.
MI_INLINE double to_acc(double v) { return v; }
MI_INLINE float to_acc(float v) { return v; }
MI_INLINE float to_acc(BFloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
MI_INLINE float to_acc(Half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The factor 2^112 changes the exponent bias from 15 to 127, and normalises subnormal numbers.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

// Round to nearest even; a NaN stays a (quiet) NaN.
MI_INLINE uint16_t round_to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
MI_INLINE uint16_t round_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: the addition rounds to the right bit
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  return uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

MI_INLINE void from_acc(double v, double& out) { out = v; }
MI_INLINE void from_acc(double v, float& out) { out = float(v); }
MI_INLINE void from_acc(float v, float& out) { out = v; }
MI_INLINE void from_acc(float v, BFloat16& out) { out.bits = round_to_bf16(v); }
MI_INLINE void from_acc(float v, Half& out) { out.bits = round_to_half(v); }

// Loads and stores of N contiguous elements, as N lanes of accumulation type.
template <int N>
MI_INLINE Vec<double, N> load_acc(const double* p) {
  return load<Vec<double, N>>(p);
}
template <int N>
MI_INLINE Vec<float, N> load_acc(const float* p) {
  return load<Vec<float, N>>(p);
}
template <int N>
MI_INLINE Vec<float, N> load_acc(const BFloat16* p) {
  // The compiler would widen the halves of a register, and join them.
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto words = bit_cast<Vec<uint32_t, N>>(_mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(p)));
    return bit_cast<Vec<float, N>>(words << 16);
  }
#endif
#if defined(__AVX2__)
  if constexpr (N == 8)
    return bit_cast<Vec<float, N>>(bit_cast<Vec<uint32_t, N>>(_mm256_cvtepu16_epi32(load<__m128i>(p))) << 16);
#endif
  const auto wide = __builtin_convertvector(load<Vec<uint16_t, N>>(p), Vec<uint32_t, N>);
  return bit_cast<Vec<float, N>>(wide << 16);
}
template <int N>
MI_INLINE Vec<float, N> load_acc(const Half* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(p));
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return _mm256_cvtph_ps(load<__m128i>(p));
  if constexpr (N == 4) return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  Vec<float, N> v;
  unroll<N>([&](auto l) MI_INLINED { v[l.value] = to_acc(p[l]); });
  return v;
}

template <int N>
MI_INLINE Vec<uint16_t, N> round_lanes_to_bf16(const Vec<float, N>& value) {
#if defined(__AVX512BF16__)
  // Flushes subnormal numbers to zero, as the multiplication of this instruction set does.
  if constexpr (N == 16) return bit_cast<Vec<uint16_t, N>>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
#endif
  const auto bits = bit_cast<Vec<uint32_t, N>>(value);
  const auto rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const auto quiet = bits >> 16 | 0x40u;
  return __builtin_convertvector(value != value ? quiet : rounded, Vec<uint16_t, N>);
}

template <int N>
MI_INLINE void store_acc(double* p, const Vec<double, N>& v) {
  store(p, v);
}
template <int N>
MI_INLINE void store_acc(float* p, const Vec<float, N>& v) {
  store(p, v);
}
template <int N>
MI_INLINE void store_acc(float* p, const Vec<double, N>& v) {
  store(p, __builtin_convertvector(v, Vec<float, N>));
}
template <int N>
MI_INLINE void store_acc(BFloat16* p, const Vec<float, N>& v) {
  store(p, round_lanes_to_bf16<N>(v));
}
template <int N>
MI_INLINE void store_acc(Half* p, const Vec<float, N>& v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return store(p, _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return store(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
  unroll<N>([&](auto l) MI_INLINED { p[l].bits = round_to_half(v[l.value]); });
}

// The sum of the lanes, by halves.
template <class V>
MI_INLINE auto sum_lanes(const V& v) {
  using T = __typeof__(V{}[0]);
  constexpr int L = int(sizeof(V) / sizeof(T));
  if constexpr (L == 1) {
    return v[0];
  } else {
    struct Halves {
      Vec<T, L / 2> low, high;
    };
    const auto halves = bit_cast<Halves>(v);
    return sum_lanes(Vec<T, L / 2>(halves.low + halves.high));
  }
}

// The first `count` lanes; the others become zero, even if they are NaN.
template <class V>
MI_INLINE V first_lanes(const V& v, int64_t count) {
  using Int = decltype(v < v);
  using Lane = __typeof__(Int{}[0]);
  Int lane{};
  unroll<int(sizeof(V) / sizeof(Lane))>([&](auto l) MI_INLINED { lane[l.value] = l; });
  return lane < Int{} + Lane(count) ? v : V{};
}

// Transposes a square of vectors in registers, by log2(lanes) rounds of exchanges at distance 1, 2, 4, ...
template <class V, int N>
MI_INLINE void transpose(V (&rows)[N]) {
  using Int = decltype(rows[0] == rows[0]);
  unroll<6>([&](auto round) MI_INLINED {
    constexpr int s = 1 << round;
    if constexpr (s < N) {
      Int low, high;
      unroll<N>([&](auto l) MI_INLINED {
        low[l.value] = (l & s) == 0 ? l : N + l - s;
        high[l.value] = (l & s) == 0 ? l + s : N + l;
      });
      unroll<N>([&](auto r) MI_INLINED {
        if constexpr ((r & s) == 0) {
          const V a = rows[r], b = rows[r + s];
          rows[r] = __builtin_shuffle(a, b, low);
          rows[r + s] = __builtin_shuffle(a, b, high);
        }
      });
    }
  });
}

// Lane l of the result is the sum of the lanes of rows[l]: the rounds of transpose(), with an addition in each.
template <class V, int N>
MI_INLINE V sum_each(V (&rows)[N]) {
  using Int = decltype(rows[0] == rows[0]);
  unroll<6>([&](auto round) MI_INLINED {
    constexpr int s = 1 << round;
    if constexpr (s < N) {
      Int low, high;
      unroll<N>([&](auto l) MI_INLINED {
        low[l.value] = (l & s) == 0 ? l : N + l - s;
        high[l.value] = (l & s) == 0 ? l + s : N + l;
      });
      unroll<N / (2 * s)>([&](auto pair) MI_INLINED {
        constexpr int r = 2 * s * pair.value;
        rows[r] = __builtin_shuffle(rows[r], rows[r + s], low) + __builtin_shuffle(rows[r], rows[r + s], high);
      });
    }
  });
  return rows[0];
}

}  // namespace mi_kernels::MI_ISA
