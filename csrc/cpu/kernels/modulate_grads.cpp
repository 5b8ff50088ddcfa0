// dx = (act(scale) + s) g, and the sums over the reduced axes of x g and of g, in one pass over g and x.
//
// Sums are short chains in accumulation type, added up in double: PyTorch sums pairwise, and float alone would lose to
// it over a long axis. How they are cut depends on the sizes alone.
#include "cpu/kernels/modulate_runs.h"

namespace mi_kernels::MI_ISA {
namespace {

// Rows whose sum is carried in accumulation type. Of a few rows PyTorch makes parts too, and where these are equal, as
// y.sum() makes them, its sum is exact or nearly so.
constexpr int64_t kChain = 16, kShortChain = 4, kFewRows = 128;

template <class S>
class ModulateGrads {
  using Acc = decltype(to_acc(S{}));
  static constexpr int L = Simd<Acc>::lanes;

  const ModulateGradsCall& call;
  const ModulateGradsPlan& plan;
  const Execution& execution;

  // Of one unit.
  struct Buffers {
    Acc *gate, *product, *plain;  // act(scale) + s, and chains of sums of x g and g
    double *products, *plains;    // the whole sums
    S *grad, *x;                  // gathered runs
  };

 public:
  ModulateGrads(const ModulateGradsCall& c, const ModulateGradsPlan& p, const Execution& e)
      : call(c), plan(p), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    if (plan.splits == 1 || !sums()) return;
    run_tasks(execution, plan.units, [this](int64_t unit, int64_t worker) {
      Buffers b = buffers(worker);
      for (int64_t split = 0; split < plan.splits; ++split) add_partial(unit, split, b);
      finish(unit, b);
    });
  }

 private:
  bool sums() const { return call.dscale || call.dshift; }

  // A scale of the size of x, as that of a gate: nothing is summed.
  bool elementwise() const {
    return plan.rows == 1 && call.inner_kept && call.dscale && !call.dshift && call.inner.stride[kGrad] == 1 &&
           call.inner.stride[kX] == 1 && call.inner.stride[kScale] == 1 && call.inner.stride[kShift] == 1;
  }

  void each(int64_t unit) const {
    const int64_t first = unit % plan.chunks * kModulateChunk, n = width(unit);
    const Walk kept(call.kept, call.kept_axes, unit / plan.chunks);
    const auto of = [&](const void* data, int operand) {
      return static_cast<const S*>(data) + kept.at(operand) + first;
    };
    const S *grad = of(call.grad, kGrad), *x = of(call.x, kX), *scale = of(call.scale, kScale);
    S* dx = call.dx ? static_cast<S*>(call.dx) + kept.at(kY) + first : nullptr;
    S* dscale = static_cast<S*>(call.dscale) + kept.at(kShift) + first;
    const Acc offset = Acc(call.offset);
    const bool selected = selects(call.activation);
    for_activation<VectorMath>(call.activation, [&](auto act) {
      const auto step = [&](const S* g, const S* at_x, const S* at_scale, S* to_x, S* to_scale) {
        const Vec<Acc> grads = load_acc<L>(g), s = load_acc<L>(at_scale);
        const Vec<Acc> slope = act.first(s), product = slope * (grads * load_acc<L>(at_x));
        store_acc<L>(to_scale, selected ? Vec<Acc>(slope == Acc(0) ? Vec<Acc>{} : product) : product);
        if (to_x) store_acc<L>(to_x, (act.value(s) + offset) * grads);
      };
      int64_t i = 0;
      for (; i + L <= n; i += L) step(grad + i, x + i, scale + i, dx ? dx + i : nullptr, dscale + i);
      if (i == n) return;
      S rest[5][L] = {};  // padded to a vector, so that an element's value does not depend on its place
      const size_t bytes = size_t(n - i) * sizeof(S);
      __builtin_memcpy(rest[0], grad + i, bytes);
      __builtin_memcpy(rest[1], x + i, bytes);
      __builtin_memcpy(rest[2], scale + i, bytes);
      step(rest[0], rest[1], rest[2], rest[3], rest[4]);
      if (dx) __builtin_memcpy(dx + i, rest[3], bytes);
      __builtin_memcpy(dscale + i, rest[4], bytes);
    });
  }

