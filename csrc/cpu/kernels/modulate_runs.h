// What the elementwise and the normalisation kernels have in common: iteration over strided axes, contiguous runs,
// activated scales.
#pragma once

#include "cpu/engine/vector_activations.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {

// Iterates over the positions on some axes, the last one fastest, and has the offset of each operand.
template <class A>
class AxisIterator {
  static constexpr int kCount = int(sizeof(A::stride) / sizeof(int64_t));

 public:
  AxisIterator(const A* axes, int64_t count, int64_t position) : axes_(axes), count_(count) {
    for (int64_t a = count - 1; a >= 0; --a) {
      index_[a] = position % axes[a].size;
      position /= axes[a].size;
      for (int o = 0; o < kCount; ++o) offset_[o] += index_[a] * axes[a].stride[o];
    }
  }
  int64_t offset(int operand) const { return offset_[operand]; }
  void next() {
    for (int64_t a = count_ - 1; a >= 0; --a) {
      const bool carry = ++index_[a] == axes_[a].size;
      const int64_t steps = carry ? 1 - axes_[a].size : 1;
      for (int o = 0; o < kCount; ++o) offset_[o] += steps * axes_[a].stride[o];
      if (!carry) return;
      index_[a] = 0;
    }
  }

 private:
  const A* axes_;
  int64_t count_;
  int64_t index_[kMaxAxes] = {}, offset_[kCount] = {};
};

// n contiguous elements: in place, or gathered into the buffer.
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

// out = f(p) for a run of n elements. The last ones are padded to a whole vector, so that the result for an element
// does not depend on its position.
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

// F(scale) of a run.
template <class S, class Acc>
void activate_run(const ScaleFunction& function, const S* scale, int64_t stride, int64_t n, Acc* out) {
  const Acc factor = Acc(function.factor), offset = Acc(function.offset);
  for_activation<VectorMath>(function.activation, [&](auto act) {
    map_run(scale, stride, n, out, [&](const Vec<Acc>& v) { return act.value(v) * factor + offset; });
  });
}

}  // namespace mi_kernels::MI_ISA
