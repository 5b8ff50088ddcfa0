// y for a few rows: the time is that of reading W. Lanes run along (i, j), so that W is read once, by whole
// vectors and in the order in which it lies, against products z_i x_j made for a stretch of it at a time.
#include "cpu/kernels/family.h"
#include "cpu/kernels/gate_epilogue.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class ForwardStream {
  using Elem = typename Mul::Elem;
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  static constexpr int L = Simd<Acc>::lanes;  // accumulators in a vector
  static constexpr int E = L * Mul::pair;     // elements along (i, j) in a vector
  static constexpr int64_t kSlack = 2 * L;    // what whole vectors may write beyond the end
  static constexpr int kTileOutputs = 4;

  const ForwardCall& call;
  const ForwardPlan& plan;
  const Execution& execution;
  const ProblemSize& p = call.problem;
  const int64_t products_stride = kStreamDepth + kSlack, x_stride = p.width + kSlack;

 public:
  ForwardStream(const ForwardCall& c, const ForwardPlan& f, const Execution& e) : call(c), plan(f), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t group = t / plan.out_blocks, o0 = t % plan.out_blocks * plan.out_step;
    const int64_t outputs = min(plan.out_step, p.out - o0), length = p.context * p.width;
    Arena arena{execution.scratch + worker * plan.worker_bytes};
    auto* products = arena.take<Elem>(p.rows * products_stride);
    auto* x = arena.take<Acc>(p.rows * x_stride);
    auto* sums = arena.take<Acc>(plan.out_step * p.rows * L);
    auto* tail = arena.take<S>(kTileOutputs * E);
    clear(sums, outputs * p.rows * L);
    clear(x, p.rows * x_stride);
    const auto x_view = rows_view<S>(call.x, group), z_view = rows_view<S>(call.z, group);
    for (int64_t b = 0; b < p.rows; ++b)
      for (int64_t j = 0; j < p.width; ++j) x[b * x_stride + j] = to_acc(x_view(b, j));

    const S* weight = static_cast<const S*>(call.weight.data) + group * call.weight.group + o0 * length;
    for (int64_t k0 = 0; k0 < length; k0 += kStreamDepth) {
      const int64_t depth = min(kStreamDepth, length - k0);
      for (int64_t b = 0; b < p.rows; ++b)
        make_products(z_view, b, x + b * x_stride, k0, depth, products + b * products_stride);
      add_stretch(weight + k0, length, outputs, depth, products, sums, tail);
    }
    if (call.weight_z.data) add_linear(call.weight_z, z_view, group, o0, outputs, p.context, products, sums, tail);
    if (call.weight_x.data) add_linear(call.weight_x, x_view, group, o0, outputs, p.width, products, sums, tail);
    write(group, o0, outputs, sums);
  }

  // products[k - k0] = z[b, i] x[b, j] for k = (i, j), zeros up to the end of the last vector. Each i writes
  // whole vectors; the next one overwrites what they hold beyond X.
  void make_products(const View<S>& z, int64_t b, const Acc* x, int64_t k0, int64_t depth, Elem* products) const {
    int64_t i = k0 / p.width, j = k0 - i * p.width;
    for (int64_t k = 0; k < depth; ++i, j = 0) {
      const Acc zi = to_acc(z(b, i));
      const int64_t count = min(p.width - j, depth - k);
      for (int64_t c = 0; c < count; c += L) store_acc<L>(products + k + c, zi * load_acc<L>(x + j + c));
      k += count;
    }
    for (int64_t k = depth; k % E != 0; ++k) products[k] = Elem{};
  }

  // sums[o, b] += rows of W (or of U, V) times products, a tile of outputs at a time.
  void add_stretch(const S* weight, int64_t stride, int64_t outputs, int64_t depth, const Elem* products, Acc* sums,
                   S* tail) const {
    for (int64_t o = 0; o < outputs; o += kTileOutputs) {
      const int64_t valid = min(outputs - o, kTileOutputs);
      for (int64_t b = 0; b < p.rows; b += 4) {
        const Elem* part = products + b * products_stride;
        Acc* to = sums + (o * p.rows + b) * L;
        const S* from = weight + o * stride;
        switch (min(p.rows - b, 4)) {
          case 1: dot_outputs<1>(from, stride, valid, depth, part, to, tail); break;
          case 2: dot_outputs<2>(from, stride, valid, depth, part, to, tail); break;
          case 3: dot_outputs<3>(from, stride, valid, depth, part, to, tail); break;
          default: dot_outputs<4>(from, stride, valid, depth, part, to, tail); break;
        }
      }
    }
  }

  template <int N>
  void dot_outputs(const S* weight, int64_t stride, int64_t outputs, int64_t depth, const Elem* products, Acc* sums,
                   S* tail) const {
    const int64_t whole = depth / E * E, rest = depth - whole;
    if (outputs == kTileOutputs) {
      dot<kTileOutputs, N>(weight, stride, whole, products, sums);
    } else {
      for (int64_t o = 0; o < outputs; ++o)
        dot<1, N>(weight + o * stride, stride, whole, products, sums + o * p.rows * L);
    }
    if (rest == 0) return;
    for (int64_t o = 0; o < outputs; ++o) {  // beyond the end lies another output, or nothing
      for (int64_t k = 0; k < E; ++k) tail[k] = k < rest ? weight[o * stride + whole + k] : S{};
      dot<1, N>(tail, 0, E, products + whole, sums + o * p.rows * L);
    }
  }

  template <int M, int N>
  __attribute__((noinline, flatten)) void dot(const S* weight, int64_t stride, int64_t depth, const Elem* products,
                                              Acc* sums) const {
    // Chains of limited length, added up in the stretch, and that added to the running sum, as in multiply().
    constexpr int64_t chain = Mul::chain == kUnbounded ? kStreamDepth : Mul::chain / 2 * E;
    Vec<Acc> acc[M][N], total[M][N]{};
    for (int64_t k0 = 0; k0 < depth; k0 += chain) {
      unroll<M>([&](auto m) { unroll<N>([&](auto n) { acc[m][n] = Vec<Acc>{}; }); });
      for (int64_t k = k0; k < min(k0 + chain, depth); k += E) {
        Vec<Word> b[N];
        unroll<N>([&](auto n) { b[n] = load<Vec<Word>>(products + n * products_stride + k); });
        unroll<M>([&](auto m) {
          const auto w = load_along<Mul>(weight + m * stride + k);
          unroll<N>([&](auto n) { Mul::fma(acc[m][n], w, b[n]); });
        });
      }
      unroll<M>([&](auto m) { unroll<N>([&](auto n) { total[m][n] += acc[m][n]; }); });
    }
    unroll<M>([&](auto m) {
      unroll<N>([&](auto n) {
        Acc* sum = sums + (m * p.rows + n) * L;
        store(sum, load<Vec<Acc>>(sum) + total[m][n]);
      });
    });
  }

  // U z or V x, stretches of the features in the place of the products.
  void add_linear(const TensorRef& matrix, const View<S>& features, int64_t group, int64_t o0, int64_t outputs,
                  int64_t length, Elem* buffer, Acc* sums, S* tail) const {
    const S* data = static_cast<const S*>(matrix.data) + group * matrix.group + o0 * matrix.row;
    for (int64_t k0 = 0; k0 < length; k0 += kStreamDepth) {
      const int64_t depth = min(kStreamDepth, length - k0);
      for (int64_t b = 0; b < p.rows; ++b) {
        Elem* row = buffer + b * products_stride;
        for (int64_t k = 0; k < depth; ++k) from_acc(to_acc(features(b, k0 + k)), row[k]);
        for (int64_t k = depth; k % E != 0; ++k) row[k] = Elem{};
      }
      if (matrix.col == 1) {
        add_stretch(data + k0, matrix.row, outputs, depth, buffer, sums, tail);
        continue;
      }
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t b = 0; b < p.rows; ++b)
          for (int64_t k = 0; k < depth; ++k)
            sums[(o * p.rows + b) * L + k % L] +=
                to_acc(data[o * matrix.row + (k0 + k) * matrix.col]) * to_acc(buffer[b * products_stride + k]);
    }
  }

  void write(int64_t group, int64_t o0, int64_t outputs, const Acc* sums) const {
    S* y = static_cast<S*>(call.y.data) + group * p.rows * p.out;
    const S* bias = static_cast<const S*>(call.bias.data) + group * call.bias.group;
    const auto write_each = [&](auto&& gate) {
      for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t b = 0; b < p.rows; ++b) {
          const Acc sum = sum_lanes(load<Vec<Acc>>(sums + (o * p.rows + b) * L));
          const Acc c = call.bias.data ? Acc(to_acc(bias[(o0 + o) * call.bias.row])) : Acc(0);
          from_acc(gate(sum + c, b, o0 + o), y[b * p.out + o0 + o]);
        }
      }
    };
    if (!call.gate.present) return write_each([](Acc sum, int64_t, int64_t) { return sum; });
    const auto x = rows_view<S>(call.x, group);
    bool finite = true;
    for_activation<VectorMath>(call.gate.activation, [&](auto act) {
      write_each([&](Acc sum, int64_t b, int64_t o) {
        finite &= sum - sum == 0;
        if (call.gate.kept.data) from_acc(sum, static_cast<S*>(call.gate.kept.data)[b * p.out + o]);
        return (act.value(Vec<Acc>{} + sum)[0] + Acc(call.gate.offset)) * to_acc(x(b, o));
      });
    });
    if (!finite) tell_not_finite(call.gate);
  }
};

}  // namespace

void forward_stream(DType dtype, const ForwardCall& call, const ForwardPlan& plan, const Execution& execution) {
  run_family<ForwardStream>(dtype, call, plan, execution);
}

}  // namespace mi_kernels::MI_ISA
