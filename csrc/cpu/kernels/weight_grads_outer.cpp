// dW, dU, dV and dc for a few rows, which are bound by writing dW: each of its rows (o, i) is a sum of a few rows x
// times factors g z, and goes straight to the result. Nothing is packed, and a task may have rows of many groups.
#include "cpu/engine/epilogues.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class WeightGradsOuter {
  using SumMul = typename SumMulOf<S>::type;

  const WeightGradsCall& call;
  const WeightGradsPlan& plan;
  const Executor& executor;
  const ProblemSize& p = call.problem;

 public:
  WeightGradsOuter(const WeightGradsCall& c, const WeightGradsPlan& w, const Executor& e)
      : call(c), plan(w), executor(e) {}

  void run() {
    const bool swapped = plan.context_lanes;
    const int64_t width = swapped ? p.context : p.width;
    if (call.weight.data)
      region(plan.weight, swapped ? &call.x : &call.z, swapped ? call.z : call.x, width, call.weight);
    if (call.weight_z.data) region(plan.weight_z, nullptr, call.z, p.context, call.weight_z);
    if (call.weight_x.data) region(plan.weight_x, nullptr, call.x, p.width, call.weight_x);
    if (call.bias.data) bias();
  }

 private:
  void region(const RegionPlan& r, const TensorRef* factor, const TensorRef& lanes, int64_t width,
              const OutputRef& result) const {
    const auto rows = [&](auto acc) {
      run_tasks(executor, r.tasks,
                [&](int64_t t, int64_t worker) { task<decltype(acc)>(r, t, worker, factor, lanes, width, result); });
    };
    r.wide ? rows(typename SumMul::Acc{}) : rows(typename Mul::Acc{});
  }

  // Rows of the result from t * row_step on, numbered (group, o, f).
  template <class Acc>
  void task(const RegionPlan& r, int64_t t, int64_t worker, const TensorRef* factor, const TensorRef& lanes,
            int64_t width, const OutputRef& result) const {
    constexpr int L = Simd<Acc>::lanes;
    const int64_t end = min((t + 1) * r.row_step, p.groups * p.out * r.extent);
    const int64_t x_stride = width + L, f_stride = r.extent + L;
    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    Acc* x = scratch.allocate<Acc>(p.rows * x_stride);
    Acc* factors = scratch.allocate<Acc>(p.rows * f_stride);
    clear(x, p.rows * x_stride);
    int64_t copied = -1;
    for (int64_t row = t * r.row_step, count; row < end; row += count) {
      const int64_t f0 = row % r.extent, output = row / r.extent, group = output / p.out, o = output - group * p.out;
      count = min(r.extent - f0, end - row);
      if (group != copied) copy_rows(batch_view<S>(lanes, group), width, x, x_stride);
      copied = group;
      for (int64_t b = 0; b < p.rows; ++b) {
        const Acc g = to_acc(batch_view<S>(call.grad, group)(b, o));
        Acc* to = factors + b * f_stride;
        if (!factor) {
          to[0] = g;
          continue;
        }
        const auto values = batch_view<S>(*factor, group).at(b, f0);
        for (int64_t f = 0; f < count; ++f) to[f] = g * Acc(to_acc(values(0, f)));
      }
      S* out = static_cast<S*>(result.data) + row * width;
      switch (p.rows) {
        case 1: write<1>(factors, f_stride, x, x_stride, count, width, out); break;
        case 2: write<2>(factors, f_stride, x, x_stride, count, width, out); break;
        case 3: write<3>(factors, f_stride, x, x_stride, count, width, out); break;
        default: write<kOuterRows>(factors, f_stride, x, x_stride, count, width, out); break;
      }
    }
  }

  template <class Acc>
  void copy_rows(const View<S>& from, int64_t width, Acc* x, int64_t stride) const {
    for (int64_t b = 0; b < p.rows; ++b)
      for (int64_t j = 0; j < width; ++j) x[b * stride + j] = to_acc(from(b, j));
  }

  // out[f, j] = sum_b factors[b, f] x[b, j]. The last vector of a row overlaps the one before. Where a row is shorter
  // than a vector, the following rows overwrite what lies beyond it; the last ones are written by element.
  template <int R, class Acc>
  __attribute__((noinline, flatten)) static void write(const Acc* factors, int64_t f_stride, const Acc* x,
                                                       int64_t x_stride, int64_t count, int64_t width, S* out) {
    constexpr int L = Simd<Acc>::lanes;
    using V = Vec<Acc>;
    const auto at = [&](int64_t f, int64_t j) {
      V sum = (V{} + factors[f]) * load<V>(x + j);
      unroll<R - 1>([&](auto b) MI_INLINED {
        sum += (V{} + factors[(b + 1) * f_stride + f]) * load<V>(x + (b + 1) * x_stride + j);
      });
      return sum;
    };
    const int64_t vectors = width / L * L, last = max(width - L, 0);
    const int64_t whole = width >= L ? count : max(count - (L - 1) / width, 0);
    for (int64_t f = 0; f < whole; ++f) {
      for (int64_t j = 0; j < vectors; j += L) store_acc<L>(out + f * width + j, at(f, j));
      if (vectors < width) store_acc<L>(out + f * width + last, at(f, last));
    }
    for (int64_t f = whole; f < count; ++f) store_lanes<Acc>(out + f * width, 1, width, at(f, 0));
  }

  void bias() const {
    using Sum = typename SumMul::Acc;
    S* out = static_cast<S*>(call.bias.data);
    run_tasks(executor, plan.bias.tasks, [&](int64_t t, int64_t) {
      for (int64_t group = t * plan.bias.row_step; group < min((t + 1) * plan.bias.row_step, p.groups); ++group) {
        const auto grad = batch_view<S>(call.grad, group);
        for (int64_t o = 0; o < p.out; ++o) {
          Sum sum = 0;
          for (int64_t b = 0; b < p.rows; ++b) sum += to_acc(grad(b, o));
          from_acc(sum, out[group * p.out + o]);
        }
      }
    });
  }
};

}  // namespace

void weight_grads_outer(DType dtype, const WeightGradsCall& call, const WeightGradsPlan& plan,
                        const Executor& executor) {
  run_family<WeightGradsOuter>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
