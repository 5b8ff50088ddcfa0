// dx = F(scale) g, and the sums over the reduced axes of x g and of g, in one pass over g and x. Of a mixture of x and
// another, (x - other) g is summed, and dshift = g - F(scale) g stored.
//
// Short summation blocks in accumulation type are added up in double: PyTorch sums pairwise, and a sum in float would
// be less exact over a long axis. The blocks depend on the sizes alone.
#include "cpu/kernels/modulate_short_grads.h"

namespace mi_kernels::MI_ISA {
namespace {

// Rows of a summation block. Blocks are shorter if there are few rows: where these are equal, as for the gradient of
// y.sum(), PyTorch's pairwise sum is exact or nearly so.
constexpr int64_t kSumBlock = 16, kShortSumBlock = 4, kFewRows = 128;

template <class S>
class ModulateGrads {
  using Acc = decltype(to_acc(S{}));
  static constexpr int L = Simd<Acc>::lanes;

  const ModulateGradsCall& call;
  const ModulateGradsPlan& plan;
  const Executor& executor;

  // Of one unit.
  struct Buffers {
    Acc *factor, *scale_acc, *shift_acc;  // F(scale), and summation blocks of x g and of g
    double *scale_sums, *shift_sums;      // sums over blocks
    S *grad, *x, *other;                  // gathered runs
  };

 public:
  ModulateGrads(const ModulateGradsCall& c, const ModulateGradsPlan& p, const Executor& e)
      : call(c), plan(p), executor(e) {}

  void run() {
    if (plan.runs > 0) return short_runs();
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    if (plan.splits == 1 || !has_sums()) return;
    run_tasks(executor, plan.units, [this](int64_t unit, int64_t worker) {
      const Buffers b = cleared_buffers(worker);
      for (int64_t split = 0; split < plan.splits; ++split) add_partial(unit, split, b);
      finish(unit, b);
    });
  }

 private:
  bool sums_shift() const { return call.dshift && !call.other; }
  bool has_sums() const { return call.dscale || sums_shift(); }

  // The scale has the size of x, as in a gate: nothing is summed.
  bool is_elementwise() const {
    return plan.rows == 1 && call.inner_kept && call.dscale && !sums_shift() && call.inner.stride[kGrad] == 1 &&
           call.inner.stride[kX] == 1 && call.inner.stride[kScale] == 1 && call.inner.stride[kShift] == 1 &&
           (!call.other || call.inner.stride[kOther] == 1);
  }

  void elementwise_unit(int64_t unit) const {
    const int64_t first = unit % plan.chunks * kModulateChunk, n = sum_count(unit);
    const AxisIterator kept(call.kept, call.kept_axes, unit / plan.chunks);
    const auto src = [&](const void* data, int operand) {
      return static_cast<const S*>(data) + kept.offset(operand) + first;
    };
    const S *grad = src(call.grad, kGrad), *x = src(call.x, kX), *scale = src(call.scale, kScale);
    const S* other = call.other ? src(call.other, kOther) : nullptr;
    S *dx = result_run(call.dx, kept, first), *dshift = result_run(call.dshift, kept, first);
    S* dscale = static_cast<S*>(call.dscale) + kept.offset(kShift) + first;
    const Acc factor = Acc(call.function.factor), offset = Acc(call.function.offset);
    const bool selected = backward_selects(call.function.activation);
    for_activation<VectorMath>(call.function.activation, [&](auto act) {
      const auto step = [&](const S* g, const S* x, const S* other, const S* scale, S* dx, S* dscale, S* dshift) {
        const Vec<Acc> grads = load_acc<L>(g), s = load_acc<L>(scale);
        Vec<Acc> from = load_acc<L>(x);
        if (other) from -= load_acc<L>(other);
        const Vec<Acc> slope = act.derivative(s), product = slope * (factor * (grads * from));
        store_acc<L>(dscale, selected ? Vec<Acc>(slope == Acc(0) ? Vec<Acc>{} : product) : product);
        const Vec<Acc> part = (act.value(s) * factor + offset) * grads;
        if (dx) store_acc<L>(dx, part);
        if (dshift) store_acc<L>(dshift, Vec<Acc>(grads - part));
      };
      const auto at = [](auto* p, int64_t i) { return p ? p + i : nullptr; };
      int64_t i = 0;
      for (; i + L <= n; i += L) step(grad + i, x + i, at(other, i), scale + i, at(dx, i), dscale + i, at(dshift, i));
      if (i == n) return;
      S rest[7][L] = {};  // a whole vector, so that the result for an element does not depend on its position
      const size_t bytes = size_t(n - i) * sizeof(S);
      __builtin_memcpy(rest[0], grad + i, bytes);
      __builtin_memcpy(rest[1], x + i, bytes);
      if (other) __builtin_memcpy(rest[2], other + i, bytes);
      __builtin_memcpy(rest[3], scale + i, bytes);
      step(rest[0], rest[1], other ? rest[2] : nullptr, rest[3], rest[4], rest[5], rest[6]);
      if (dx) __builtin_memcpy(dx + i, rest[4], bytes);
      __builtin_memcpy(dscale + i, rest[5], bytes);
      if (dshift) __builtin_memcpy(dshift + i, rest[6], bytes);
    });
  }

