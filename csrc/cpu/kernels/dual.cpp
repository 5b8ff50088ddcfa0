// The product of two linear forms that are in memory, y = f(p) h(q) summed over ranks, and its gradients.
#include "cpu/kernels/modulate_runs.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class S>
class Dual {
  using Acc = decltype(to_acc(S{}));
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;

  const DualCall& call;
  const DualEpilogue& dual = call.dual;

  // Whole vectors, as a run may end within one.
  using Run = Acc[kModulateChunk + L];

 public:
  explicit Dual(const DualCall& c) : call(c) {}

  void run(const Executor& executor) {
    // Short rows of one rank are whole runs of several; gradients, whose rows are apart, are copied for it.
    if (dual.ranks == 1 && call.out < (call.grad.data ? 64 : kModulateChunk / 2)) {
      const int64_t rows = max(kModulateChunk / max(call.out, 1), 1),
                    step = max(kModulateTask / kModulateChunk, 1) * rows;
      return run_tasks(executor, ceil_div(call.rows, step), [&](int64_t t, int64_t) {
        const int64_t end = min((t + 1) * step, call.rows);
        for (int64_t row = t * step; row < end; row += rows) {
          const int64_t count = min(rows, end - row);
          call.grad.data ? grads_of_rows(row, count) : forward(row, 0, count * call.out);
        }
      });
    }
    const int64_t step = max(kModulateTask / max(call.out * dual.ranks, 1), 1);
    run_tasks(executor, ceil_div(call.rows, step), [&](int64_t t, int64_t) {
      const int64_t end = min((t + 1) * step, call.rows);
      for (int64_t row = t * step; row < end; ++row)
        for (int64_t first = 0; first < call.out; first += kModulateChunk) {
          const int64_t n = min(kModulateChunk, call.out - first);
          call.grad.data ? grads(row, first, n) : forward(row, first, n);
        }
    });
  }

 private:
  const S* operand(const OutputRef& from, int64_t row, int64_t rank, int64_t first) const {
    return static_cast<const S*>(from.data) + (row * dual.ranks + rank) * call.out + first;
  }

  void forward(int64_t row, int64_t first, int64_t n) const {
    alignas(64) Run sum, f, h;
    for (int64_t r = 0; r < dual.ranks; ++r) {
      activate_run({dual.activation_p}, operand(dual.p, row, r, first), 1, n, f);
      activate_run({dual.activation_q}, operand(dual.q, row, r, first), 1, n, h);
      for (int64_t i = 0; i < n; i += L) {
        const V product = load<V>(f + i) * load<V>(h + i);
        store(sum + i, r == 0 ? product : load<V>(sum + i) + product);
      }
    }
    store_run(sum, n, static_cast<S*>(call.result.data) + row * call.out + first);
  }

  void grads(int64_t row, int64_t first, int64_t n) const {
    alignas(64) S gathered[kModulateChunk];
    const S* grad = static_cast<const S*>(call.grad.data) + row * call.grad.row + first * call.grad.col;
    grad = contiguous_run(grad, call.grad.col, n, gathered);
    const int64_t features = dual.ranks * call.out;
    S* dp = static_cast<S*>(call.result.data) + row * 2 * features + first;
    for (int64_t r = 0; r < dual.ranks; ++r, dp += call.out) {
      const S *p = operand(dual.p, row, r, first), *q = operand(dual.q, row, r, first);
      grads_of_run(grad, p, q, n, dp, dp + features);
    }
  }

  void grads_of_run(const S* grad, const S* p, const S* q, int64_t n, S* dp, S* dq) const {
    if (dual.activation_q == Activation::identity)
      grads_of_gate(dual.activation_p, grad, p, q, n, dp, dq);
    else if (dual.activation_p == Activation::identity)
      grads_of_gate(dual.activation_q, grad, q, p, n, dq, dp);
    else
      grads_of_both(grad, p, q, n, dp, dq);
  }