  Buffers buffers(int64_t worker) const {
    Arena arena{execution.scratch + worker * plan.worker_bytes};
    Buffers b;
    b.gate = arena.take<Acc>(kModulateChunk);
    b.product = arena.take<Acc>(kModulateChunk);
    b.plain = arena.take<Acc>(kModulateChunk);
    b.products = arena.take<double>(kModulateChunk);
    b.plains = arena.take<double>(kModulateChunk);
    b.grad = arena.take<S>(kModulateChunk);
    b.x = arena.take<S>(kModulateChunk);
    clear(b.products, kModulateChunk);
    clear(b.plains, kModulateChunk);
    return b;
  }

  // How many sums a unit has.
  int64_t width(int64_t unit) const {
    return call.inner_kept ? min(kModulateChunk, call.inner.size - unit % plan.chunks * kModulateChunk) : 1;
  }

  void task(int64_t t, int64_t worker) const {
    if (elementwise()) {
      for (int64_t unit = t * plan.unit_step; unit < min((t + 1) * plan.unit_step, plan.units); ++unit) each(unit);
      return;
    }
    Buffers b = buffers(worker);
    if (plan.splits > 1) {
      const int64_t unit = t / plan.splits, split = t % plan.splits, begin = split * plan.row_step;
      accumulate(unit, begin, min(begin + plan.row_step, plan.rows), b);
      if (sums()) keep_partial(unit, split, b);
      return;
    }
    if (short_rows()) return each_row(t * plan.unit_step, min((t + 1) * plan.unit_step, plan.units), b);
    for (int64_t unit = t * plan.unit_step; unit < min((t + 1) * plan.unit_step, plan.units); ++unit) {
      accumulate(unit, 0, plan.rows, b);
      if (!sums()) continue;
      finish(unit, b);
      clear(b.products, width(unit));
      clear(b.plains, width(unit));
    }
  }

  // Units of one short run each, one stride from unit to unit: finding their operands as any axes have them, and one
  // activation at a time, would cost as much as the runs.
  bool short_rows() const {
    return !call.inner_kept && plan.rows == 1 && call.kept_axes == 1 && call.inner.size <= 16 * L &&
           call.inner.stride[kGrad] == 1 && (!call.dscale || call.inner.stride[kX] == 1);
  }

  void each_row(int64_t begin, int64_t end, const Buffers& b) const {
    const Axis& axis = call.kept[0];
    const auto at = [&](const void* data, int operand, int64_t row) {
      return static_cast<const S*>(data) + row * axis.stride[operand];
    };
    const auto result = [&](void* data, int64_t row) -> S& { return static_cast<S*>(data)[row * axis.stride[kShift]]; };
    Acc *gates = b.product, *slopes = b.plain;
    for (int64_t first = begin; first < end; first += kModulateChunk) {
      const int64_t count = min(end - first, kModulateChunk), stride = axis.stride[kScale];
      if (call.dx) activate_run(call.activation, Acc(call.offset), at(call.scale, kScale, first), stride, count, gates);
      if (call.dscale) slopes_run(at(call.scale, kScale, first), stride, count, slopes);
      for (int64_t row = first; row < first + count; ++row) {
        if (call.dx) b.gate[0] = gates[row - first];
        b.products[0] = b.plains[0] = 0;
        S* dx = call.dx ? static_cast<S*>(call.dx) + row * axis.stride[kY] : nullptr;
        dispatch([&](auto flags) {
          sum_run<flags.dx, flags.product, flags.plain>(at(call.grad, kGrad, row), at(call.x, kX, row), dx,
                                                        call.inner.size, b);
        });
        if (call.dscale) from_acc(times_slope(slopes[row - first], b.products[0]), result(call.dscale, row));
        if (call.dshift) from_acc(Acc(b.plains[0]), result(call.dshift, row));
      }
    }
  }

