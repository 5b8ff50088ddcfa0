// y for a few rows, which is bound by reading W. Lanes run along (i, j), or along j where rows of W are apart, so that
// W is read once, in whole vectors and in memory order, and multiplied by products z_i x_j, which are generated for one
// chunk of (i, j) at a time.
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
  static constexpr int64_t kSlack = 2 * L;    // elements that whole vectors may write beyond the end
  static constexpr int kTileOutputs = 4;
  // A single row whose x has at most this many vectors: z W[o] is summed in registers, and then multiplied by x.
  static constexpr int kRowVectors = 8;

  const ForwardCall& call;
  const ForwardPlan& plan;
  const Executor& executor;
  const ProblemSize& p = call.problem;
  const int64_t products_stride = kStreamDepth + kSlack, x_stride = p.width + kSlack;
  // The end of W: whole vectors may be read up to it.
  const WeightRef& w = call.weight;
  const S* const weight_end = static_cast<const S*>(w.data) + (p.groups - 1) * w.group + (p.out - 1) * w.out +
                              (p.context - 1) * w.context + (p.width - 1) * w.width + 1;

  // A matrix [outputs][elements along K], from the first output of a task on.
  struct Rows {
    const S* data;
    int64_t stride;
    const S* end;
  };

 public:
  ForwardStream(const ForwardCall& c, const ForwardPlan& f, const Executor& e) : call(c), plan(f), executor(e) {}

  void run() {
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t g0 = t / plan.out_blocks * plan.group_step, o0 = t % plan.out_blocks * plan.out_step;
    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    auto* products = scratch.allocate<Elem>(p.rows * products_stride);
    auto* x = scratch.allocate<Acc>(p.rows * x_stride);
    auto* sums = scratch.allocate<Acc>(plan.out_step * p.rows * L);
    auto* tail = scratch.allocate<S>(kTileOutputs * E);
    clear(x, p.rows * x_stride);
    for (int64_t group = g0; group < min(g0 + plan.group_step, p.groups); ++group)
      sum_group(group, o0, products, x, sums, tail);
  }

  void sum_group(int64_t group, int64_t o0, Elem* products, Acc* x, Acc* sums, S* tail) const {
    const int64_t outputs = min(plan.out_step, p.out - o0), length = p.context * p.width;
    clear(sums, outputs * p.rows * L);
    const auto x_view = batch_view<S>(call.x, group), z_view = batch_view<S>(call.z, group);
    for (int64_t b = 0; b < p.rows; ++b)
      for (int64_t j = 0; j < p.width; ++j) x[b * x_stride + j] = to_acc(x_view(b, j));

    const S* weight = static_cast<const S*>(w.data) + group * w.group + o0 * w.out;
    const bool by_rows = Mul::pair == 1 && p.rows == 1 && p.width >= L && p.width <= kRowVectors * L;
    if (by_rows) add_row_sums(z_view, weight, outputs, x, sums);
    for (int64_t k0 = 0, depth; k0 < length && !by_rows; k0 += depth) {
      const int64_t i = k0 / p.width, j = k0 - i * p.width;
      depth = min(kStreamDepth, plan.layout.flat ? length - k0 : p.width - j);
      for (int64_t b = 0; b < p.rows; ++b)
        generate_products(z_view, b, x + b * x_stride, k0, depth, products + b * products_stride);
      add_chunk({weight + i * w.context + j, w.out, weight_end}, outputs, depth, products, sums, tail);
    }
    if (call.weight_z.data) add_linear(call.weight_z, z_view, group, o0, outputs, p.context, products, sums, tail);
    if (call.weight_x.data) add_linear(call.weight_x, x_view, group, o0, outputs, p.width, products, sums, tail);
    write(group, o0, outputs, sums);
  }

  // products[k - k0] = z[b, i] x[b, j] for k = (i, j), then zeros to the end of the last vector. Each i writes whole
  // vectors; the next i overwrites the elements beyond X.
  void generate_products(const View<S>& z, int64_t b, const Acc* x, int64_t k0, int64_t depth, Elem* products) const {
    int64_t i = k0 / p.width, j = k0 - i * p.width;
    for (int64_t k = 0; k < depth; ++i, j = 0) {
      const Acc zi = to_acc(z(b, i));
      const int64_t count = min(p.width - j, depth - k);
      for (int64_t c = 0; c < count; c += L) store_acc<L>(products + k + c, zi * load_acc<L>(x + j + c));
      k += count;
    }
    for (int64_t k = depth; k % E != 0; ++k) products[k] = Elem{};
  }

  // sums[o, b] += rows of W (or of U, V) times the products, one tile of outputs at a time.
  void add_chunk(const Rows& weight, int64_t outputs, int64_t depth, const Elem* products, Acc* sums, S* tail) const {
    for (int64_t o = 0; o < outputs; o += kTileOutputs) {
      const int64_t valid = min(outputs - o, kTileOutputs);
      for (int64_t b = 0; b < p.rows; b += 4) {
        const Elem* part = products + b * products_stride;
        Acc* to = sums + (o * p.rows + b) * L;
        const Rows from{weight.data + o * weight.stride, weight.stride, weight.end};
        switch (min(p.rows - b, 4)) {
          case 1: dot_outputs<1>(from, valid, depth, part, to, tail); break;
          case 2: dot_outputs<2>(from, valid, depth, part, to, tail); break;
          case 3: dot_outputs<3>(from, valid, depth, part, to, tail); break;
          default: dot_outputs<4>(from, valid, depth, part, to, tail); break;
        }
      }
    }
  }

  template <int N>
  void dot_outputs(const Rows& weight, int64_t outputs, int64_t depth, const Elem* products, Acc* sums, S* tail) const {
    const int64_t whole = depth / E * E, rest = depth - whole;
    // Beyond the end of a row is another one, or unmapped memory.
    const bool readable = weight.data + (outputs - 1) * weight.stride + whole + E <= weight.end;
    const int64_t in_place = readable ? rest : 0;
    if (outputs == kTileOutputs) {
      dot<kTileOutputs, N>(weight.data, weight.stride, whole, in_place, products, sums);
    } else {
      for (int64_t o = 0; o < outputs; ++o)
        dot<1, N>(weight.data + o * weight.stride, 0, whole, in_place, products, sums + o * p.rows * L);
    }
    if (rest == in_place) return;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t k = 0; k < E; ++k) tail[k] = k < rest ? weight.data[o * weight.stride + whole + k] : S{};
      dot<1, N>(tail, 0, E, 0, products + whole, sums + o * p.rows * L);
    }
  }

  // `depth`: whole vectors; `rest`: elements of one more, of which a whole vector can be read.
  template <int M, int N>
  __attribute__((noinline, flatten)) void dot(const S* weight, int64_t stride, int64_t depth, int64_t rest,
                                              const Elem* products, Acc* sums) const {
    // Summation blocks, as in multiply(): their sums are added up for the chunk, and that sum to the running one.
    constexpr int64_t sum_block = Mul::sum_block == kUnbounded ? kStreamDepth : Mul::sum_block / 2 * E;
    Vec<Acc> acc[M][N], total[M][N]{};
    for (int64_t k0 = 0; k0 < depth; k0 += sum_block) {
      unroll<M>([&](auto m) MI_INLINED { unroll<N>([&](auto n) MI_INLINED { acc[m][n] = Vec<Acc>{}; }); });
      for (int64_t k = k0; k < min(k0 + sum_block, depth); k += E) {
        Vec<Word> b[N];
        unroll<N>([&](auto n) MI_INLINED { b[n] = load<Vec<Word>>(products + n * products_stride + k); });
        unroll<M>([&](auto m) MI_INLINED {
          const auto w = load_words_k<Mul>(weight + m * stride + k);
          unroll<N>([&](auto n) MI_INLINED { Mul::fma(acc[m][n], w, b[n]); });
        });
      }
      unroll<M>([&](auto m) MI_INLINED { unroll<N>([&](auto n) MI_INLINED { total[m][n] += acc[m][n]; }); });
    }
    if (rest > 0) {
      unroll<M>([&](auto m) MI_INLINED {
        const auto last = first_words_k<Mul>(weight + m * stride + depth, rest);
        unroll<N>([&](auto n) MI_INLINED {
          Mul::fma(total[m][n], last, load<Vec<Word>>(products + n * products_stride + depth));
        });
      });
    }
    unroll<M>([&](auto m) MI_INLINED {
      unroll<N>([&](auto n) MI_INLINED {
        Acc* sum = sums + (m * p.rows + n) * L;
        store(sum, load<Vec<Acc>>(sum) + total[m][n]);
      });
    });
  }

  void add_row_sums(const View<S>& z, const S* weight, int64_t outputs, const Acc* x, Acc* sums) const {
    const int64_t vectors = ceil_div(p.width, L);
    unroll<kRowVectors>([&](auto n) MI_INLINED {
      if (vectors == n + 1)
        for (int64_t o = 0; o < outputs; ++o) add_row_sum<n + 1>(z, weight + o * w.out, x, sums + o * L);
    });
  }

  // The last vector ends with the row: lanes that the one before has, too, count as zero.
  template <int N>
  __attribute__((noinline, flatten)) void add_row_sum(const View<S>& z, const S* weight, const Acc* x, Acc* sum) const {
    constexpr int64_t kRows = 32;  // i of one summation block
    const int64_t last = p.width - L, stride = w.context;
    Vec<Acc> total[N]{};
    for (int64_t begin = 0; begin < p.context; begin += kRows) {
      Vec<Acc> acc[N]{};
      for (int64_t i = begin; i < min(begin + kRows, p.context); ++i) {
        const S* row = weight + i * stride;
        const Acc zi = to_acc(z(0, i));
        unroll<N>([&](auto n) MI_INLINED { acc[n] += zi * load_acc<L>(row + (n + 1 == N ? last : n * L)); });
      }
      unroll<N>([&](auto n) MI_INLINED { total[n] += acc[n]; });
    }
    Vec<Acc> result = load<Vec<Acc>>(sum);
    unroll<N - 1>([&](auto n) MI_INLINED { result += total[n] * load<Vec<Acc>>(x + n * L); });
    for (int64_t l = N * L - p.width; l < L; ++l) result[l] += total[N - 1][l] * x[last + l];
    store(sum, result);
  }

  // U z or V x, with chunks of the features instead of products.
  void add_linear(const TensorRef& matrix, const View<S>& features, int64_t group, int64_t o0, int64_t outputs,
                  int64_t length, Elem* buffer, Acc* sums, S* tail) const {
    const S* data = static_cast<const S*>(matrix.data) + group * matrix.group + o0 * matrix.row;
    const S* end = data + (outputs - 1) * matrix.row + length;
    for (int64_t k0 = 0; k0 < length; k0 += kStreamDepth) {
      const int64_t depth = min(kStreamDepth, length - k0);
      for (int64_t b = 0; b < p.rows; ++b) {
        Elem* row = buffer + b * products_stride;
        for (int64_t k = 0; k < depth; ++k) from_acc(to_acc(features(b, k0 + k)), row[k]);
        for (int64_t k = depth; k % E != 0; ++k) row[k] = Elem{};
      }
      if (matrix.col == 1) {
        add_chunk({data + k0, matrix.row, end}, outputs, depth, buffer, sums, tail);
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
    const auto write_each = [&](auto&& epilogue) {
      for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t b = 0; b < p.rows; ++b) {
          const Acc sum = sum_lanes(load<Vec<Acc>>(sums + (o * p.rows + b) * L));
          const Acc bias_value = call.bias.data ? Acc(to_acc(bias[(o0 + o) * call.bias.row])) : Acc(0);
          from_acc(epilogue(sum + bias_value, b, o0 + o), y[b * p.out + o0 + o]);
        }
      }
    };
    if (!call.gate.present) return write_each([](Acc sum, int64_t, int64_t) { return sum; });
    const auto x = batch_view<S>(call.gate.x, group);
    bool finite = true;
    for_activation<VectorMath>(call.gate.activation, [&](auto act) {
      write_each([&](Acc sum, int64_t b, int64_t o) {
        finite &= sum - sum == 0;
        if (call.gate.pre_activation.data) from_acc(sum, static_cast<S*>(call.gate.pre_activation.data)[b * p.out + o]);
        return (act.value(Vec<Acc>{} + sum)[0] + Acc(call.gate.offset)) * to_acc(x(b, o));
      });
    });
    if (!finite) flag_not_finite(call.gate);
  }
};

}  // namespace

void forward_stream(DType dtype, const ForwardCall& call, const ForwardPlan& plan, const Executor& executor) {
  run_family<ForwardStream>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
