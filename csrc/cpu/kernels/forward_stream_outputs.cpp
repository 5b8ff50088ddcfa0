// y for a few rows where the outputs are contiguous in W. Lanes are outputs: the vectors W[:, i, j] are multiplied by
// products z_i x_j, which are generated for one chunk of (i, j) at a time, so that W is read once and in place.
#include <type_traits>

#include "cpu/engine/epilogues.h"
#include "cpu/kernels/family.h"
#include "cpu/kernels/gate_epilogue.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class ForwardStreamOutputs {
  using Elem = typename Mul::Elem;
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;
  static constexpr int64_t kSlack = 2 * L;  // elements that whole vectors may write beyond the end
  static constexpr int kTileRows = 4;
  template <int R>
  static constexpr int kTileVectors = (R == 1   ? 16
                                       : R == 2 ? 12
                                       : R == 3 ? 8
                                                : 6) /
                                      (kTileM == 8 ? 1 : 2);
  static constexpr int64_t kSumBlock = Mul::sum_block == kUnbounded ? kStreamDepthOutputs : Mul::sum_block;

  const ForwardCall& call;
  const ForwardPlan& plan;
  const Executor& executor;
  const ProblemSize& p = call.problem;
  const WeightRef& w = call.weight;
  const int64_t products_stride = kStreamDepthOutputs + kSlack, x_stride = p.width + kSlack;
  const S* const weight_end = static_cast<const S*>(w.data) + (p.groups - 1) * w.group + (p.out - 1) * w.out +
                              (p.context - 1) * w.context + (p.width - 1) * w.width + 1;

  struct Scratch {
    Elem* products;  // [row][k]
    Acc *x, *sums;   // [row][j], [row][vector]
    S* tail;
  };
  struct Block {
    int64_t group, split, o0, outputs, vectors;
  };
  // Rows W[:, k] of a chunk, k_stride apart; a whole vector may be read from those below `readable`.
  struct Chunk {
    const S* data;
    int64_t k_stride, depth, readable;
  };

 public:
  ForwardStreamOutputs(const ForwardCall& c, const ForwardPlan& f, const Executor& e) : call(c), plan(f), executor(e) {}

  void run() {
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    if (plan.outer_splits > 1)
      sum_splits(executor, reinterpret_cast<const Acc*>(executor.partials), plan.outer_splits,
                 p.groups * p.rows * p.out, static_cast<S*>(call.y.data));
  }

 private:
  void task(int64_t t, int64_t worker) const {
    Block b{};
    const int64_t block = t / plan.outer_splits, g0 = block / plan.out_blocks * plan.group_step;
    b.split = t % plan.outer_splits, b.o0 = block % plan.out_blocks * plan.out_step;
    b.outputs = min(plan.out_step, p.out - b.o0), b.vectors = ceil_div(b.outputs, L);
    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    Scratch s;
    s.products = scratch.allocate<Elem>(p.rows * products_stride);
    s.x = scratch.allocate<Acc>(p.rows * x_stride);
    s.sums = scratch.allocate<Acc>(p.rows * ceil_div(plan.out_step, L) * L);
    s.tail = scratch.allocate<S>(Mul::pair * L);
    clear(s.x, p.rows * x_stride);
    for (b.group = g0; b.group < min(g0 + plan.group_step, p.groups); ++b.group) sum_group(b, s);
  }

  void sum_group(const Block& b, const Scratch& s) const {
    const auto x_view = batch_view<S>(call.x, b.group), z_view = batch_view<S>(call.z, b.group);
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t j = 0; j < p.width; ++j) s.x[row * x_stride + j] = to_acc(x_view(row, j));
    clear(s.sums, p.rows * b.vectors * L);
    const S* weight = static_cast<const S*>(w.data) + b.group * w.group + b.o0;
    const int64_t length = p.context * p.width, end = min((b.split + 1) * plan.outer_step, length);
    for (int64_t k0 = b.split * plan.outer_step, depth; k0 < end; k0 += depth) {
      const int64_t i = k0 / p.width, j = k0 - i * p.width;
      depth = min(kStreamDepthOutputs, plan.layout.flat ? end - k0 : min(end - k0, p.width - j));
      for (int64_t row = 0; row < p.rows; ++row)
        generate_products(z_view, row, s.x + row * x_stride, k0, depth, s.products + row * products_stride);
      add_chunk(chunk(weight + i * w.context + j * w.width, depth), b, s);
    }
    if (call.weight_z.data && b.split == 0) add_linear(call.weight_z, z_view, p.context, b, s);
    if (call.weight_x.data && b.split == 0) add_linear(call.weight_x, x_view, p.width, b, s);
    write(b, s.sums);
  }

  // With fewer outputs than lanes, the last rows of W are too close to the end of its memory.
  Chunk chunk(const S* data, int64_t depth) const {
    const int64_t spare = weight_end - data - L, all = spare < 0 ? 0 : depth;
    const bool near = p.out < L && w.width > 0;
    return {data, w.width, depth, p.out >= L ? depth : near ? min(all, max(spare, 0) / w.width + 1) : all};
  }

  // products[k - k0] = z[b, i] x[b, j] for k = (i, j), zero-padded to a whole word.
  void generate_products(const View<S>& z, int64_t row, const Acc* x, int64_t k0, int64_t depth, Elem* products) const {
    int64_t i = k0 / p.width, j = k0 - i * p.width;
    for (int64_t k = 0; k < depth; ++i, j = 0) {
      const Acc zi = to_acc(z(row, i));
      const int64_t count = min(p.width - j, depth - k);
      for (int64_t c = 0; c < count; c += L) store_acc<L>(products + k + c, zi * load_acc<L>(x + j + c));
      k += count;
    }
    if (depth % Mul::pair != 0) products[depth] = Elem{};
  }

  // Output of the first lane of a vector: the last one ends with the last output and overlaps the vector before.
  static int64_t lane(const Block& b, int64_t vector) { return min(vector * L, max(b.outputs - L, 0)); }

  void add_chunk(const Chunk& c, const Block& b, const Scratch& s) const {
    constexpr int64_t step = kTileVectors<1>;
    for (int64_t v = 0; v < b.vectors; v += step) {
      const int64_t vectors = min(b.vectors - v, step);
      for (int64_t row = 0; row < p.rows; row += kTileRows) {
        switch (min(p.rows - row, kTileRows)) {
          case 1: add_vectors<1>(c, b, row, v, vectors, s); break;
          case 2: add_vectors<2>(c, b, row, v, vectors, s); break;
          case 3: add_vectors<3>(c, b, row, v, vectors, s); break;
          default: add_vectors<4>(c, b, row, v, vectors, s); break;
        }
      }
    }
  }

  template <int R>
  void add_vectors(const Chunk& c, const Block& b, int64_t row, int64_t v, int64_t vectors, const Scratch& s) const {
    const auto add = [&](auto n) {
      if constexpr (n.value <= kTileVectors<R>)
        for (; vectors >= n.value; vectors -= n.value, v += n.value) add_tile<n.value, R>(c, b, row, v, s);
    };
    add(Index<kTileVectors<R>>{});
    add(Index<8>{});
    add(Index<4>{});
    add(Index<2>{});
    add(Index<1>{});
  }

  // sums[row][v] += the sum over the chunk of products[row][k] W[v, k].
  template <int N, int R>
  void add_tile(const Chunk& c, const Block& b, int64_t row, int64_t v, const Scratch& s) const {
    const Elem* products = s.products + row * products_stride;
    Acc* sums = s.sums + (row * b.vectors + v) * L;
    const int64_t last = lane(b, v + N - 1);
    const int64_t words = c.readable / Mul::pair;
    multiply_words<N, R>(c.data + v * L, c.data + last, c.k_stride, words, products, b.vectors * L, sums);
    for (int64_t k = words * Mul::pair; k < c.depth; k += Mul::pair) {
      if (b.outputs >= L) {  // the second element of a pair is beyond the chunk
        for (int n = 0; n < N; ++n) add_word<R>(c, lane(b, v + n), L, k, products, b, sums + n * L, s.tail);
      } else {
        add_word<R>(c, 0, b.outputs, k, products, b, sums, s.tail);
      }
    }
  }

  // A single word of K, by way of a copy, which is zero where W has no elements.
  template <int R>
  void add_word(const Chunk& c, int64_t o, int64_t outputs, int64_t k, const Elem* products, const Block& b, Acc* sums,
                S* tail) const {
    for (int64_t e = 0; e < Mul::pair; ++e)
      for (int64_t l = 0; l < L; ++l)
        tail[e * L + l] = l < outputs && k + e < c.depth ? c.data[o + l + (k + e) * c.k_stride] : S{};
    multiply_words<1, R>(tail, tail, L, 1, products + k, b.vectors * L, sums);
  }

  // `last`: the last of the N vectors. U words at a time where there are too few sums to hide latency; for one row they
  // are far apart, as several streams of memory are faster than one, if none is within a page of the next (not so with
  // vectors of half a line, in pairs).
  template <int N, int R>
  __attribute__((noinline, flatten)) void multiply_words(const S* first, const S* last, int64_t k_stride, int64_t words,
                                                         const Elem* products, int64_t sums_stride, Acc* sums) const {
    const int64_t stride = products_stride, next = Mul::pair == 1 ? 0 : k_stride;
    const auto add = [&](V(&acc)[R][N], int64_t k) {
      const int64_t at = k * Mul::pair * k_stride;
      unroll<N>([&](auto n) MI_INLINED {
        const S* from = (n + 1 == N ? last : first + n * L) + at;
        const auto vector = load_words_mn<Mul, L>(from, from + next);
        unroll<R>([&](auto r)
                      MI_INLINED { Mul::fma(acc[r][n], load<Word>(products + r * stride + k * Mul::pair), vector); });
      });
    };
    V total[R][N]{};
    const auto sum_words = [&](auto count, const auto& index) {
      constexpr int U = count;
      const int64_t steps = words / U;
      for (int64_t begin = 0; begin < steps || begin == 0; begin += kSumBlock / U) {
        V acc[U][R][N]{};
        const int64_t end = min(begin + kSumBlock / U, steps);
        for (int64_t s = begin; s < end; ++s) unroll<U>([&](auto u) MI_INLINED { add(acc[u], index(u, s, steps)); });
        for (int64_t k = steps * U; end == steps && k < words; ++k) add(acc[0], k);
        unroll<R>([&](auto r) MI_INLINED {
          unroll<N>([&](auto n) MI_INLINED { unroll<U>([&](auto u) MI_INLINED { total[r][n] += acc[u][r][n]; }); });
        });
      }
    };
    constexpr int kNear = N * R >= 8 ? 1 : N * R >= 4 ? 2 : 4;
    constexpr int kFar = max(min((kTileM == 8 ? 16 : 8) / N, 4), 1);
    if (R == 1 && Mul::pair == 1 && words / kFar * k_stride * int64_t(sizeof(S)) >= 4096)
      sum_words(std::integral_constant<int, kFar>{}, [](auto u, int64_t s, int64_t steps) { return u * steps + s; });
    else
      sum_words(std::integral_constant<int, kNear>{}, [](auto u, int64_t s, int64_t) { return s * kNear + u; });
    unroll<R>([&](auto r) MI_INLINED {
      unroll<N>([&](auto n) MI_INLINED {
        Acc* sum = sums + r * sums_stride + n * L;
        store(sum, load<V>(sum) + total[r][n]);
      });
    });
  }

  // U z or V x: a small part of the work.
  void add_linear(const TensorRef& matrix, const View<S>& features, int64_t length, const Block& b,
                  const Scratch& s) const {
    const S* data = static_cast<const S*>(matrix.data) + b.group * matrix.group + b.o0 * matrix.row;
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t v = 0; v < b.vectors; ++v) {
        const int64_t o = lane(b, v);
        V sum{}, block{};
        for (int64_t k = 0; k < length; ++k) {
          block += load_lanes<Acc>(data + o * matrix.row + k * matrix.col, matrix.row, b.outputs - o) *
                   (V{} + to_acc(features(row, k)));
          if (k % 64 == 63) sum += block, block = V{};
        }
        Acc* at = s.sums + (row * b.vectors + v) * L;
        store(at, load<V>(at) + (sum + block));
      }
    }
  }

  void write(const Block& b, const Acc* sums) const {
    const S* bias = static_cast<const S*>(call.bias.data) + b.group * call.bias.group + b.o0 * call.bias.row;
    bool finite = true;
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t dest_index = (b.group * p.rows + row) * p.out + b.o0;
      for (int64_t v = 0; v < b.vectors; ++v) {
        const int64_t o = lane(b, v), valid = b.outputs - o;
        V sum = load<V>(sums + (row * b.vectors + v) * L);
        if (call.bias.data && b.split == 0) sum += load_lanes<Acc>(bias + o * call.bias.row, call.bias.row, valid);
        if (plan.outer_splits > 1) {
          auto* partial = reinterpret_cast<Acc*>(executor.partials) + b.split * p.groups * p.rows * p.out;
          store_lanes<Acc>(partial + dest_index + o, 1, valid, sum);
          continue;
        }
        if (call.gate.present) sum = gated(sum, dest_index + o, row, b.o0 + o, valid, finite);
        store_lanes<Acc>(static_cast<S*>(call.y.data) + dest_index + o, 1, valid, sum);
      }
    }
    if (!finite) flag_not_finite(call.gate);
  }

  V gated(const V& sum, int64_t dest_index, int64_t row, int64_t o, int64_t valid, bool& finite) const {
    const GateParams& gate = call.gate;
    for (int l = 0; l < min(valid, L); ++l) finite &= sum[l] - sum[l] == 0;
    if (gate.pre_activation.data)
      store_lanes<Acc>(static_cast<S*>(gate.pre_activation.data) + dest_index, 1, valid, sum);
    const V x =
        load_lanes<Acc>(static_cast<const S*>(gate.x.data) + row * gate.x.row + o * gate.x.col, gate.x.col, valid);
    V y{};
    for_activation<VectorMath>(gate.activation, [&](auto act) { y = (act.value(sum) + Acc(gate.offset)) * x; });
    return y;
  }
};

}  // namespace

void forward_stream_outputs(DType dtype, const ForwardCall& call, const ForwardPlan& plan, const Executor& executor) {
  run_family<ForwardStreamOutputs>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
