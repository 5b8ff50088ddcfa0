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
  // Goes on by some positions, which must not go past the end of the last axis.
  void next(int64_t positions = 1) {
    for (int64_t a = count_ - 1; a >= 0; --a, positions = 1) {
      const bool carry = (index_[a] += positions) == axes_[a].size;
      const int64_t steps = carry ? positions - axes_[a].size : positions;
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

// A whole vector of a run.
struct Whole {
  template <class S>
  MI_INLINE auto load(const S* p) const {
    return load_acc<Simd<decltype(to_acc(S{}))>::lanes>(p);
  }
  template <class S, class V>
  MI_INLINE void store(S* p, const V& v) const {
    store_acc<int(sizeof(V) / sizeof(v[0]))>(p, v);
  }
};

// The last `count` elements of a run, fewer than a vector; the lanes behind them are loaded as zero and not stored. An
// element gets the same bits as in a whole vector.
struct Part {
  int64_t count;

#if defined(__AVX512F__)
  MI_INLINE uint32_t mask() const { return (uint32_t(1) << count) - 1; }
  MI_INLINE auto load(const double* p) const { return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(mask8(), p)); }
  MI_INLINE auto load(const float* p) const { return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(mask16(), p)); }
  MI_INLINE auto load(const BFloat16* p) const {
    const auto words = bit_cast<Vec<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xffff, halves(p)));
    return bit_cast<Vec<float>>(words << 16);
  }
  MI_INLINE auto load(const Half* p) const { return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, halves(p))); }

  MI_INLINE void store(double* p, const Vec<double>& v) const {
    _mm512_mask_storeu_pd(p, mask8(), bit_cast<__m512d>(v));
  }
  MI_INLINE void store(float* p, const Vec<float>& v) const { _mm512_mask_storeu_ps(p, mask16(), bit_cast<__m512>(v)); }
  MI_INLINE void store(BFloat16* p, const Vec<float>& v) const {
    _mm256_mask_storeu_epi16(p, mask16(), bit_cast<__m256i>(round_lanes_to_bf16<16>(v)));
  }
  MI_INLINE void store(Half* p, const Vec<float>& v) const {
    const auto halves = _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(p, mask16(), halves);
  }

 private:
  MI_INLINE __mmask8 mask8() const { return __mmask8(mask()); }
  MI_INLINE __mmask16 mask16() const { return __mmask16(mask()); }
  MI_INLINE __m256i halves(const void* p) const { return _mm256_maskz_loadu_epi16(mask16(), p); }
#else
  template <class S>
  MI_INLINE auto load(const S* p) const {
    constexpr int L = Simd<decltype(to_acc(S{}))>::lanes;
    S part[L] = {};
    for (int64_t l = 0; l < count; ++l) part[l] = p[l];
    return load_acc<L>(part);
  }
  template <class S, class V>
  MI_INLINE void store(S* p, const V& v) const {
    S part[sizeof(V) / sizeof(v[0])];
    Whole{}.store(part, v);
    for (int64_t l = 0; l < count; ++l) p[l] = part[l];
  }
#endif
};

// step(i, Whole) for each vector of a run of n elements, and step(i, Part) for what is left.
template <int L, class F>
MI_INLINE void for_each_vector(int64_t n, F&& step) {
  int64_t i = 0;
  for (; i + L <= n; i += L) step(i, Whole{});
  if (i < n) step(i, Part{n - i});
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

// Repeats the first n elements until there are count * n.
template <class T>
void repeat_run(T* p, int64_t n, int64_t count) {
  for (int64_t have = 1; have < count; have *= 2)
    __builtin_memcpy(p + have * n, p, size_t(min(have, count - have) * n) * sizeof(T));
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
