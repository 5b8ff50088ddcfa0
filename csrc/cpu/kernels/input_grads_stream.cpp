// dx and dz for a few rows: the time is that of reading W. T(i, j) = sum_o g[o] W[o, i, j] is made for a
// stretch of (i, j) at a time, which stays in the cache while W is read once, by whole vectors and in runs as
// long as the stretch. Lanes run along (i, j).
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class InputGradsStream {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;
  static constexpr int64_t kSlack = 2 * L;  // what whole vectors may write beyond the end
  // A tile of words of g in registers; with 16 of those it has half the rows.
  static constexpr int kTileWords = 4, kTileOutputs = kTileWords * Mul::pair, kTileRows = kRows / 2;

  const InputGradsCall& call;
  const InputGradsPlan& plan;
  const Execution& execution;
  const ProblemSize& p = call.problem;
  const bool want_x = call.dx.data != nullptr, want_z = call.dz.data != nullptr;
  const InputPartials<Acc> partials{call, plan, execution};
  const int64_t t_stride = kStreamDepth + kSlack, x_stride = p.width + kSlack;

  struct Scratch {
    Acc *t, *x, *dx, *dx_chain, *dz;
    Word* g;          // [row][word], zero beyond the outputs
    S *zeros, *tail;  // in the place of outputs that are not there, and of the end of a stretch
  };

 public:
  InputGradsStream(const InputGradsCall& c, const InputGradsPlan& d, const Execution& e)
      : call(c), plan(d), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    partials.template sum<S>();
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t group = t / plan.splits, split = t % plan.splits, context_parts = plan.splits / plan.z_splits;
    const int64_t out_split = split / context_parts, part = split % context_parts;
    const int64_t i0 = part * plan.context_step, extent = min(plan.context_step, p.context - i0);
    const int64_t o_begin = out_split * plan.out_step, o_end = min(o_begin + plan.out_step, p.out);

    Arena arena{execution.scratch + worker * plan.worker_bytes};
    Scratch s;
    s.t = arena.take<Acc>(p.rows * t_stride);
    s.x = arena.take<Acc>(p.rows * x_stride);
    s.dx = arena.take<Acc>(p.rows * x_stride);
    s.dx_chain = arena.take<Acc>(p.rows * x_stride);
    s.dz = arena.take<Acc>(p.rows * plan.context_step);
    s.g = arena.take<Word>(p.rows * kStreamOutputs / Mul::pair);
    s.zeros = arena.take<S>(t_stride);
    s.tail = arena.take<S>(kTileOutputs * L);
    clear(s.zeros, t_stride);
    clear(s.dx, p.rows * x_stride);
    clear(s.dx_chain, p.rows * x_stride);
    clear(s.dz, p.rows * plan.context_step);
    clear(s.x, p.rows * x_stride);
    const auto x_view = rows_view<S>(call.x, group), z_view = rows_view<S>(call.z, group);
    const auto g_view = rows_view<S>(call.grad, group);
    for (int64_t b = 0; b < p.rows; ++b)
      for (int64_t j = 0; j < p.width; ++j) s.x[b * x_stride + j] = to_acc(x_view(b, j));

    const int64_t length = p.context * p.width;
    const S* weight = static_cast<const S*>(call.weight.data) + group * call.weight.group + i0 * p.width;
    for (int64_t o = o_begin; o < o_end; o += kStreamOutputs) {
      const int64_t outputs = min(o_end - o, kStreamOutputs);
      for (int64_t b = 0; b < p.rows; ++b)
        for (int64_t w = 0; w < kStreamOutputs / Mul::pair; ++w)
          s.g[b * kStreamOutputs / Mul::pair + w] =
              w * Mul::pair < outputs ? word_at<Mul>(g_view.at(0, o), b, w, outputs) : Word{};
      const int64_t stretch = min(kStreamDepth, kStreamContext * p.width);
      for (int64_t k0 = 0, flushed = 0; k0 < extent * p.width; k0 += stretch) {
        const int64_t depth = min(stretch, extent * p.width - k0), end = k0 + depth;
        make_t(weight + o * length + k0, length, outputs, depth, s);
        for (int64_t b = 0; b < p.rows; ++b) reduce(z_view.at(0, i0), b, k0, depth, s);
        if (end - flushed < kStreamContext * p.width && end < extent * p.width) continue;
        for (int64_t e = 0; e < p.rows * x_stride; ++e) s.dx[e] += s.dx_chain[e];
        clear(s.dx_chain, p.rows * x_stride);
        flushed = end;
      }
      if (want_z && call.weight_z.data)
        linear(call.weight_z, group, o, outputs, i0, extent, s.dz, plan.context_step, s);
      if (want_x && call.weight_x.data && part == 0)
        linear(call.weight_x, group, o, outputs, 0, p.width, s.dx, x_stride, s);
    }
    write(s.dx, x_stride, p.width, group, 0, p.width, call.dx, plan.x_splits, partials.x(split));
    write(s.dz, plan.context_step, extent, group, i0, p.context, call.dz, plan.z_splits, partials.z(out_split));
  }

  // t[b, k] = sum_o g[b, o] * from[o * stride + k], a tile of outputs and rows at a time.
  void make_t(const S* from, int64_t stride, int64_t outputs, int64_t depth, const Scratch& s) const {
    const int64_t whole = depth / L * L, rest = depth - whole;
    for (int64_t b = 0; b < p.rows; ++b) clear(s.t + b * t_stride, whole + L);
    for (int64_t o = 0; o < outputs; o += kTileOutputs) {
      const S *rows[kTileOutputs], *ends[kTileOutputs];
      for (int m = 0; m < kTileOutputs; ++m) {
        const bool valid = o + m < outputs;
        rows[m] = valid ? from + (o + m) * stride : s.zeros;
        ends[m] = s.tail + m * L;
        for (int64_t k = 0; rest > 0 && k < L; ++k) s.tail[m * L + k] = valid && k < rest ? rows[m][whole + k] : S{};
      }
      const Word* g = s.g + o / Mul::pair;
      add_tile(rows, whole, g, s.t);
      if (rest > 0) add_tile(ends, L, g, s.t + whole);
    }
  }

  void add_tile(const S* const (&rows)[kTileOutputs], int64_t depth, const Word* g, Acc* t) const {
    for (int64_t b = 0; b < p.rows; b += kTileRows) {
      const Word* gb = g + b * kStreamOutputs / Mul::pair;
      Acc* tb = t + b * t_stride;
      switch (min(p.rows - b, kTileRows)) {
        case 1: add_rows<1>(rows, depth, gb, tb); break;
        case 2: add_rows<min(2, kTileRows)>(rows, depth, gb, tb); break;
        case 3: add_rows<min(3, kTileRows)>(rows, depth, gb, tb); break;
        default: add_rows<kTileRows>(rows, depth, gb, tb); break;
      }
    }
  }

  template <int N>
  __attribute__((noinline, flatten)) void add_rows(const S* const (&rows)[kTileOutputs], int64_t depth, const Word* g,
                                                   Acc* t) const {
    Vec<Word> factors[N][kTileWords];
    unroll<N>([&](auto n) {
      unroll<kTileWords>([&](auto m) { factors[n][m] = Vec<Word>{} + g[n * kStreamOutputs / Mul::pair + m]; });
    });
    const int64_t stride = t_stride;
    for (int64_t k = 0; k < depth; k += L) {
      Vec<Word> w[kTileWords];
      unroll<kTileWords>([&](auto m) {
        w[m] = load_across<Mul, L>(rows[m * Mul::pair] + k, rows[m * Mul::pair + Mul::pair - 1] + k);
      });
      unroll<N>([&](auto n) {
        V sum = load<V>(t + n * stride + k);
        unroll<kTileWords>([&](auto m) { Mul::fma(sum, factors[n][m], w[m]); });
        store(t + n * stride + k, sum);
      });
    }
  }

  // dx[j] += z[i] t(i, j) and dz[i] += x[j] t(i, j) over the stretch. Whole vectors reach beyond the end of
  // a row i of t: what they hold there counts as zero.
  void reduce(const View<S>& z, int64_t b, int64_t k0, int64_t depth, const Scratch& s) const {
    const Acc *t = s.t + b * t_stride, *x = s.x + b * x_stride;
    Acc *dx = s.dx_chain + b * x_stride, *dz = s.dz + b * plan.context_step;
    int64_t i = k0 / p.width, j = k0 - i * p.width;
    for (int64_t k = 0; k < depth; ++i, j = 0) {
      const int64_t count = min(p.width - j, depth - k);
      const Acc zi = to_acc(z(b, i));
      V sum{};
      for (int64_t c = 0; c < count; c += L) {
        V part = load<V>(t + k + c);
        if (c + L > count) part = first_lanes(part, count - c);
        store(dx + j + c, load<V>(dx + j + c) + zi * part);
        sum += load<V>(x + j + c) * part;
      }
      dz[i] += sum_lanes(sum);
      k += count;
    }
  }

  // sums[b, f] += sum_o g[b, o] matrix[o, begin + f].
  void linear(const TensorRef& matrix, int64_t group, int64_t o0, int64_t outputs, int64_t begin, int64_t extent,
              Acc* sums, int64_t stride, const Scratch& s) const {
    const S* data = static_cast<const S*>(matrix.data) + group * matrix.group + o0 * matrix.row + begin * matrix.col;
    for (int64_t f0 = 0; f0 < extent && matrix.col == 1; f0 += kStreamDepth) {
      const int64_t depth = min(kStreamDepth, extent - f0);
      make_t(data + f0, matrix.row, outputs, depth, s);
      for (int64_t b = 0; b < p.rows; ++b)
        for (int64_t f = 0; f < depth; ++f) sums[b * stride + f0 + f] += s.t[b * t_stride + f];
    }
    if (matrix.col == 1) return;
    const auto g = rows_view<S>(call.grad, group).at(0, o0);
    for (int64_t b = 0; b < p.rows; ++b) {
      for (int64_t f = 0; f < extent; ++f) {
        Acc sum = 0;
        for (int64_t o = 0; o < outputs; ++o) sum += to_acc(g(b, o)) * to_acc(data[o * matrix.row + f * matrix.col]);
        sums[b * stride + f] += sum;
      }
    }
  }

  void write(const Acc* sums, int64_t stride, int64_t count, int64_t group, int64_t begin, int64_t features,
             const Result& out, int64_t splits, Acc* partial) const {
    if (!out.data) return;
    for (int64_t b = 0; b < p.rows; ++b) {
      const int64_t to = (group * p.rows + b) * features + begin;
      for (int64_t f = 0; f < count; ++f) {
        if (splits > 1)
          partial[to + f] = sums[b * stride + f];
        else
          from_acc(sums[b * stride + f], static_cast<S*>(out.data)[to + f]);
      }
    }
  }
};

}  // namespace

void input_grads_stream(DType dtype, const InputGradsCall& call, const InputGradsPlan& plan,
                        const Execution& execution) {
  run_family<InputGradsStream>(dtype, call, plan, execution);
}

}  // namespace mi_kernels::MI_ISA