  // A run of a result of the size of x, or null.
  static S* result_run(void* data, const AxisIterator<Axis>& kept, int64_t start) {
    return data ? static_cast<S*>(data) + kept.offset(kY) + start : nullptr;
  }

  Buffers buffers(int64_t worker) const {
    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    Buffers b;
    b.factor = scratch.allocate<Acc>(kModulateChunk);
    b.scale_acc = scratch.allocate<Acc>(kModulateChunk);
    b.shift_acc = scratch.allocate<Acc>(kModulateChunk);
    b.scale_sums = scratch.allocate<double>(kModulateChunk);
    b.shift_sums = scratch.allocate<double>(kModulateChunk);
    b.grad = scratch.allocate<S>(kModulateChunk);
    b.x = scratch.allocate<S>(kModulateChunk);
    b.other = scratch.allocate<S>(kModulateChunk);
    return b;
  }
  Buffers cleared_buffers(int64_t worker) const {
    const Buffers b = buffers(worker);
    clear(b.scale_sums, kModulateChunk);
    clear(b.shift_sums, kModulateChunk);
    return b;
  }

  // The number of sums of a unit.
  int64_t sum_count(int64_t unit) const {
    if (plan.runs > 0) return ShortRunGrads<S>(call, plan).count(unit);
    return call.inner_kept ? min(kModulateChunk, call.inner.size - unit % plan.chunks * kModulateChunk) : 1;
  }

  void task(int64_t t, int64_t worker) const {
    if (is_elementwise()) {
      for (int64_t unit = t * plan.unit_step; unit < min((t + 1) * plan.unit_step, plan.units); ++unit)
        elementwise_unit(unit);
      return;
    }
    const Buffers b = cleared_buffers(worker);
    if (plan.splits > 1) {
      const int64_t unit = t / plan.splits, split = t % plan.splits, begin = split * plan.row_step;
      accumulate(unit, begin, min(begin + plan.row_step, plan.rows), b);
      if (has_sums()) store_partial(unit, split, b);
      return;
    }
    for (int64_t unit = t * plan.unit_step; unit < min((t + 1) * plan.unit_step, plan.units); ++unit) {
      accumulate(unit, 0, plan.rows, b);
      if (!has_sums()) continue;
      finish(unit, b);
      clear(b.scale_sums, sum_count(unit));
      clear(b.shift_sums, sum_count(unit));
    }
  }

