// The epilogue of the gated forms: y = (act(p) + s) * x + t on finished planes, which hold p, x and t alike.
#pragma once

#include "cpu/engine/engine.h"
#include "cpu/engine/vector_activations.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels::MI_ISA {

inline void tell_not_finite(const GateSpec& gate) {
  if (gate.not_finite) __atomic_store_n(gate.not_finite, 1, __ATOMIC_RELAXED);
}

// softmax over `features` vectors, `stride` elements apart: f(feature, numerator, denominator) afterwards.
template <class Acc, class F>
MI_INLINE void softmax_vectors(Acc* p, int64_t features, int64_t stride, F&& f) {
  using V = Vec<Acc>;
  V largest = load<V>(p);
  for (int64_t i = 1; i < features; ++i) {
    const V v = load<V>(p + i * stride);
    largest = v > largest ? v : largest;
  }
  constexpr int64_t kChain = 32;  // terms added up one by one
  V total{};
  for (int64_t begin = 0; begin < features; begin += kChain) {
    V sum{};
    for (int64_t i = begin; i < min(begin + kChain, features); ++i) {
      const V e = exp(V(load<V>(p + i * stride) - largest));
      store(p + i * stride, e);
      sum += e;
    }
    total += sum;
  }
  for (int64_t i = 0; i < features; ++i) f(i, load<V>(p + i * stride), total);
}

// `shift` may be null. Lanes beyond the batch are computed too, and not used.
template <class Acc>
void gate_planes(const GateSpec& gate, Acc* y, const Acc* x, const Acc* shift, int64_t features, int64_t vectors) {
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
    difference += p - p;  // 0, or NaN for ever
  }
  for (int l = 0; l < L; ++l)
    if (difference[l] != 0) tell_not_finite(gate);
  if (gate.activation != Activation::softmax) {
    for_activation<VectorMath>(gate.activation, [&](auto act) {
      for (int64_t i = 0; i < count; i += L) write(i, act.value(load<V>(y + i)));
    });
    return;
  }
  for_strips(vectors, [&](auto n, int64_t first) {
    for (int64_t v = 0; v < n; ++v) {
      const int64_t begin = (first * features + v) * L, stride = n * L;
      softmax_vectors(y + begin, features, stride,
                      [&](int64_t i, const V& e, const V& total) { write(begin + i * stride, e / total); });
    }
  });
}

}  // namespace mi_kernels::MI_ISA
