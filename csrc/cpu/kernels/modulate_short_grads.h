// Gradients of short runs with one scale each, as of small feature maps: as many runs as a vector has lanes are summed
// at a time, lane by lane, and the sums of all of them are added at once. Where several runs share a scale, as in a
// batch, sums in double are added up.
#pragma once

#include "cpu/kernels/modulate_runs.h"

namespace mi_kernels::MI_ISA {

template <class S>
class ShortRunGrads {
  using Acc = decltype(to_acc(S{}));
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;

  const ModulateGradsCall& call;
  const ModulateGradsPlan& plan;
  const Axis axis;  // the last kept one: a unit is a piece of it

 public:
  // One for each run of a unit.
  struct Buffers {
    Acc *factors, *slopes;
    double *scale_sums, *shift_sums;
  };

  ShortRunGrads(const ModulateGradsCall& c, const ModulateGradsPlan& p)
      : call(c), plan(p), axis(c.kept[c.kept_axes - 1]) {}

  int64_t count(int64_t unit) const { return min(plan.runs, axis.size - unit % plan.chunks * plan.runs); }

  // Stores products and sums of positions [begin, end) on the reduced axes.
  void accumulate(int64_t unit, int64_t begin, int64_t end, const Buffers& b) const {
    const int64_t first = unit % plan.chunks * plan.runs, runs = count(unit);
    const AxisIterator kept(call.kept, call.kept_axes - 1, unit / plan.chunks);
    const auto at = [&](int operand) { return kept.offset(operand) + first * axis.stride[operand]; };
    if (call.dx || (call.other && call.dshift))
      activate_run(call.function, static_cast<const S*>(call.scale) + at(kScale), axis.stride[kScale], runs, b.factors);
    AxisIterator reduced(call.reduced, call.reduced_axes, begin);
    for (int64_t row = begin; row < end; ++row, reduced.next()) {
      const auto src = [&](const void* data, int operand) {
        return data ? static_cast<const S*>(data) + at(operand) + reduced.offset(operand) : nullptr;
      };
      const auto dest = [&](void* data) {
        return data ? static_cast<S*>(data) + at(kY) + reduced.offset(kY) : nullptr;
      };
      const Runs r{src(call.grad, kGrad), call.dscale ? src(call.x, kX) : nullptr,
                   call.dscale ? src(call.other, kOther) : nullptr, dest(call.dx),
                   call.other ? dest(call.dshift) : nullptr};
      for_flags([&](auto flags) {
        for (int64_t run = 0; run < runs; run += L) sum<decltype(flags)>(r, run, min(runs - run, L), row == begin, b);
      });
    }
  }

  // dscale = act'(scale) * sum, and dshift, of a unit.
  void finish(int64_t unit, const Buffers& b) const {
    const int64_t first = unit % plan.chunks * plan.runs, runs = count(unit), stride = axis.stride[kShift];
    const AxisIterator kept(call.kept, call.kept_axes - 1, unit / plan.chunks);
    const int64_t offset = kept.offset(kShift) + first * stride;
    if (call.dscale) {
      const S* scale = static_cast<const S*>(call.scale) + kept.offset(kScale) + first * axis.stride[kScale];
      for_activation<VectorMath>(call.function.activation, [&](auto act) {
        map_run(scale, axis.stride[kScale], runs, b.slopes, [&](const V& v) { return act.derivative(v); });
      });
      const bool selected = backward_selects(call.function.activation);
      store_sums(b.scale_sums, static_cast<S*>(call.dscale) + offset, stride, runs,
                 [&](int64_t i, const Vec<double, L>& sums) {
                   const V slope = load<V>(b.slopes + i);
                   const auto product = __builtin_convertvector(slope, Vec<double, L>) * (call.function.factor * sums);
                   const V rounded = __builtin_convertvector(product, V);
                   return selected ? V(slope == Acc(0) ? V{} : rounded) : rounded;
                 });
    }
    if (sums_shift())
      store_sums(b.shift_sums, static_cast<S*>(call.dshift) + offset, stride, runs,
                 [](int64_t, const Vec<double, L>& sums) { return V(__builtin_convertvector(sums, V)); });
  }