  void short_runs() const {
    const ShortRunGrads<S> grads(call, plan);
    const auto pieces = [](const Buffers& b) {
      return typename ShortRunGrads<S>::Buffers{b.factor, b.scale_acc, b.scale_sums, b.shift_sums};
    };
    run_tasks(executor, plan.tasks, [&](int64_t t, int64_t worker) {
      const Buffers b = buffers(worker);
      if (plan.splits > 1) {
        const int64_t unit = t / plan.splits, split = t % plan.splits, begin = split * plan.row_step;
        grads.accumulate(unit, begin, min(begin + plan.row_step, plan.rows), pieces(b));
        if (has_sums()) store_partial(unit, split, b);
        return;
      }
      for (int64_t unit = t * plan.unit_step; unit < min((t + 1) * plan.unit_step, plan.units); ++unit) {
        grads.accumulate(unit, 0, plan.rows, pieces(b));
        grads.finish(unit, pieces(b));
      }
    });
    if (plan.splits == 1 || !has_sums()) return;
    run_tasks(executor, plan.units, [&](int64_t unit, int64_t worker) {
      const Buffers b = cleared_buffers(worker);
      for (int64_t split = 0; split < plan.splits; ++split) add_partial(unit, split, b);
      grads.finish(unit, pieces(b));
    });
  }

  Acc times_slope(Acc slope, double sum) const {
    const bool selected = backward_selects(call.function.activation);
    return selected && slope == 0 ? Acc(0) : Acc(double(slope) * (call.function.factor * sum));
  }

  // act'(scale) of a run.
  void slopes_run(const S* scale, int64_t stride, int64_t n, Acc* out) const {
    for_activation<VectorMath>(call.function.activation, [&](auto act) {
      map_run(scale, stride, n, out, [&](const Vec<Acc>& v) { return act.derivative(v); });
    });
  }

  double* partial(int64_t unit, int64_t split) const {
    return reinterpret_cast<double*>(executor.partials) + (unit * plan.splits + split) * 2 * sum_stride();
  }
  int64_t sum_stride() const {
    return plan.runs > 0 ? plan.runs : call.inner_kept ? min(kModulateChunk, call.inner.size) : 1;
  }

  void store_partial(int64_t unit, int64_t split, const Buffers& b) const {
    double* dest = partial(unit, split);
    __builtin_memcpy(dest, b.scale_sums, size_t(sum_count(unit)) * sizeof(double));
    __builtin_memcpy(dest + sum_stride(), b.shift_sums, size_t(sum_count(unit)) * sizeof(double));
  }
  void add_partial(int64_t unit, int64_t split, const Buffers& b) const {
    const double* src = partial(unit, split);
    for (int64_t i = 0; i < sum_count(unit); ++i) {
      b.scale_sums[i] += src[i];
      b.shift_sums[i] += src[sum_stride() + i];
    }
  }