  void grads_of_rows(int64_t row, int64_t rows) const {
    alignas(64) S grad[kModulateChunk], dp[kModulateChunk], dq[kModulateChunk];
    const int64_t out = call.out;
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = static_cast<const S*>(call.grad.data) + (row + r) * call.grad.row;
      for (int64_t o = 0; o < out; ++o) grad[r * out + o] = from[o * call.grad.col];
    }
    grads_of_run(grad, operand(dual.p, row, 0, 0), operand(dual.q, row, 0, 0), rows * out, dp, dq);
    S* to = static_cast<S*>(call.result.data) + row * 2 * out;
    for (int64_t r = 0; r < rows; ++r, to += 2 * out) {
      __builtin_memcpy(to, dp + r * out, size_t(out) * sizeof(S));
      __builtin_memcpy(to + out, dq + r * out, size_t(out) * sizeof(S));
    }
  }

  // Of f(gate) * value: in registers, as this pass is bound by memory.
  static void grads_of_gate(Activation activation, const S* grad, const S* gate, const S* value, int64_t n, S* dgate,
                            S* dvalue) {
    for_activation<VectorMath>(activation, [&](auto act) {
      const auto step = [&](const S* grads, const S* gates, const S* values, S* to_gate, S* to_value) {
        const V g = load_acc<L>(grads), t = load_acc<L>(gates);
        store_acc<L>(to_gate, times_slope(activation, act.derivative(t), V(g * load_acc<L>(values))));
        store_acc<L>(to_value, V(g * act.value(t)));
      };
      int64_t i = 0;
      for (; i + L <= n; i += L) step(grad + i, gate + i, value + i, dgate + i, dvalue + i);
      if (i == n) return;
      S rest[5][L] = {};  // a whole vector, so that the result for an element does not depend on its position
      const size_t bytes = size_t(n - i) * sizeof(S);
      __builtin_memcpy(rest[0], grad + i, bytes);
      __builtin_memcpy(rest[1], gate + i, bytes);
      __builtin_memcpy(rest[2], value + i, bytes);
      step(rest[0], rest[1], rest[2], rest[3], rest[4]);
      __builtin_memcpy(dgate + i, rest[3], bytes);
      __builtin_memcpy(dvalue + i, rest[4], bytes);
    });
  }

  void grads_of_both(const S* grad, const S* p, const S* q, int64_t n, S* dp, S* dq) const {
    alignas(64) Run grads, f, h, f_slope, h_slope;
    map_run(grad, 1, n, grads, [](const V& v) { return v; });
    values_and_slopes(dual.activation_p, p, n, f, f_slope);
    values_and_slopes(dual.activation_q, q, n, h, h_slope);
    for (int64_t i = 0; i < n; i += L) {
      const V g = load<V>(grads + i), of_f = g * load<V>(h + i), of_h = g * load<V>(f + i);
      store(f + i, times_slope(dual.activation_p, load<V>(f_slope + i), of_f));
      store(h + i, times_slope(dual.activation_q, load<V>(h_slope + i), of_h));
    }
    store_run(f, n, dp);
    store_run(h, n, dq);
  }

  static V times_slope(Activation activation, const V& slope, const V& direction) {
    const V product = slope * direction;
    return backward_selects(activation) ? V(slope == Acc(0) ? V{} : product) : product;
  }

  static void values_and_slopes(Activation activation, const S* p, int64_t n, Acc* values, Acc* slopes) {
    for_activation<VectorMath>(activation, [&](auto act) {
      for (int64_t i = 0; i < n; i += L) {
        V v{};
        if (i + L <= n)
          v = load_acc<L>(p + i);
        else
          for (int64_t l = 0; l < n - i; ++l) v[l] = to_acc(p[i + l]);
        store(values + i, act.value(v));
        store(slopes + i, act.derivative(v));
      }
    });
  }

  static void store_run(const Acc* from, int64_t n, S* to) {
    int64_t i = 0;
    for (; i + L <= n; i += L) store_acc<L>(to + i, load<V>(from + i));
    if (i == n) return;
    S rest[L];
    store_acc<L>(rest, load<V>(from + i));
    __builtin_memcpy(to + i, rest, size_t(n - i) * sizeof(S));
  }
};

}  // namespace

void dual(DType dtype, const DualCall& call, const Executor& executor) {
  for_dtype(dtype, [&](auto s) { Dual<decltype(s)>(call).run(executor); });
}

}  // namespace mi_kernels::MI_ISA
