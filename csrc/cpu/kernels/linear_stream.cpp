// Products without W for a few rows, y[b, o] = sum_k in[b, k] M[o, k], which are bound by reading M. M is read once and
// in place: lanes run along K if M is K-major, and along the outputs if it is N-major.
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
  static constexpr int E = L * Mul::pair;     // elements along K in a vector
  static constexpr int kTileRows = 4;
  // Outputs of a K-major tile, and vectors of outputs of an N-major one: as many as fit in the registers, and no more
  // than it takes to read long runs.
  static constexpr int kTileOutputs = kTileM == 8 ? 4 : 2;
  template <int R>
  static constexpr int kTileVectors = (R == 1   ? 16
                                       : R == 2 ? 12
                                       : R == 3 ? 8
                                                : 6) /
                                      (kTileM == 8 ? 1 : 2);
  // Words of a summation block, and blocks of a partial sum: three levels, as a long plain sum has larger rounding
  // errors.
  static constexpr int64_t kSumBlock = Mul::sum_block == kUnbounded ? int64_t(1) << 20 : Mul::sum_block / 2,
                           kBlocksPerSum = 32;

  const LinearCall& call;
  const LinearPlan& plan;
  const Executor& executor;

  // A term for one group: its rows, converted and zero-padded to whole vectors, and its matrix.
  struct Term {
    Elem* rows;
    int64_t stride, depth;
    View<S> matrix;
    int64_t readable;  // elements from the start of a K-major matrix to the end of its memory
  };
  struct Block {
    int64_t group, o0, outputs;
    Term terms[2];
    Acc *sums, *partial_sums;  // of a tile: those that are complete, and the current partial ones
  };

 public:
  LinearStream(const LinearCall& c, const LinearPlan& l, const Executor& e) : call(c), plan(l), executor(e) {}

  void run() {
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t g0 = t / plan.lane_blocks * plan.group_step, step = plan.vectors * L;
    Block b{};
    b.o0 = t % plan.lane_blocks * step, b.outputs = min(step, call.out - b.o0);
    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    for (int i = 0; i < 2 && call.terms[i].rows.data; ++i) {
      b.terms[i].depth = call.terms[i].depth;
      b.terms[i].stride = ceil_div(b.terms[i].depth, E) * E;
      b.terms[i].rows = scratch.allocate<Elem>(call.rows * b.terms[i].stride);
    }
    b.sums = scratch.allocate<Acc>(kLinearStreamVectors * L);
    b.partial_sums = scratch.allocate<Acc>(kLinearStreamVectors * L);
    static_assert(kTileRows * L <= kLinearStreamVectors && kTileVectors<1> <= kLinearStreamVectors &&
                  2 * kTileVectors<2> <= kLinearStreamVectors && 4 * kTileVectors<4> <= kLinearStreamVectors &&
                  3 * kTileVectors<3> <= kLinearStreamVectors);
    for (b.group = g0; b.group < min(g0 + plan.group_step, call.groups); ++b.group) {
      for (int i = 0; i < 2 && call.terms[i].rows.data; ++i) copy_rows(call.terms[i], b.group, b.terms[i]);
      // A few outputs for all rows, so that the matrix is in the cache for all tiles of rows but the first.
      const int64_t step = plan.n_major ? kTileVectors<1> * L : L;
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

  void copy_rows(const LinearTerm& src, int64_t group, Term& term) const {
    const View<S> rows{static_cast<const S*>(src.rows.data) + group * src.rows.group, src.rows.row, src.rows.col};
    for (int64_t b = 0; b < call.rows; ++b) {
      Elem* dest = term.rows + b * term.stride;
      if (rows.k_stride == 1) {
        copy_row<Mul>(&rows(b, 0), term.depth, dest);
      } else {
        for (int64_t k = 0; k < term.depth; ++k) from_acc(to_acc(rows(b, k)), dest[k]);
      }
      clear(dest + term.depth, term.stride - term.depth);
    }
    const TensorRef& m = src.matrix;
    term.matrix = {static_cast<const S*>(m.data) + group * m.group, m.row, m.col};
    term.readable = (call.out - 1) * m.row + (term.depth - 1) * m.col + 1;
  }

  template <int R>
  void product(const Block& b, int64_t row, int64_t o, int64_t outputs) const {
    if (plan.n_major)
      product_n_major<R>(b, row, o, outputs);
    else
      product_k_major<R>(b, row, o, outputs);
  }

  S* out(const Block& b, int64_t row, int64_t o) const {
    return static_cast<S*>(call.y.data) + (b.group * call.rows + row) * call.out + o;
  }
  V bias(const Block& b, int64_t o, int64_t valid) const {
    if (!call.bias.data) return V{};
    const TensorRef& ref = call.bias;
    return load_lanes<Acc>(static_cast<const S*>(ref.data) + b.group * ref.group + o * ref.row, ref.row, valid);
  }

  // K-major: each of up to L outputs has a vector of sums, and all these are then reduced over lanes at once.
  template <int R>
  void product_k_major(const Block& b, int64_t row, int64_t o, int64_t valid) const {
    for (int64_t first = 0; first < valid; first += kTileOutputs) {
      if (valid - first >= kTileOutputs) {
        dots<kTileOutputs, R>(b, row, o + first, b.sums + first * L);
      } else {
        for (int64_t m = first; m < valid; ++m) dots<1, R>(b, row, o + m, b.sums + m * L);
      }
    }
    for (int r = 0; r < R; ++r) {
      V sums[L];
      unroll<L>([&](auto m) MI_INLINED { sums[m] = m < valid ? load<V>(b.sums + (r * L + m) * L) : V{}; });
      store_lanes<Acc>(out(b, row + r, o), 1, valid, sum_each(sums) + bias(b, o, valid));
    }
  }

  // sums[r][m] = the products of row r and output m, summed over all terms for each lane.
  template <int M, int R>
  __attribute__((noinline, flatten)) void dots(const Block& b, int64_t row, int64_t o, Acc* sums) const {
    bool overwrite = true;
    for (int i = 0; i < 2 && b.terms[i].rows; ++i) {
      const Term& t = b.terms[i];
      const Elem* rows = t.rows + row * t.stride;
      const int64_t whole = t.depth / E * E;
      for (int64_t begin = 0; begin < t.depth; begin += kSumBlock * E) {
        V acc[M][R]{};
        const int64_t end = min(begin + kSumBlock * E, t.depth);
        for (int64_t k = begin; k < min(end, whole); k += E)
          step<M, R>(acc, rows, t.stride, k, [&](auto m) { return load_words_k<Mul>(&t.matrix(o + m, k)); });
        if (end > whole) step<M, R>(acc, rows, t.stride, whole, [&](auto m) { return load_tail(t, o + m, whole); });
        unroll<M>([&](auto m) MI_INLINED {
          unroll<R>([&](auto r) MI_INLINED { add_to(sums + (r * L + m) * L, acc[m][r], overwrite); });
        });
        overwrite = false;
      }
    }
  }

  static MI_INLINE void add_to(Acc* sum, const V& part, bool overwrite) {
    store(sum, overwrite ? part : load<V>(sum) + part);
  }

  template <int M, int R, class Load>
  MI_INLINE static void step(V (&acc)[M][R], const Elem* rows, int64_t stride, int64_t k, const Load& load_matrix) {
    Vec<Word> in[R];
    unroll<R>([&](auto r) MI_INLINED { in[r] = load<Vec<Word>>(rows + r * stride + k); });
    unroll<M>([&](auto m) MI_INLINED {
      const auto w = load_matrix(m);
      unroll<R>([&](auto r) MI_INLINED { Mul::fma(acc[m][r], w, in[r]); });
    });
  }

  // The last elements of an output, from k on, zero-padded.
  Vec<Word> load_tail(const Term& t, int64_t o, int64_t k) const {
    const int64_t valid = t.depth - k, begin = o * t.matrix.mn_stride + k;
    if (begin + E <= t.readable) return first_words_k<Mul>(t.matrix.data + begin, valid);
    Elem copy[E] = {};
    for (int64_t e = 0; e < valid; ++e) from_acc(to_acc(t.matrix(o, k + e)), copy[e]);
    return load<Vec<Word>>(copy);
  }

  // N-major: lanes are outputs, of which a task has at least L. The last vector ends with the last output and overlaps
  // the vector before, so that some outputs are computed twice.
  template <int R>
  void product_n_major(const Block& b, int64_t row, int64_t o, int64_t outputs) const {
    constexpr int N = kTileVectors<R>;
    int64_t vectors = outputs / L, lane = o;
    const auto multiply_vectors = [&](auto n) {
      if constexpr (n.value <= N)
        for (; vectors >= n.value; vectors -= n.value, lane += n.value * L) multiply_outputs<n.value, R>(b, row, lane);
    };
    multiply_vectors(Index<N>{});
    multiply_vectors(Index<8>{});
    multiply_vectors(Index<4>{});
    multiply_vectors(Index<2>{});
    multiply_vectors(Index<1>{});
    if (outputs % L != 0) multiply_outputs<1, R>(b, row, o + outputs - L);
  }

  template <int N, int R>
  __attribute__((noinline, flatten)) void multiply_outputs(const Block& b, int64_t row, int64_t o) const {
    bool overwrite = true, overwrite_partial = true;
    int64_t blocks = 0;
    const auto flush_partial = [&] {
      for (int v = 0; v < R * N; ++v) add_to(b.sums + v * L, load<V>(b.partial_sums + v * L), overwrite);
      overwrite = false, overwrite_partial = true, blocks = 0;
    };
    for (int i = 0; i < 2 && b.terms[i].rows; ++i) {
      const Term& t = b.terms[i];
      const Elem* rows = t.rows + row * t.stride;
      const int64_t step = t.matrix.k_stride, whole = t.depth / Mul::pair, words = ceil_div(t.depth, Mul::pair);
      const S* matrix = t.matrix.data + o;
      const auto add = [&](V(&acc)[R][N], int64_t k, auto&& vector) {
        unroll<N>([&](auto n) MI_INLINED {
          const auto w = vector(n);
          unroll<R>([&](auto r)
                        MI_INLINED { Mul::fma(acc[r][n], load<Word>(rows + r * t.stride + k * Mul::pair), w); });
        });
      };
      for (int64_t begin = 0; begin < words; begin += kSumBlock) {
        V acc[R][N]{};
        const int64_t end = min(begin + kSumBlock, words);
        for (int64_t k = begin; k < min(end, whole); ++k) {
          const S* at = matrix + k * Mul::pair * step;
          add(acc, k, [&](auto n) { return load_words_mn<Mul, L>(at + n * L, at + n * L + step); });
        }
        if constexpr (Mul::pair == 2) {
          if (end > whole) {  // the last word has a single element
            constexpr S zeros[L] = {};
            add(acc, whole, [&](auto n) { return load_words_mn<Mul, L>(matrix + 2 * whole * step + n * L, zeros); });
          }
        }
        unroll<R>([&](auto r) MI_INLINED {
          unroll<N>([&](auto n) MI_INLINED { add_to(b.partial_sums + (r * N + n) * L, acc[r][n], overwrite_partial); });
        });
        overwrite_partial = false;
        if (++blocks == kBlocksPerSum) flush_partial();
      }
    }
    if (!overwrite_partial) flush_partial();
    for (int n = 0; n < N; ++n) {
      const V bias_vector = bias(b, o + n * L, L);
      unroll<R>([&](auto r) MI_INLINED {
        store_acc<L>(out(b, row + r, o + n * L), load<V>(b.sums + (r * N + n) * L) + bias_vector);
      });
    }
  }
};

}  // namespace

void linear_stream(DType dtype, const LinearCall& call, const LinearPlan& plan, const Executor& executor) {
  run_family<LinearStream>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
