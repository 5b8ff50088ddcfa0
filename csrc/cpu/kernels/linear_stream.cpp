// Products without W for a few rows, y[b, o] = sum_k in[b, k] M[o, k]: the time is that of reading M, which is read in
// place, from memory once. Lanes run along the sum where M does, else along the outputs.
#include "cpu/engine/epilogues.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class LinearStream {
  using Word = typename Mul::Word;
  using Elem = typename Mul::Elem;
  using Acc = typename Mul::Acc;
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;  // accumulators in a vector
  static constexpr int E = L * Mul::pair;     // elements along the sum in a vector
  static constexpr int kTileRows = 4;
  // Outputs of a tile along the sum, and vectors of them across it: as many as the registers hold beside one operand,
  // and no more than make a long run.
  static constexpr int kTileOutputs = kRows == 8 ? 4 : 2;
  template <int R>
  static constexpr int kTileVectors = (R == 1   ? 16
                                       : R == 2 ? 12
                                       : R == 3 ? 8
                                                : 6) /
                                      (kRows == 8 ? 1 : 2);
  // Words of a chain, and chains of a stretch: sums of sums of sums, as a long one by one would round more.
  static constexpr int64_t kChain = Mul::chain == kUnbounded ? int64_t(1) << 20 : Mul::chain / 2, kChains = 32;

  const LinearCall& call;
  const LinearPlan& plan;
  const Execution& execution;

  // A term for one group: its rows as they are multiplied, zeros up to a whole vector, and its matrix.
  struct Term {
    Elem* rows;
    int64_t stride, depth;
    View<S> matrix;
    int64_t readable;  // elements from the first one of the matrix that vectors may read, where it lies along the sum
  };
  struct Block {
    int64_t group, o0, outputs;
    Term terms[2];
    Acc *sums, *stretch;  // of a tile, and the part that is being added up
  };

 public:
  LinearStream(const LinearCall& c, const LinearPlan& l, const Execution& e) : call(c), plan(l), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t g0 = t / plan.lane_blocks * plan.group_step, step = plan.vectors * L;
    Block b{};
    b.o0 = t % plan.lane_blocks * step, b.outputs = min(step, call.out - b.o0);
    Arena arena{execution.scratch + worker * plan.worker_bytes};
    for (int i = 0; i < 2 && call.terms[i].rows.data; ++i) {
      b.terms[i].depth = call.terms[i].depth;
      b.terms[i].stride = ceil_div(b.terms[i].depth, E) * E;
      b.terms[i].rows = arena.take<Elem>(call.rows * b.terms[i].stride);
    }
    b.sums = arena.take<Acc>(kLinearStreamVectors * L);
    b.stretch = arena.take<Acc>(kLinearStreamVectors * L);
    static_assert(kTileRows * L <= kLinearStreamVectors && kTileVectors<1> <= kLinearStreamVectors &&
                  2 * kTileVectors<2> <= kLinearStreamVectors && 4 * kTileVectors<4> <= kLinearStreamVectors &&
                  3 * kTileVectors<3> <= kLinearStreamVectors);
    for (b.group = g0; b.group < min(g0 + plan.group_step, call.groups); ++b.group) {
      for (int i = 0; i < 2 && call.terms[i].rows.data; ++i) take(call.terms[i], b.group, b.terms[i]);
      // A few outputs for all rows, so that what was read for one tile of rows is in the cache for the next.
      const int64_t step = plan.across ? kTileVectors<1> * L : L;
      for (int64_t o = b.o0; o < b.o0 + b.outputs; o += step) {
        const int64_t outputs = min(b.o0 + b.outputs - o, step);
        for (int64_t row = 0; row < call.rows; row += kTileRows) {
          switch (min(call.rows - row, kTileRows)) {
            case 1: product<1>(b, row, o, outputs); break;
            case 2: product<2>(b, row, o, outputs); break;
            case 3: product<3>(b, row, o, outputs); break;
            default: product<4>(b, row, o, outputs); break;
          }
        }
      }
    }
  }

  void take(const LinearTerm& from, int64_t group, Term& term) const {
    const View<S> rows{static_cast<const S*>(from.rows.data) + group * from.rows.group, from.rows.row, from.rows.col};
    for (int64_t b = 0; b < call.rows; ++b) {
      Elem* to = term.rows + b * term.stride;
      if (rows.k_stride == 1) {
        copy_row<Mul>(&rows(b, 0), term.depth, to);
      } else {
        for (int64_t k = 0; k < term.depth; ++k) from_acc(to_acc(rows(b, k)), to[k]);
      }
      clear(to + term.depth, term.stride - term.depth);
    }
    const TensorRef& m = from.matrix;
    term.matrix = {static_cast<const S*>(m.data) + group * m.group, m.row, m.col};
    term.readable = (call.out - 1) * m.row + (term.depth - 1) * m.col + 1;
  }

  template <int R>
  void product(const Block& b, int64_t row, int64_t o, int64_t outputs) const {
    if (plan.across)
      across<R>(b, row, o, outputs);
    else
      along<R>(b, row, o, outputs);
  }

  S* out(const Block& b, int64_t row, int64_t o) const {
    return static_cast<S*>(call.y.data) + (b.group * call.rows + row) * call.out + o;
  }
  V bias(const Block& b, int64_t o, int64_t valid) const {
    if (!call.bias.data) return V{};
    const TensorRef& c = call.bias;
    return load_lanes<Acc>(static_cast<const S*>(c.data) + b.group * c.group + o * c.row, c.row, valid);
  }

  // Lanes along the sum: up to L outputs have a vector of sums each, which are then added up together.
  template <int R>
  void along(const Block& b, int64_t row, int64_t o, int64_t valid) const {
    for (int64_t first = 0; first < valid; first += kTileOutputs) {
      if (valid - first >= kTileOutputs) {
        dots<kTileOutputs, R>(b, row, o + first, b.sums + first * L);
      } else {
        for (int64_t m = first; m < valid; ++m) dots<1, R>(b, row, o + m, b.sums + m * L);
      }
    }
    for (int r = 0; r < R; ++r) {
      V sums[L];
      for (int m = 0; m < L; ++m) sums[m] = m < valid ? load<V>(b.sums + (r * L + m) * L) : V{};
      store_lanes<Acc>(out(b, row + r, o), 1, valid, sum_each(sums) + bias(b, o, valid));
    }
  }

  // sums[r][m] = the products of row r and output m, over all terms, lane by lane.
  template <int M, int R>
  __attribute__((noinline, flatten)) void dots(const Block& b, int64_t row, int64_t o, Acc* sums) const {
    bool fresh = true;
    for (int i = 0; i < 2 && b.terms[i].rows; ++i) {
      const Term& t = b.terms[i];
      const Elem* rows = t.rows + row * t.stride;
      const int64_t whole = t.depth / E * E;
      for (int64_t begin = 0; begin < t.depth; begin += kChain * E) {
        V acc[M][R]{};
        const int64_t end = min(begin + kChain * E, t.depth);
        for (int64_t k = begin; k < min(end, whole); k += E)
          step<M, R>(acc, rows, t.stride, k, [&](auto m) { return load_along<Mul>(&t.matrix(o + m, k)); });
        if (end > whole) step<M, R>(acc, rows, t.stride, whole, [&](auto m) { return partial(t, o + m, whole); });
        unroll<M>([&](auto m) { unroll<R>([&](auto r) { add_to(sums + (r * L + m) * L, acc[m][r], fresh); }); });
        fresh = false;
      }
    }
  }

  static MI_INLINE void add_to(Acc* sum, const V& part, bool fresh) { store(sum, fresh ? part : load<V>(sum) + part); }

  template <int M, int R, class Load>
  MI_INLINE static void step(V (&acc)[M][R], const Elem* rows, int64_t stride, int64_t k, const Load& load_matrix) {
    Vec<Word> in[R];
    unroll<R>([&](auto r) { in[r] = load<Vec<Word>>(rows + r * stride + k); });
    unroll<M>([&](auto m) {
      const auto w = load_matrix(m);
      unroll<R>([&](auto r) { Mul::fma(acc[m][r], w, in[r]); });
    });
  }

  // The last elements of an output, from k on; zeros beyond its end, whatever lies there.
  Vec<Word> partial(const Term& t, int64_t o, int64_t k) const {
    const int64_t valid = t.depth - k, begin = o * t.matrix.w_stride + k;
    if (begin + E <= t.readable) {
      if constexpr (Mul::pair == 1) {
        return first_lanes(load_along<Mul>(t.matrix.data + begin), valid);
      } else {
        return bit_cast<Vec<Word>>(first_lanes(load<Vec<int16_t, E>>(t.matrix.data + begin), valid));
      }
    }
    Elem copy[E] = {};
    for (int64_t e = 0; e < valid; ++e) from_acc(to_acc(t.matrix(o, k + e)), copy[e]);
    return load<Vec<Word>>(copy);
  }

  // Lanes along the outputs, of which a task has at least L. Its last vector begins where it ends with them, so that
  // some of its outputs are made twice.
  template <int R>
  void across(const Block& b, int64_t row, int64_t o, int64_t outputs) const {
    constexpr int N = kTileVectors<R>;
    int64_t vectors = outputs / L, lane = o;
    const auto take_columns = [&](auto n) {
      if constexpr (n.value <= N)
        for (; vectors >= n.value; vectors -= n.value, lane += n.value * L) columns<n.value, R>(b, row, lane);
    };
    take_columns(Index<N>{});
    take_columns(Index<8>{});
    take_columns(Index<4>{});
    take_columns(Index<2>{});
    take_columns(Index<1>{});
    if (outputs % L != 0) columns<1, R>(b, row, o + outputs - L);
  }

  template <int N, int R>
  __attribute__((noinline, flatten)) void columns(const Block& b, int64_t row, int64_t o) const {
    bool fresh = true, fresh_stretch = true;
    int64_t chains = 0;
    const auto end_stretch = [&] {
      for (int v = 0; v < R * N; ++v) add_to(b.sums + v * L, load<V>(b.stretch + v * L), fresh);
      fresh = false, fresh_stretch = true, chains = 0;
    };
    for (int i = 0; i < 2 && b.terms[i].rows; ++i) {
      const Term& t = b.terms[i];
      const Elem* rows = t.rows + row * t.stride;
      const int64_t step = t.matrix.k_stride, whole = t.depth / Mul::pair, words = ceil_div(t.depth, Mul::pair);
      const S* matrix = t.matrix.data + o;
      const auto add = [&](V(&acc)[R][N], int64_t k, auto&& vector) {
        unroll<N>([&](auto n) {
          const auto w = vector(n);
          unroll<R>([&](auto r) { Mul::fma(acc[r][n], load<Word>(rows + r * t.stride + k * Mul::pair), w); });
        });
      };
      for (int64_t begin = 0; begin < words; begin += kChain) {
        V acc[R][N]{};
        const int64_t end = min(begin + kChain, words);
        for (int64_t k = begin; k < min(end, whole); ++k) {
          const S* at = matrix + k * Mul::pair * step;
          add(acc, k, [&](auto n) { return load_across<Mul, L>(at + n * L, at + n * L + step); });
        }
        if constexpr (Mul::pair == 2) {
          if (end > whole) {  // the last one has no second
            constexpr S zeros[L] = {};
            add(acc, whole, [&](auto n) { return load_across<Mul, L>(matrix + 2 * whole * step + n * L, zeros); });
          }
        }
        unroll<R>(
            [&](auto r) { unroll<N>([&](auto n) { add_to(b.stretch + (r * N + n) * L, acc[r][n], fresh_stretch); }); });
        fresh_stretch = false;
        if (++chains == kChains) end_stretch();
      }
    }
    if (!fresh_stretch) end_stretch();
    for (int n = 0; n < N; ++n) {
      const V c = bias(b, o + n * L, L);
      for (int r = 0; r < R; ++r) store_acc<L>(out(b, row + r, o + n * L), load<V>(b.sums + (r * N + n) * L) + c);
    }
  }
};

}  // namespace

void linear_stream(DType dtype, const LinearCall& call, const LinearPlan& plan, const Execution& execution) {
  run_family<LinearStream>(dtype, call, plan, execution);
}

}  // namespace mi_kernels::MI_ISA
