// The epilogue of the gated forms: y = (act(p) + offset) * x + shift on finished panels of p, x and shift.
#pragma once

#include "cpu/engine/engine.h"
#include "cpu/engine/vector_activations.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels::MI_ISA {

inline void flag_not_finite(const GateParams& gate) {
  if (gate.not_finite) __atomic_store_n(gate.not_finite, 1, __ATOMIC_RELAXED);
}

// softmax over `features` vectors that are `stride` elements apart; calls f(feature, numerator, denominator) for each.
template <class Acc, class F>
MI_INLINE void softmax_vectors(Acc* p, int64_t features, int64_t stride, F&& f) {
  using V = Vec<Acc>;
  V largest = load<V>(p);
  for (int64_t i = 1; i < features; ++i) {
    const V v = load<V>(p + i * stride);
    largest = v > largest ? v : largest;
  }
  constexpr int64_t kSumBlock = 32;
  V total{};
  for (int64_t begin = 0; begin < features; begin += kSumBlock) {
    V sum{};
    for (int64_t i = begin; i < min(begin + kSumBlock, features); ++i) {
      const V e = exp(V(load<V>(p + i * stride) - largest));
      store(p + i * stride, e);
      sum += e;
    }
    total += sum;
  }
  for (int64_t i = 0; i < features; ++i) f(i, load<V>(p + i * stride), total);
}

// `shift` may be null. Lanes beyond the batch are computed, but not used.
template <class Acc>
void gate_panels(const GateParams& gate, Acc* y, const Acc* x, const Acc* shift, int64_t features, int64_t vectors) {
  using V = Vec<Acc>;
  constexpr int L = Simd<Acc>::lanes;
  const Acc offset = Acc(gate.offset);
  const auto write = [&](int64_t i, const V& gated) {
    V v = (gated + offset) * load<V>(x + i);
    if (shift) v += load<V>(shift + i);
    store(y + i, v);
  };
  const int64_t count = features * vectors * L;
  V difference{};
  for (int64_t i = 0; gate.not_finite && i < count; i += L) {
    const V p = load<V>(y + i);
    difference += p - p;  // NaN from then on if p is not finite
  }
  for (int l = 0; l < L; ++l)
    if (difference[l] != 0) flag_not_finite(gate);
  if (gate.activation != Activation::softmax) {
    for_activation<VectorMath>(gate.activation, [&](auto act) {
      for (int64_t i = 0; i < count; i += L) write(i, act.value(load<V>(y + i)));
    });
    return;
  }
  for_panels(vectors, [&](auto n, int64_t first) {
    for (int64_t v = 0; v < n; ++v) {
      const int64_t begin = (first * features + v) * L, stride = n * L;
      softmax_vectors(y + begin, features, stride,
                      [&](int64_t i, const V& e, const V& total) { write(begin + i * stride, e / total); });
    }
  });
}

}  // namespace mi_kernels::MI_ISA