  // Sums rows [begin, end) of a unit: positions on the reduced axes, times chunks of the inner axis if that is reduced.
  void accumulate(int64_t unit, int64_t begin, int64_t end, const Buffers& b) const {
    const int64_t first = call.inner_kept ? unit % plan.chunks * kModulateChunk : 0;
    const AxisIterator kept(call.kept, call.kept_axes, unit / plan.chunks);
    const S* scale = static_cast<const S*>(call.scale) + kept.offset(kScale) + first * call.inner.stride[kScale];
    if (has_factor()) activate_run(call.function, scale, call.inner.stride[kScale], sum_count(unit), b.factor);
    const int64_t chunks = call.inner_kept ? 1 : ceil_div(call.inner.size, kModulateChunk);
    if (plan.repeats > 1) repeat_run(b.factor, call.inner.size, plan.repeats);
    AxisIterator reduced(call.reduced, call.reduced_axes, begin / chunks);
    const int64_t longest = plan.rows <= kFewRows ? kShortSumBlock : kSumBlock;
    int64_t summed = 0, width = 0;
    for (int64_t row = begin, rows = 1; row < end; row += rows) {
      const int64_t chunk = row % chunks, start = call.inner_kept ? first : chunk * kModulateChunk;
      if (plan.repeats > 1) rows = min(min(plan.repeats, end - row), repeated_axis().size - row % repeated_axis().size);
      const int64_t n = rows * min(kModulateChunk, call.inner.size - start);
      const auto load = [&](const void* data, int operand, S* buffer) {
        const S* p = static_cast<const S*>(data) + kept.offset(operand) + reduced.offset(operand) +
                     start * call.inner.stride[operand];
        return contiguous_run(p, call.inner.stride[operand], n, buffer);
      };
      Run run{load(call.grad, kGrad, b.grad), nullptr, nullptr, nullptr, nullptr, n};
      if (call.dscale) run.x = load(call.x, kX, b.x);
      if (call.dscale && call.other) run.other = load(call.other, kOther, b.other);
      run.dx = result_run(call.dx, kept, reduced.offset(kY) + start);
      run.dshift = result_run(call.dshift, kept, reduced.offset(kY) + start);
      if (call.inner_kept) {
        if (summed > 0 && n != width) flush(width, b), summed = 0;
        width = n;
        dispatch([&](auto flags) { sum_elements<decltype(flags)>(run, summed == 0, b); });
        if (has_sums() && (++summed == longest || row + rows == end)) flush(n, b), summed = 0;
      } else {
        dispatch([&](auto flags) { sum_run<decltype(flags)>(run, b); });
      }
      if (chunk + 1 == chunks) reduced.next(rows);
    }
    if (plan.repeats > 1) fold(b.scale_sums), fold(b.shift_sums);
  }

  const Axis& repeated_axis() const { return call.reduced[call.reduced_axes - 1]; }

  // Adds the sums of repeated runs up, and clears all but the first.
  void fold(double* sums) const {
    const int64_t n = call.inner.size;
    for (int64_t i = n; i < plan.repeats * n; i += n)
      for (int64_t j = 0; j < n; ++j) sums[j] += sums[i + j];
    clear(sums + n, (plan.repeats - 1) * n);
  }

  bool has_factor() const { return call.dx || (call.other && call.dshift); }

  // Whether dx is stored, and x g and g are summed. A mixture looks which of dx and dshift there are.
  template <bool DX, bool DScale, bool DShift, bool Mixes = false>
  struct Flags {
    static constexpr bool dx = DX, dscale = DScale, dshift = DShift, mixes = Mixes;
  };
  template <class F>
  MI_INLINE void dispatch(F&& f) const {
    if (call.other) return call.dscale ? f(Flags<false, true, false, true>{}) : f(Flags<false, false, false, true>{});
    switch ((call.dx ? 4 : 0) + (call.dscale ? 2 : 0) + (call.dshift ? 1 : 0)) {
      case 1: return f(Flags<false, false, true>{});
      case 2: return f(Flags<false, true, false>{});
      case 3: return f(Flags<false, true, true>{});
      case 4: return f(Flags<true, false, false>{});
      case 5: return f(Flags<true, false, true>{});
      case 6: return f(Flags<true, true, false>{});
      default: return f(Flags<true, true, true>{});
    }
  }

  // One run of each operand and of each result of the size of x.
  struct Run {
    const S *grad, *x, *other;
    S *dx, *dshift;
    int64_t n;
  };

  // Stores dx, and dshift of a mixture.
  template <class Flags, class Lanes>
  static MI_INLINE void store_products(const Run& run, int64_t i, Lanes lanes, const Vec<Acc>& g,
                                       const Vec<Acc>& factor) {
    if constexpr (Flags::mixes) {
      const Vec<Acc> part = g * factor;
      if (run.dx) lanes.store(run.dx + i, part);
      if (run.dshift) lanes.store(run.dshift + i, Vec<Acc>(g - part));
    } else if constexpr (Flags::dx) {
      lanes.store(run.dx + i, Vec<Acc>(g * factor));
    }
  }