  Acc times_slope(Acc slope, double sum) const {
    return selects(call.activation) && slope == 0 ? Acc(0) : Acc(double(slope) * sum);
  }

  // act'(scale) of a run.
  void slopes_run(const S* scale, int64_t stride, int64_t n, Acc* out) const {
    for_activation<VectorMath>(call.activation, [&](auto act) {
      map_run(scale, stride, n, out, [&](const Vec<Acc>& v) { return act.first(v); });
    });
  }

  double* partial(int64_t unit, int64_t split) const {
    return reinterpret_cast<double*>(execution.partials) + (unit * plan.splits + split) * 2 * unit_width();
  }
  int64_t unit_width() const { return call.inner_kept ? min(kModulateChunk, call.inner.size) : 1; }

  void keep_partial(int64_t unit, int64_t split, const Buffers& b) const {
    double* to = partial(unit, split);
    __builtin_memcpy(to, b.products, size_t(width(unit)) * sizeof(double));
    __builtin_memcpy(to + unit_width(), b.plains, size_t(width(unit)) * sizeof(double));
  }
  void add_partial(int64_t unit, int64_t split, const Buffers& b) const {
    const double* from = partial(unit, split);
    for (int64_t i = 0; i < width(unit); ++i) {
      b.products[i] += from[i];
      b.plains[i] += from[unit_width() + i];
    }
  }

  // The rows [begin, end) of a unit: places of the reduced axes, times chunks of the inner one where it is reduced.
  void accumulate(int64_t unit, int64_t begin, int64_t end, const Buffers& b) const {
    const int64_t group = unit / plan.chunks, first = call.inner_kept ? unit % plan.chunks * kModulateChunk : 0;
    const Walk kept(call.kept, call.kept_axes, group);
    const S* scale = static_cast<const S*>(call.scale) + kept.at(kScale) + first * call.inner.stride[kScale];
    if (call.dx) activate_run(call.activation, Acc(call.offset), scale, call.inner.stride[kScale], width(unit), b.gate);
    const int64_t pieces = call.inner_kept ? 1 : ceil_div(call.inner.size, kModulateChunk);
    Walk walk(call.reduced, call.reduced_axes, begin / pieces);
    const int64_t longest = plan.rows <= kFewRows ? kShortChain : kChain;
    int64_t chain = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t piece = row % pieces, at = call.inner_kept ? first : piece * kModulateChunk;
      const int64_t n = min(kModulateChunk, call.inner.size - at);
      const auto from = [&](const void* data, int operand, S* buffer) {
        const S* p =
            static_cast<const S*>(data) + kept.at(operand) + walk.at(operand) + at * call.inner.stride[operand];
        return contiguous_run(p, call.inner.stride[operand], n, buffer);
      };
      const S* grad = from(call.grad, kGrad, b.grad);
      const S* x = call.dscale ? from(call.x, kX, b.x) : nullptr;
      S* dx = call.dx ? static_cast<S*>(call.dx) + kept.at(kY) + walk.at(kY) + at : nullptr;
      if (call.inner_kept) {
        dispatch([&](auto flags) { columns<flags.dx, flags.product, flags.plain>(grad, x, dx, n, chain == 0, b); });
        if (sums() && (++chain == longest || row + 1 == end)) flush(n, b), chain = 0;
      } else {
        dispatch([&](auto flags) { sum_run<flags.dx, flags.product, flags.plain>(grad, x, dx, n, b); });
      }
      if (piece + 1 == pieces) walk.next();
    }
  }

