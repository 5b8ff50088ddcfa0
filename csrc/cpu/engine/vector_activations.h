// exp, tanh, erf and log1p on vectors, from which common/activation_math.h builds the activations. exp and tanh use
// expm1: e^r - 1 = r + r^2 q(r) for |r| <= log(2) / 2, q a minimax polynomial (error below 2^-28 in float, 2^-63 in
// double). The results are exact to 2 units in the last place. NaN propagates as in PyTorch.
#pragma once

#include "common/activation_math.h"
#include "cpu/engine/simd.h"

namespace mi_kernels::MI_ISA {

template <class V>
using IntOf = decltype(V{} < V{});
template <class V>
inline constexpr bool kDouble = sizeof(Lane<V>) == 8;

// By Horner's scheme; the coefficient of the highest power comes first.
template <class V, class T, int N>
MI_INLINE V polynomial(const V& t, const T (&c)[N]) {
  V sum = V{} + Lane<V>(c[0]);
  unroll<N - 1>([&](auto i) MI_INLINED { sum = sum * t + Lane<V>(c[i + 1]); });
  return sum;
}

// t = k log(2) + r.
template <class V>
struct Reduced {
  V r;
  IntOf<V> k;
};

template <class V>
MI_INLINE Reduced<V> reduce(const V& t) {
  using T = Lane<V>;
  constexpr T magic = kDouble<V> ? T(0x1.8p52) : T(0x1.8p23f);
  constexpr T log2e = T(1.4426950408889634);
  // log(2) in two parts; the high one has trailing zeros, so that its product with k is exact.
  constexpr T high = kDouble<V> ? T(0x1.62e42fefa38p-1) : T(0x1.62e4p-1f);
  constexpr T low = kDouble<V> ? T(0x1.ef35793c7673p-45) : T(0x1.7f7d1cp-20f);
  // Adding the constant rounds to an integer k, which the last bits of the sum then hold.
  const V shifted = t * log2e + magic;
  const V k = shifted - magic;
  const IntOf<V> bits = bit_cast<IntOf<V>>(shifted) - bit_cast<IntOf<V>>(V{} + magic);
  return {(t - k * high) - k * low, bits};
}

// e^r - 1 for |r| <= log(2) / 2.
template <class V>
MI_INLINE V small_expm1(const V& r) {
  if constexpr (kDouble<V>) {
    constexpr double c[] = {2.0926941090615536736e-9, 2.511228843238610704e-8,    2.7557233365243381885e-7,
                            2.7557234099292213311e-6, 0.000024801587373738906899, 0.000198412698971945492,
                            0.0013888888888858438171, 0.0083333333333166847213,   0.041666666666666724539,
                            0.16666666666666683914,   0.49999999999999999966};
    return r + r * r * polynomial(r, c);
  } else {
    constexpr float c[] = {0.001395054047f, 0.008368917868f, 0.04166620506f, 0.166665186f, 0.5000000095f};
    return r + r * r * polynomial(r, c);
  }
}

template <class V>
MI_INLINE V power_of_two(const IntOf<V>& k) {
  if constexpr (kDouble<V>) {
    return bit_cast<V>((k + 1023) << 52);
  } else {
    return bit_cast<V>((k + 127) << 23);
  }
}

template <class V>
MI_INLINE V exp(const V& t) {
  const auto [r, k] =
      kDouble<V> ? reduce(clamp(t, Lane<V>(-746), Lane<V>(710))) : reduce(clamp(t, Lane<V>(-104), Lane<V>(89)));
  const V e = Lane<V>(1) + small_expm1(r);
  // In two steps: 2^k itself may overflow or be subnormal.
  const auto half = k >> 1;
  return e * power_of_two<V>(half) * power_of_two<V>(k - half);
}

template <class V>
MI_INLINE IntOf<V> sign_bits() {
  return IntOf<V>{} + (Lane<IntOf<V>>(1) << (8 * sizeof(Lane<V>) - 1));
}
template <class V>
MI_INLINE V absolute(const V& t) {
  return bit_cast<V>(bit_cast<IntOf<V>>(t) & ~sign_bits<V>());
}
template <class V>
MI_INLINE V with_sign(const V& magnitude, const V& sign) {
  return bit_cast<V>(bit_cast<IntOf<V>>(magnitude) | (bit_cast<IntOf<V>>(sign) & sign_bits<V>()));
}

// e / (e + 2) with e = e^(2|t|) - 1, which is accurate for small t.
template <class V>
MI_INLINE V tanh(const V& t) {
  const V size = absolute(t);
  const V bounded = size > Lane<V>(20) ? V{} + Lane<V>(20) : size;
  const auto [r, k] = reduce(bounded + bounded);
  const V scale = power_of_two<V>(k);
  const V e = scale * small_expm1(r) + (scale - Lane<V>(1));
  return with_sign(e / (e + Lane<V>(2)), t);
}

// In float, two minimax polynomials: t + t p(t^2) below 0.925 and 1 - exp(-t h(t)) above. In double, libm's, lane by
// lane.
template <class V>
MI_INLINE V erf(const V& t) {
  if constexpr (kDouble<V>) {
    V result{};
    unroll<int(sizeof(V) / 8)>([&](auto l) MI_INLINED { result[l.value] = __builtin_erf(t[l.value]); });
    return result;
  } else {
    constexpr float inner[] = {-0.0005953741874f, 0.004985940635f, -0.02676171989f,
                               0.1128168254f,     -0.376124811f,   0.1283791477f};
    constexpr float outer[] = {1.152230712e-5f, -0.0003256528548f, 0.003653764624f, -0.02378534813f,
                               0.106263147f,    0.6351359117f,     1.128652163f};
    const V size = absolute(t);
    const V bounded = size > 4.0f ? V{} + 4.0f : size;
    const V far = with_sign(1.0f - exp(-bounded * polynomial(bounded, outer)), t);
    return size < 0.925f ? t + t * polynomial(t * t, inner) : far;
  }
}

// log(1 + t) for 0 <= t <= 1 as 2 artanh(s), s = t / (2 + t) <= 1/3: the terms s^(2k + 1) / (2k + 1), of which the
// first one left out is below half a unit in the last place.
template <class V>
MI_INLINE V log1p(const V& t) {
  constexpr int kTerms = kDouble<V> ? 17 : 8;
  const V s = t / (t + Lane<V>(2)), square = s * s;
  V sum = V{} + Lane<V>(1) / Lane<V>(2 * kTerms + 1);
  unroll<kTerms - 1>([&](auto i) MI_INLINED { sum = sum * square + Lane<V>(1) / Lane<V>(2 * (kTerms - i) - 1); });
  return Lane<V>(2) * (s + s * square * sum);
}

struct VectorMath {
  template <class V>
  static MI_INLINE V exp(const V& t) {
    return MI_ISA::exp(t);
  }
  template <class V>
  static MI_INLINE V tanh(const V& t) {
    return MI_ISA::tanh(t);
  }
  template <class V>
  static MI_INLINE V erf(const V& t) {
    return MI_ISA::erf(t);
  }
  template <class V>
  static MI_INLINE V log1p(const V& t) {
    return MI_ISA::log1p(t);
  }
};

}  // namespace mi_kernels::MI_ISA
