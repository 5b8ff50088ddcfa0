// dx and dz for a few rows, which is bound by reading W. T(i, j) = sum_o g[o] W[o, i, j] is computed for one chunk of
// (i, j) at a time, which stays in the cache while W is read once, in whole vectors and in runs as long as the chunk.
// Lanes run along (i, j), or along the outputs where these are contiguous in W.
#include "cpu/engine/epilogues.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class InputGradsStream {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;
  static constexpr int64_t kSlack = 2 * L;  // elements that whole vectors may write beyond the end
  // Words of g and rows of a register tile; with 16 registers it has half as many rows.
  static constexpr int kTileWords = 4, kTileOutputs = kTileWords * Mul::pair, kTileRows = kTileM / 2;
  // Rows, and features (i, j), of a register tile with the outputs in the lanes.
  static constexpr int kDotRows = kTileM / 2, kDotFeatures = kTileM == 8 ? 4 : 2;

  const InputGradsCall& call;
  const InputGradsPlan& plan;
  const Executor& executor;
  const ProblemSize& p = call.problem;
  const bool want_x = call.dx.data != nullptr, want_z = call.dz.data != nullptr;
  const InputPartials<Acc> partials{call, plan, executor};
  const int64_t t_stride = kStreamDepth + kSlack, x_stride = p.width + kSlack;
  const bool n_major = plan.layout.major == Major::n;
  const WeightRef& w = call.weight;
  const S* const weight_end = static_cast<const S*>(w.data) + (p.groups - 1) * w.group + (p.out - 1) * w.out +
                              (p.context - 1) * w.context + (p.width - 1) * w.width + 1;
  static constexpr int E = L * Mul::pair;  // elements along K in a vector
  // Elements from a feature to those that are prefetched with it: whole tiles, as many as memory takes to answer.
  static constexpr int64_t kAheadBytes = 8 << 10;
  const int64_t tile_elements = max(kDotFeatures * w.width, 1);
  const int64_t ahead = ceil_div(kAheadBytes / int64_t(sizeof(S)), tile_elements) * tile_elements;
  const int64_t g_stride = n_major ? round_up(p.out, E) / Mul::pair : kStreamOutputs / Mul::pair;
  // Outputs of one summation block, and elements of one chunk of T.
  const int64_t out_block = n_major ? max(p.out, 1) : kStreamOutputs;

  struct Scratch {
    Acc *t, *x, *dx, *dx_partial, *dz;
    Word* g;          // [row][word], zero beyond the outputs
    S *zeros, *tail;  // read instead of outputs beyond the last, and of the end of a chunk
  };

 public:
  InputGradsStream(const InputGradsCall& c, const InputGradsPlan& d, const Executor& e)
      : call(c), plan(d), executor(e) {}

  void run() {
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    partials.template sum<S>();
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t g0 = t / plan.splits * plan.group_step;
    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    Scratch s;
    s.t = scratch.allocate<Acc>(p.rows * t_stride);
    s.x = scratch.allocate<Acc>(p.rows * x_stride);
    s.dx = scratch.allocate<Acc>(p.rows * x_stride);
    s.dx_partial = scratch.allocate<Acc>(p.rows * x_stride);
    s.dz = scratch.allocate<Acc>(p.rows * plan.context_step);
    s.g = scratch.allocate<Word>(p.rows * g_stride);
    s.zeros = scratch.allocate<S>(t_stride);
    s.tail = scratch.allocate<S>(kTileOutputs * L);
    clear(s.x, p.rows * x_stride);
    if (!n_major) clear(s.zeros, t_stride);
    for (int64_t group = g0; group < min(g0 + plan.group_step, p.groups); ++group) sum_group(group, t % plan.splits, s);
  }

  void sum_group(int64_t group, int64_t split, const Scratch& s) const {
    const int64_t context_splits = plan.splits / plan.z_splits;
    const int64_t out_split = split / context_splits, context_split = split % context_splits;
    const int64_t i0 = context_split * plan.context_step, extent = min(plan.context_step, p.context - i0);
    const int64_t o_begin = out_split * plan.out_step, o_end = min(o_begin + plan.out_step, p.out);
    clear(s.dx, p.rows * x_stride);
    clear(s.dx_partial, p.rows * x_stride);
    clear(s.dz, p.rows * plan.context_step);
    const auto x_view = batch_view<S>(call.x, group), z_view = batch_view<S>(call.z, group);
    const auto g_view = batch_view<S>(call.grad, group);
    for (int64_t b = 0; b < p.rows; ++b)
      for (int64_t j = 0; j < p.width; ++j) s.x[b * x_stride + j] = to_acc(x_view(b, j));

    const S* weight = static_cast<const S*>(w.data) + group * w.group + i0 * w.context;
    for (int64_t o = o_begin; o < o_end; o += out_block) {
      const int64_t outputs = min(o_end - o, out_block), length = extent * p.width;
      for (int64_t b = 0; b < p.rows; ++b)
        for (int64_t k = 0; k < g_stride; ++k)
          s.g[b * g_stride + k] = k * Mul::pair < outputs ? word_at<Mul>(g_view.at(0, o), b, k, outputs) : Word{};
      const int64_t chunk = min(kStreamDepth, kStreamContext * p.width);
      for (int64_t k0 = 0, depth, flushed = 0; k0 < length; k0 += depth) {
        const int64_t i = k0 / p.width, j = k0 - i * p.width;
        depth = min(chunk, plan.layout.flat ? length - k0 : p.width - j);
        const int64_t end = k0 + depth;
        const S* from = weight + o * w.out + i * w.context + j * w.width;
        if (p.out == 1 && p.rows == 1) {
          reduce(z_view.at(0, i0), 0, k0, depth, s, scaled(from, to_acc(g_view(0, 0))));
        } else {
          n_major ? compute_dots(from, outputs, depth, s) : compute_t(from, w.out, outputs, depth, s);
          for (int64_t b = 0; b < p.rows; ++b) reduce(z_view.at(0, i0), b, k0, depth, s, stored(s.t + b * t_stride));
        }
        if (end - flushed < kStreamContext * p.width && end < length) continue;
        for (int64_t e = 0; e < p.rows * x_stride; ++e) s.dx[e] += s.dx_partial[e];
        clear(s.dx_partial, p.rows * x_stride);
        flushed = end;
      }
      if (want_z && call.weight_z.data)
        add_linear(call.weight_z, group, o, outputs, i0, extent, s.dz, plan.context_step, s);
      if (want_x && call.weight_x.data && context_split == 0)
        add_linear(call.weight_x, group, o, outputs, 0, p.width, s.dx, x_stride, s);
    }
    write(s.dx, x_stride, p.width, group, 0, p.width, call.dx, plan.x_splits, partials.x(split));
    write(s.dz, plan.context_step, extent, group, i0, p.context, call.dz, plan.z_splits, partials.z(out_split));
  }

  // t[b, k] = sum_o g[b, o] * src[o * stride + k], one tile of outputs and rows at a time.
  void compute_t(const S* src, int64_t stride, int64_t outputs, int64_t depth, const Scratch& s) const {
    const int64_t whole = depth / L * L, rest = depth - whole;
    for (int64_t b = 0; b < p.rows; ++b) clear(s.t + b * t_stride, whole + L);
    for (int64_t o = 0; o < outputs; o += kTileOutputs) {
      const S *rows[kTileOutputs], *ends[kTileOutputs];
      for (int m = 0; m < kTileOutputs; ++m) {
        const bool valid = o + m < outputs;
        rows[m] = valid ? src + (o + m) * stride : s.zeros;
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
      const Word* gb = g + b * g_stride;
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
    unroll<N>([&](auto n) MI_INLINED {
      unroll<kTileWords>([&](auto m) MI_INLINED { factors[n][m] = Vec<Word>{} + g[n * g_stride + m]; });
    });
    const int64_t stride = t_stride;
    for (int64_t k = 0; k < depth; k += L) {
      Vec<Word> w[kTileWords];
      unroll<kTileWords>([&](auto m) MI_INLINED {
        w[m] = load_words_mn<Mul, L>(rows[m * Mul::pair] + k, rows[m * Mul::pair + Mul::pair - 1] + k);
      });
      unroll<N>([&](auto n) MI_INLINED {
        V sum = load<V>(t + n * stride + k);
        unroll<kTileWords>([&](auto m) MI_INLINED { Mul::fma(sum, factors[n][m], w[m]); });
        store(t + n * stride + k, sum);
      });
    }
  }

  // t[b, k] = sum_o g[b, o] src[k * w.width + o]: each k has a vector of sums, and L of these are reduced at once.
  void compute_dots(const S* src, int64_t outputs, int64_t depth, const Scratch& s) const {
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t valid = min(depth - k, L);
      for (int64_t b = 0; b < p.rows; b += kDotRows) {
        switch (min(p.rows - b, kDotRows)) {
          case 1: dots<1>(src + k * w.width, outputs, valid, b, s.t + k, s); break;
          case 2: dots<2>(src + k * w.width, outputs, valid, b, s.t + k, s); break;
          case 3: dots<min(3, kDotRows)>(src + k * w.width, outputs, valid, b, s.t + k, s); break;
          default: dots<kDotRows>(src + k * w.width, outputs, valid, b, s.t + k, s); break;
        }
      }
    }
  }

  template <int R>
  void dots(const S* src, int64_t outputs, int64_t valid, int64_t b, Acc* t, const Scratch& s) const {
    constexpr int M = kDotFeatures;
    V sums[R][L];
    for (int64_t m = 0; m < valid; m += M) {
      const S* at = src + m * w.width;
      // Beyond the end of a row is another one, or unmapped memory.
      const bool whole = m + M <= valid && at + (M - 1) * w.width + round_up(outputs, E) <= weight_end;
      if (whole) {
        dot<M, R>(at, w.width, outputs, outputs % E, b, &sums[0][m], s);
      } else {
        for (int64_t one = m; one < min(m + M, valid); ++one)
          dot_copy<R>(src + one * w.width, outputs, b, &sums[0][one], s);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t m = valid; m < L; ++m) sums[r][m] = V{};
      store(t + (b + r) * t_stride, sum_each(sums[r]));
    }
  }

  // With the last elements in a copy, which is zero beyond them.
  template <int R>
  void dot_copy(const S* src, int64_t outputs, int64_t b, V* sums, const Scratch& s) const {
    const int64_t whole = outputs / E * E;
    S last[E] = {};
    for (int64_t o = whole; o < outputs; ++o) last[o - whole] = src[o];
    dot<1, R>(src, 0, whole, 0, b, sums, s);
    if (whole == outputs) return;
    V more[R][L];
    Scratch rest = s;
    rest.g += whole / Mul::pair;
    dot<1, R>(last, 0, E, 0, b, &more[0][0], rest);
    for (int r = 0; r < R; ++r) sums[r * L] += more[r][0];
  }

  // sums[r][m] = the products of row b + r and feature m for each lane; `rest`: elements of the last vector.
  template <int M, int R>
  __attribute__((noinline, flatten)) void dot(const S* src, int64_t stride, int64_t outputs, int64_t rest, int64_t b,
                                              V* sums, const Scratch& s) const {
    constexpr int64_t sum_block = Mul::sum_block == kUnbounded ? int64_t(1) << 20 : Mul::sum_block / 2 * E;
    const Word* g = s.g + b * g_stride;
    V total[M][R]{};
    const auto step = [&](V(&acc)[M][R], int64_t o, auto&& vector) {
      Vec<Word> in[R];
      unroll<R>([&](auto r) MI_INLINED { in[r] = load<Vec<Word>>(g + r * g_stride + o / Mul::pair); });
      unroll<M>([&](auto m) MI_INLINED {
        const auto v = vector(src + m * stride + o);
        unroll<R>([&](auto r) MI_INLINED { Mul::fma(acc[m][r], v, in[r]); });
      });
    };
    const int64_t whole = outputs - rest;
    if (whole <= sum_block) {
      for (int64_t o = 0; o < whole; o += E) {
        unroll<M>([&](auto m) MI_INLINED { __builtin_prefetch(src + m * stride + o + ahead); });
        step(total, o, [](const S* at) { return load_words_k<Mul>(at); });
      }
    }
    for (int64_t begin = 0; begin < whole && whole > sum_block; begin += sum_block) {
      V acc[M][R]{};
      for (int64_t o = begin; o < min(begin + sum_block, whole); o += E)
        step(acc, o, [](const S* at) { return load_words_k<Mul>(at); });
      unroll<M>([&](auto m) MI_INLINED { unroll<R>([&](auto r) MI_INLINED { total[m][r] += acc[m][r]; }); });
    }
    if (rest > 0) step(total, whole, [rest](const S* at) { return first_words_k<Mul>(at, rest); });
    unroll<M>([&](auto m) MI_INLINED { unroll<R>([&](auto r) MI_INLINED { sums[r * L + m] = total[m][r]; }); });
  }

  // A vector of t from k on, zero from `valid` elements on: of the chunk, or of a single row of W, which is then not
  // copied to it.
  static auto stored(const Acc* t) {
    return [t](int64_t k, int64_t valid) {
      const V v = load<V>(t + k);
      return valid < L ? first_lanes(v, valid) : v;
    };
  }
  auto scaled(const S* row, Acc g) const {
    return [row, g, end = weight_end](int64_t k, int64_t valid) {
      if (valid >= L) return g * load_acc<L>(row + k);
      // Beyond the end of a row is another one, or unmapped memory. Masked last, as g may be infinite.
      return first_lanes(g * (row + k + L <= end ? load_acc<L>(row + k) : load_lanes<Acc>(row + k, 1, valid)), valid);
    };
  }

  // dx[j] += z[i] t(i, j) and dz[i] += x[j] t(i, j) over the chunk.
  template <class Vector>
  void reduce(const View<S>& z, int64_t b, int64_t k0, int64_t depth, const Scratch& s, const Vector& vector) const {
    const Acc* x = s.x + b * x_stride;
    Acc *dx = s.dx_partial + b * x_stride, *dz = s.dz + b * plan.context_step;
    int64_t i = k0 / p.width, j = k0 - i * p.width;
    for (int64_t k = 0; k < depth; ++i, j = 0) {
      const int64_t count = min(p.width - j, depth - k);
      const Acc zi = to_acc(z(b, i));
      V sum{};
      for (int64_t c = 0; c < count; c += L) {
        const V t_ij = vector(k + c, count - c);
        store(dx + j + c, load<V>(dx + j + c) + zi * t_ij);
        sum += load<V>(x + j + c) * t_ij;
      }
      dz[i] += sum_lanes(sum);
      k += count;
    }
  }

  // sums[b, f] += sum_o g[b, o] matrix[o, begin + f].
  void add_linear(const TensorRef& matrix, int64_t group, int64_t o0, int64_t outputs, int64_t begin, int64_t extent,
                  Acc* sums, int64_t stride, const Scratch& s) const {
    const S* data = static_cast<const S*>(matrix.data) + group * matrix.group + o0 * matrix.row + begin * matrix.col;
    const bool rows = matrix.col == 1 && !n_major;  // g is held in words that compute_t() can read
    for (int64_t f0 = 0; f0 < extent && rows; f0 += kStreamDepth) {
      const int64_t depth = min(kStreamDepth, extent - f0);
      compute_t(data + f0, matrix.row, outputs, depth, s);
      for (int64_t b = 0; b < p.rows; ++b)
        for (int64_t f = 0; f < depth; ++f) sums[b * stride + f0 + f] += s.t[b * t_stride + f];
    }
    if (rows) return;
    const auto g = batch_view<S>(call.grad, group).at(0, o0);
    for (int64_t f0 = 0; f0 < extent && matrix.col == 1; f0 += kStreamDepth) {
      const int64_t depth = min(kStreamDepth, extent - f0);
      for (int64_t b = 0; b < p.rows; ++b) {
        for (int64_t begin = 0; begin < outputs; begin += kStreamOutputs) {
          clear(s.t, depth);
          for (int64_t o = begin; o < min(begin + kStreamOutputs, outputs); ++o)
            for (int64_t f = 0; f < depth; ++f) s.t[f] += to_acc(g(b, o)) * to_acc(data[o * matrix.row + f0 + f]);
          for (int64_t f = 0; f < depth; ++f) sums[b * stride + f0 + f] += s.t[f];
        }
      }
    }
    if (matrix.col == 1) return;
    for (int64_t b = 0; b < p.rows; ++b) {
      for (int64_t f = 0; f < extent; ++f) {
        Acc sum = 0;
        for (int64_t o = 0; o < outputs; ++o) sum += to_acc(g(b, o)) * to_acc(data[o * matrix.row + f * matrix.col]);
        sums[b * stride + f] += sum;
      }
    }
  }

  void write(const Acc* sums, int64_t stride, int64_t count, int64_t group, int64_t begin, int64_t features,
             const OutputRef& out, int64_t splits, Acc* partial) const {
    if (!out.data) return;
    for (int64_t b = 0; b < p.rows; ++b) {
      const int64_t dest_index = (group * p.rows + b) * features + begin;
      for (int64_t f = 0; f < count; ++f) {
        if (splits > 1)
          partial[dest_index + f] = sums[b * stride + f];
        else
          from_acc(sums[b * stride + f], static_cast<S*>(out.data)[dest_index + f]);
      }
    }
  }
};

}  // namespace

void input_grads_stream(DType dtype, const InputGradsCall& call, const InputGradsPlan& plan, const Executor& executor) {
  run_family<InputGradsStream>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
