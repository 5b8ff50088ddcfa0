// What the two modulation kernels share: walks over strided axes, runs made contiguous, activated scales.
#pragma once

#include "cpu/engine/vector_activations.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {

// A place on some axes, and how far it is from the start of each operand.
class Walk {
 public:
  Walk(const Axis* axes, int64_t count, int64_t place) : axes_(axes), count_(count) {
    for (int64_t a = count - 1; a >= 0; --a) {
      index_[a] = place % axes[a].size;
      place /= axes[a].size;
      for (int o = 0; o < kOperands; ++o) offset_[o] += index_[a] * axes[a].stride[o];
    }
  }
  int64_t at(int operand) const { return offset_[operand]; }
  void next() {
    for (int64_t a = count_ - 1; a >= 0; --a) {
      const bool carry = ++index_[a] == axes_[a].size;
      const int64_t steps = carry ? 1 - axes_[a].size : 1;
      for (int o = 0; o < kOperands; ++o) offset_[o] += steps * axes_[a].stride[o];
      if (!carry) return;
      index_[a] = 0;
    }
  }

 private:
  const Axis* axes_;
  int64_t count_;
  int64_t index_[kMaxAxes] = {}, offset_[kOperands] = {};
};

// n elements one after the other: in place, or gathered into the buffer.
template <class S>
MI_INLINE const S* contiguous_run(const S* p, int64_t stride, int64_t n, S* buffer) {
  if (stride == 1 || n == 1) return p;
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * stride];
  return buffer;
}

template <int N, class S>
MI_INLINE auto load_run(const S* p) {
  if constexpr (N == 1) {
    return to_acc(*p);
  } else {
    return load_acc<N>(p);
  }
}
template <int N, class S, class V>
MI_INLINE void store_run(S* p, const V& v) {
  if constexpr (N == 1) {
    from_acc(v, *p);
  } else {
    store_acc<N>(p, v);
  }
}

// f of n elements of storage, into accumulation type. The last ones are padded to a vector, so that an element's
// value does not depend on its place.
template <class S, class Acc, class F>
void map_run(const S* p, int64_t stride, int64_t n, Acc* out, F&& f) {
  constexpr int L = Simd<Acc>::lanes;
  using V = Vec<Acc>;
  if (stride == 0) {
    V v{};
    const V all = f(V(v + to_acc(*p)));
    for (int64_t i = 0; i < n; ++i) out[i] = all[0];
    return;
  }
  int64_t i = 0;
  if (stride == 1)
    for (; i + L <= n; i += L) store(out + i, f(load_acc<L>(p + i)));
  for (; i < n; i += L) {
    V v{};
    const int64_t valid = min(n - i, L);
    for (int64_t l = 0; l < valid; ++l) v[l] = to_acc(p[(i + l) * stride]);
    const V value = f(v);
    for (int64_t l = 0; l < valid; ++l) out[i + l] = value[l];
  }
}

// act(scale) + offset of a run.
template <class S, class Acc>
void activate_run(Activation activation, Acc offset, const S* scale, int64_t stride, int64_t n, Acc* out) {
  for_activation<VectorMath>(activation, [&](auto act) {
    map_run(scale, stride, n, out, [&](const Vec<Acc>& v) { return act.value(v) + offset; });
  });
}

}  // namespace mi_kernels::MI_ISA
