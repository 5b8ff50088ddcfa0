// What the two normalisation kernels have in common: contexts and weights of a block of channels in accumulation type,
// and blocks of pixels.
#pragma once

#include "cpu/kernels/modulate_runs.h"
#include "cpu/kernels/norm_call.h"

namespace mi_kernels::MI_ISA {

// Elements that are added up in accumulation type before their sum goes on in double, and pixels that are.
inline constexpr int64_t kNormChunk = 2048, kPixelBlock = 32;

template <class S>
class NormChannels {
 protected:
  using Acc = decltype(to_acc(S{}));
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;

  const NormOperands& shape;

  // Of a block of channels: F(scale), shift, weight, bias and gate; ones and zeros for what there is not.
  struct Channels {
    Acc *factor, *shift, *weight, *bias, *gate;
  };

  explicit NormChannels(const NormOperands& s) : shape(s) {}

  Channels allocate_channels(ScratchAllocator& scratch, int64_t n) const {
    Channels c;
    for (Acc** p : {&c.factor, &c.shift, &c.weight, &c.bias, &c.gate}) *p = scratch.allocate<Acc>(n);
    return c;
  }

  int64_t first_channel(int64_t block) const { return block * shape.block_channels(); }
  int64_t channel_count(int64_t block) const {
    return min(shape.block_channels(), shape.channels - first_channel(block));
  }
  bool affine() const { return shape.weight.data || shape.bias.data; }

  // The channels [first, first + n): weights, and ones and zeros for what there is not, once for all units.
  void load_weights(int64_t first, int64_t n, const Channels& c) const {
    load(shape.weight, 0, first, n, c.weight, Acc(1));
    load(shape.bias, 0, first, n, c.bias, Acc(0));
    if (!shape.gate.data) fill(c.gate, n, Acc(1));
    if (!shape.scale.data) fill(c.factor, n, Acc(1));
    if (!shape.shift.data) fill(c.shift, n, Acc(0));
  }
  template <class Position>
  void load_factor(const Position& unit, int64_t first, int64_t n, const Channels& c) const {
    if (!shape.scale.data) return;
    const S* scale = channel(shape.scale, unit.offset(kNormScale), first);
    activate_run(shape.function, scale, shape.scale.step, n, c.factor);
  }
  template <class Position>
  void load_contexts(const Position& unit, int64_t first, int64_t n, const Channels& c) const {
    load_factor(unit, first, n, c);
    if (shape.gate.data) load(shape.gate, unit.offset(kNormGate), first, n, c.gate);
    if (shape.shift.data) load(shape.shift, unit.offset(kNormShift), first, n, c.shift);
  }

  const S* channel(const ChannelRef& ref, int64_t offset, int64_t first) const {
    return static_cast<const S*>(ref.data) + offset + first * ref.step;
  }

  template <class T>
  static MI_INLINE T zero_like(const T&) {
    return T{};
  }

  // f(i, lanes) for vectors, then for single elements.
  template <class F>
  static MI_INLINE void for_each_step(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + L <= n; i += L) f(i, Index<L>{});
    for (; i < n; ++i) f(i, Index<1>{});
  }

  // Adds lanes, or a single element, to sums in double.
  template <class T>
  static MI_INLINE void add_in_double(double* sums, const T& v) {
    if constexpr (sizeof(T) == sizeof(Acc)) {
      sums[0] += double(v);
    } else {
      using Wide = Vec<double, L>;
      store(sums, Wide(mi_kernels::MI_ISA::load<Wide>(sums) + __builtin_convertvector(v, Wide)));
    }
  }

  // The sum of f(i, lanes) over n elements; in accumulation type over at most kNormChunk of them.
  template <class F>
  static MI_INLINE double sum_over(int64_t n, F&& f) {
    constexpr int kChains = 4;
    V sums[kChains] = {};
    Acc rest = 0;
    int64_t i = 0;
    for (; i + kChains * L <= n; i += kChains * L)
      unroll<kChains>([&](auto k) MI_INLINED { sums[k] += f(i + k * L, Index<L>{}); });
    for (; i + L <= n; i += L) sums[0] += f(i, Index<L>{});
    for (; i < n; ++i) rest += f(i, Index<1>{});
    return double(sum_lanes(V((sums[0] + sums[1]) + (sums[2] + sums[3])))) + double(rest);
  }

 private:
  static void fill(Acc* out, int64_t n, Acc value) {
    for (int64_t i = 0; i < n; ++i) out[i] = value;
  }
  void load(const ChannelRef& ref, int64_t offset, int64_t first, int64_t n, Acc* out, Acc missing = 0) const {
    if (!ref.data) return fill(out, n, missing);
    map_run(channel(ref, offset, first), ref.step, n, out, [](const V& v) { return v; });
  }
};

}  // namespace mi_kernels::MI_ISA