  template <bool X, bool P, bool G>
  struct Flags {
    static constexpr bool dx = X, product = P, plain = G;
  };
  template <class F>
  MI_INLINE void dispatch(F&& f) const {
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

  // A sum for each element of the run.
  template <bool X, bool P, bool G>
  void columns(const S* grad, const S* x, S* dx, int64_t n, bool fresh, const Buffers& b) const {
    const auto step = [&](int64_t i, auto lanes) {
      const auto g = load_run<lanes>(grad + i);
      if constexpr (X) store_run<lanes>(dx + i, g * load_run<lanes>(b.gate + i));
      if constexpr (P) {
        auto product = g * load_run<lanes>(x + i);
        if (!fresh) product += load_run<lanes>(b.product + i);
        store_run<lanes>(b.product + i, product);
      }
      if constexpr (G) store_run<lanes>(b.plain + i, fresh ? g : g + load_run<lanes>(b.plain + i));
    };
    walk_run(n, step);
  }

  // One sum for the whole run, by four chains of lanes.
  template <bool X, bool P, bool G>
  void sum_run(const S* grad, const S* x, S* dx, int64_t n, const Buffers& b) const {
    using V = Vec<Acc>;
    const Acc gate = X ? b.gate[0] : Acc(0);
    V product[4] = {}, plain[4] = {};
    double last_product = 0, last_plain = 0;
    const auto step = [&](int64_t i, auto lanes) {
      const auto g = load_run<lanes>(grad + i);
      if constexpr (X) store_run<lanes>(dx + i, g * gate);
      if constexpr (lanes == 1) {
        if constexpr (P) last_product += double(g * to_acc(x[i]));
        if constexpr (G) last_plain += double(g);
      } else {
        const int64_t chain = i / L % 4;
        if constexpr (P) product[chain] += g * load_run<lanes>(x + i);
        if constexpr (G) plain[chain] += g;
      }
    };
    walk_run(n, step);
    if constexpr (P)
      b.products[0] += double(sum_lanes(V((product[0] + product[1]) + (product[2] + product[3])))) + last_product;
    if constexpr (G) b.plains[0] += double(sum_lanes(V((plain[0] + plain[1]) + (plain[2] + plain[3])))) + last_plain;
  }

  template <class F>
  static MI_INLINE void walk_run(int64_t n, F&& step) {
    int64_t i = 0;
    for (; i + L <= n; i += L) step(i, Index<L>{});
    for (; i < n; ++i) step(i, Index<1>{});
  }

  void flush(int64_t n, const Buffers& b) const {
    for (int64_t i = 0; call.dscale && i < n; ++i) b.products[i] += double(b.product[i]);
    for (int64_t i = 0; call.dshift && i < n; ++i) b.plains[i] += double(b.plain[i]);
  }

  // dscale = act'(scale) * sum and dshift of a unit.
  void finish(int64_t unit, const Buffers& b) const {
    const int64_t first = call.inner_kept ? unit % plan.chunks * kModulateChunk : 0, n = width(unit);
    const Walk kept(call.kept, call.kept_axes, unit / plan.chunks);
    const int64_t stride = call.inner.stride[kShift], offset = kept.at(kShift) + first * stride;
    if (call.dscale) {
      const S* scale = static_cast<const S*>(call.scale) + kept.at(kScale) + first * call.inner.stride[kScale];
      slopes_run(scale, call.inner.stride[kScale], n, b.gate);
      S* to = static_cast<S*>(call.dscale) + offset;
      for (int64_t i = 0; i < n; ++i) from_acc(times_slope(b.gate[i], b.products[i]), to[i * stride]);
    }
    if (call.dshift) {
      S* to = static_cast<S*>(call.dshift) + offset;
      for (int64_t i = 0; i < n; ++i) from_acc(Acc(b.plains[i]), to[i * stride]);
    }
  }
};

}  // namespace

void modulate_grads(DType dtype, const ModulateGradsCall& call, const ModulateGradsPlan& plan,
                    const Execution& execution) {
  for_dtype(dtype, [&](auto s) { ModulateGrads<decltype(s)>(call, plan, execution).run(); });
}

}  // namespace mi_kernels::MI_ISA