 private:
  // The first run of each operand and result, as far as they are needed.
  struct Runs {
    const S *grad, *x, *other;
    S *dx, *dshift;
  };
  template <bool DScale, bool DShift, bool Mixes>
  struct Flags {
    static constexpr bool dscale = DScale, dshift = DShift, mixes = Mixes;
  };

  bool sums_shift() const { return call.dshift && !call.other; }

  template <class F>
  MI_INLINE void for_flags(F&& f) const {
    if (call.other) return call.dscale ? f(Flags<true, false, true>{}) : f(Flags<false, false, true>{});
    if (!sums_shift()) return call.dscale ? f(Flags<true, false, false>{}) : f(Flags<false, false, false>{});
    call.dscale ? f(Flags<true, true, false>{}) : f(Flags<false, true, false>{});
  }

  // Of `count` runs, at most L: their sums become or are added to those of the unit.
  template <class F>
  MI_INLINE void sum(const Runs& r, int64_t first, int64_t count, bool overwrite, const Buffers& b) const {
    V scale_sums[L], shift_sums[L];
    const int64_t n = call.inner.size;
    for (int64_t k = 0; k < count; ++k) {
      const auto at = [&](auto* p, int operand) { return p ? p + (first + k) * axis.stride[operand] : nullptr; };
      const S *grad = at(r.grad, kGrad), *x = at(r.x, kX), *other = at(r.other, kOther);
      S *dx = at(r.dx, kY), *dshift = at(r.dshift, kY);
      const V factor = V{} + (r.dx || r.dshift ? b.factors[first + k] : Acc(0));
      // Two sums, so that neither has many terms.
      V scale_acc[2] = {}, shift_acc[2] = {};
      const auto step = [&](int64_t i, auto lanes, auto which) {
        const V g = lanes.load(grad + i);
        if (dx) lanes.store(dx + i, V(factor * g));
        if constexpr (F::mixes) {
          if (dshift) lanes.store(dshift + i, V(g - factor * g));
        }
        if constexpr (F::dscale) {
          V from = lanes.load(x + i);
          if constexpr (F::mixes) from -= lanes.load(other + i);
          scale_acc[which] += g * from;
        }
        if constexpr (F::dshift) shift_acc[which] += g;
      };
      int64_t i = 0;
      for (; i + 2 * L <= n; i += 2 * L) {
        step(i, Whole{}, Index<0>{});
        step(i + L, Whole{}, Index<1>{});
      }
      if (i + L <= n) {
        step(i, Whole{}, Index<0>{});
        i += L;
      }
      if (i < n) step(i, Part{n - i}, Index<1>{});
      if constexpr (F::dscale) scale_sums[k] = scale_acc[0] + scale_acc[1];
      if constexpr (F::dshift) shift_sums[k] = shift_acc[0] + shift_acc[1];
    }
    if constexpr (F::dscale) add(scale_sums, count, overwrite, b.scale_sums + first);
    if constexpr (F::dshift) add(shift_sums, count, overwrite, b.shift_sums + first);
  }

  static MI_INLINE void add(V (&rows)[L], int64_t count, bool overwrite, double* sums) {
    for (int64_t k = count; k < L; ++k) rows[k] = V{};
    auto found = __builtin_convertvector(sum_each(rows), Vec<double, L>);
    if (!overwrite) found += load<Vec<double, L>>(sums);
    store(sums, found);
  }

  // Stores what f(i, sums) makes of the sums of runs i to i + L.
  template <class Of>
  static MI_INLINE void store_sums(const double* sums, S* dest, int64_t stride, int64_t count, Of&& f) {
    for_each_vector<L>(count, [&](int64_t i, auto lanes) {
      const V v = f(i, load<Vec<double, L>>(sums + i));
      if (stride == 1) return lanes.store(dest + i, v);
      S out[L];
      Whole{}.store(out, v);
      for (int64_t l = 0; l < min(count - i, L); ++l) dest[(i + l) * stride] = out[l];
    });
  }
};

}  // namespace mi_kernels::MI_ISA