  template <class Flags, class Lanes>
  static MI_INLINE Vec<Acc> load_x(const Run& run, int64_t i, Lanes lanes) {
    Vec<Acc> x = lanes.load(run.x + i);
    if constexpr (Flags::mixes) x -= lanes.load(run.other + i);
    return x;
  }

  // One sum for each element of the run.
  template <class Flags>
  void sum_elements(const Run& run, bool overwrite, const Buffers& b) const {
    const bool has_factors = has_factor();
    for_each_vector<L>(run.n, [&](int64_t i, auto lanes) {
      const Vec<Acc> g = lanes.load(run.grad + i);
      store_products<Flags>(run, i, lanes, g, has_factors ? lanes.load(b.factor + i) : Vec<Acc>{});
      if constexpr (Flags::dscale) {
        Vec<Acc> product = g * load_x<Flags>(run, i, lanes);
        if (!overwrite) product += lanes.load(b.scale_acc + i);
        lanes.store(b.scale_acc + i, product);
      }
      if constexpr (Flags::dshift)
        lanes.store(b.shift_acc + i, overwrite ? g : Vec<Acc>(g + lanes.load(b.shift_acc + i)));
    });
  }

  // One sum for the whole run, in four interleaved vectors.
  template <class Flags>
  void sum_run(const Run& run, const Buffers& b) const {
    using V = Vec<Acc>;
    const V factor = V{} + (has_factor() ? b.factor[0] : Acc(0));
    V scale_acc[4] = {}, shift_acc[4] = {};
    for_each_vector<L>(run.n, [&](int64_t i, auto lanes) {
      const V g = lanes.load(run.grad + i);
      store_products<Flags>(run, i, lanes, g, factor);
      const int64_t v = i / L % 4;
      if constexpr (Flags::dscale) scale_acc[v] += g * load_x<Flags>(run, i, lanes);
      if constexpr (Flags::dshift) shift_acc[v] += g;
    });
    const auto sum = [](const V(&acc)[4]) { return double(sum_lanes(V((acc[0] + acc[1]) + (acc[2] + acc[3])))); };
    if constexpr (Flags::dscale) b.scale_sums[0] += sum(scale_acc);
    if constexpr (Flags::dshift) b.shift_sums[0] += sum(shift_acc);
  }

  void flush(int64_t n, const Buffers& b) const {
    for (int64_t i = 0; call.dscale && i < n; ++i) b.scale_sums[i] += double(b.scale_acc[i]);
    for (int64_t i = 0; sums_shift() && i < n; ++i) b.shift_sums[i] += double(b.shift_acc[i]);
  }

  // dscale = act'(scale) * sum, and dshift, of a unit.
  void finish(int64_t unit, const Buffers& b) const {
    const int64_t first = call.inner_kept ? unit % plan.chunks * kModulateChunk : 0, n = sum_count(unit);
    const AxisIterator kept(call.kept, call.kept_axes, unit / plan.chunks);
    const int64_t stride = call.inner.stride[kShift], offset = kept.offset(kShift) + first * stride;
    if (call.dscale) {
      const S* scale = static_cast<const S*>(call.scale) + kept.offset(kScale) + first * call.inner.stride[kScale];
      slopes_run(scale, call.inner.stride[kScale], n, b.factor);
      S* dest = static_cast<S*>(call.dscale) + offset;
      for (int64_t i = 0; i < n; ++i) from_acc(times_slope(b.factor[i], b.scale_sums[i]), dest[i * stride]);
    }
    if (sums_shift()) {
      S* dest = static_cast<S*>(call.dshift) + offset;
      for (int64_t i = 0; i < n; ++i) from_acc(Acc(b.shift_sums[i]), dest[i * stride]);
    }
  }
};

}  // namespace

void modulate_grads(DType dtype, const ModulateGradsCall& call, const ModulateGradsPlan& plan,
                    const Executor& executor) {
  for_dtype(dtype, [&](auto s) { ModulateGrads<decltype(s)>(call, plan, executor).run(); });
}

}  // namespace mi_kernels::MI_ISA
