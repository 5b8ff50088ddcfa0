// y = z^T W x + U z + V x + c with the outputs in the lanes, where they are contiguous in W: the vectors W[:, i, j] are
// the B operand, read in place where they need no conversion, and rows of x are the A operand. The product sums over x,
// and the epilogue multiplies by z[i]. Rows fill whole tiles sooner than whole vectors, and W is not packed for them.
#include "cpu/engine/epilogues.h"
#include "cpu/engine/producers.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class ForwardOutputs {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using PackAcc = typename AccMul<Mul>::type;
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;
  // Words in a summation block. Its part of W stays in the first level of the cache for all rows.
  static constexpr int64_t kSumWords = 64;
  static_assert(kOutputLaneRows % kTileM == 0);
  static constexpr int64_t kFlush = 32;  // such blocks that are added up before their sum is added to y

  const ForwardCall& call;
  const ForwardPlan& plan;
  const Executor& executor;
  const ProblemSize& p = call.problem;

  struct Block {  // of rows, outputs and features of the context
    int64_t group, split, row0, rows, padded_rows, o0, outputs, vectors;
  };
  struct Scratch {
    Word *a, *b;
    Acc *z, *sums, *y;  // z [i][row]; sums and y [row][o]
  };
  // B[o, k] from the first output of a block on, and the matrix that follows it, to be prefetched.
  struct Operand {
    View<S> matrix;
    const S* next;
  };

 public:
  ForwardOutputs(const ForwardCall& c, const ForwardPlan& f, const Executor& e) : call(c), plan(f), executor(e) {}

  void run() {
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    if (plan.outer_splits > 1)
      sum_splits(executor, reinterpret_cast<const Acc*>(executor.partials), plan.outer_splits,
                 p.groups * p.rows * p.out, static_cast<S*>(call.y.data));
  }

 private:
  void task(int64_t t, int64_t worker) const {
    Block b{};
    b.split = t % plan.outer_splits, t /= plan.outer_splits;
    b.o0 = t % plan.out_blocks * plan.out_step, t /= plan.out_blocks;
    b.row0 = t % plan.row_blocks * plan.row_step, b.group = t / plan.row_blocks;
    b.rows = min(plan.row_step, p.rows - b.row0), b.padded_rows = ceil_div(b.rows, kTileM) * kTileM;
    b.outputs = min(plan.out_step, p.out - b.o0), b.vectors = ceil_div(b.outputs, L);
    const int64_t i0 = b.split * plan.outer_step, extent = min(plan.outer_step, p.context - i0);

    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    const int64_t words = ceil_div(plan.depth, Mul::pair), lanes = plan.vectors * L;
    Scratch s;
    s.a = scratch.allocate<Word>(plan.row_step * words);
    s.b = scratch.allocate<Word>(lanes * words);
    s.z = scratch.allocate<Acc>(kOuterBlock * plan.row_step);
    s.sums = scratch.allocate<Acc>(plan.row_step * lanes);
    s.y = scratch.allocate<Acc>(plan.row_step * lanes);

    const auto x = batch_view<S>(call.x, b.group).at(b.row0, 0), z = batch_view<S>(call.z, b.group).at(b.row0, 0);
    clear(s.sums, b.padded_rows * b.vectors * L);
    clear(s.y, b.padded_rows * b.vectors * L);
    for (int64_t k0 = 0; k0 < p.width; k0 += plan.depth) {
      const int64_t depth = min(plan.depth, p.width - k0);
      pack_a(b, x.at(0, k0), depth, s.a);
      for (int64_t i = 0; i < extent; i += kOuterBlock) {
        const int64_t features = min(extent - i, kOuterBlock);
        pack<PackAcc>(z.at(0, i0 + i), b.rows, b.padded_rows, features, s.z);
        multiply_weight(b, i0 + i, features, k0, depth, s);
      }
      if (b.split == 0) add_linear(b, call.weight_x, k0, depth, s);
    }
    for (int64_t k0 = 0; k0 < p.context && b.split == 0 && call.weight_z.data; k0 += plan.depth) {
      const int64_t depth = min(plan.depth, p.context - k0);
      pack_a(b, z.at(0, k0), depth, s.a);
      add_linear(b, call.weight_z, k0, depth, s);
    }
    write(b, s.y);
  }

  static void pack_a(const Block& b, const View<S>& from, int64_t depth, Word* a) {
    const int64_t words = ceil_div(depth, Mul::pair);
    for (int64_t m = 0; m < b.rows; m += kTileM)
      pack<Mul>(from.at(m, 0), min(b.rows - m, kTileM), kTileM, depth, a + m * words);
  }

  void multiply_weight(const Block& b, int64_t i0, int64_t features, int64_t k0, int64_t depth,
                       const Scratch& s) const {
    const WeightRef& w = call.weight;
    const S* data = static_cast<const S*>(w.data) + b.group * w.group + b.o0 + i0 * w.context + k0 * w.width;
    int64_t terms = 0;
    for (int64_t i = 0; i < features; ++i, data += w.context) {
      const S* next = i + 1 < features ? data + w.context : nullptr;
      terms += multiply(b, {{data, 1, w.width}, next}, depth, s.z + i * b.padded_rows, s);
      if (terms < kFlush && next) continue;
      flush(b, s);
      terms = 0;
    }
  }

  void add_linear(const Block& b, const TensorRef& m, int64_t k0, int64_t depth, const Scratch& s) const {
    if (!m.data) return;
    const S* data = static_cast<const S*>(m.data) + b.group * m.group + b.o0 * m.row + k0 * m.col;
    multiply(b, {{data, m.row, m.col}, nullptr}, depth, nullptr, s);
    flush(b, s);
  }

  void flush(const Block& b, const Scratch& s) const {
    const int64_t count = b.padded_rows * b.vectors * L;
    for (int64_t e = 0; e < count; e += L) store(s.y + e, load<V>(s.y + e) + load<V>(s.sums + e));
    clear(s.sums, count);
  }

  // sums[row][o] += scale[row] (1 without it) * sum_k A[row, k] B[o, k]; returns the number of summation blocks.
  int64_t multiply(const Block& b, const Operand& operand, int64_t depth, const Acc* scale, const Scratch& s) const {
    const View<S>& matrix = operand.matrix;
    const int64_t words = ceil_div(depth, Mul::pair), blocks = max((words + kSumWords / 2) / kSumWords, 1),
                  step = ceil_div(words, blocks);
    const auto block = read_or_pack_b<Mul>(matrix, b.outputs, b.vectors, depth, 0, s.b);
    for (int64_t k = 0; k < words; k += step) {
      const int64_t end = min(k + step, words);
      for_panels(b.vectors, [&](auto n, int64_t first) {
        const S* next = operand.next ? operand.next + first * L : nullptr;
        multiply_panel<n.value>(b, s.a, words, k, end, block.panel(first, n, words), block.step(first, n), next,
                                matrix.k_stride, scale, s.sums + first * L);
      });
    }
    return blocks;
  }

  template <int N>
  __attribute__((noinline, flatten)) void multiply_panel(const Block& b, const Word* a, int64_t words, int64_t begin,
                                                         int64_t end, const Word* panel, int64_t stride, const S* next,
                                                         int64_t k_stride, const Acc* scale, Acc* sums) const {
    const int64_t sums_stride = b.vectors * L, rows = b.padded_rows;
    const int64_t prefetches = ceil_div((end - begin) * Mul::pair * kTileM, rows);
    const S* ahead = next ? next + begin * Mul::pair * k_stride : nullptr;
    for (int64_t m = 0; m < rows; m += kTileM) {
      for (int64_t k = 0; ahead && k < prefetches; ++k, ahead += k_stride)
        for (int64_t l = 0; l < N * L; l += 64 / int64_t(sizeof(S))) __builtin_prefetch(ahead + l, 0, 2);
      Tile<Mul, N> tile;
      multiply_block(tile, PackedA<Mul>{a + m * words}, panel, begin, end, stride);
      Acc* to = sums + m * sums_stride;
      unroll<kTileM>([&](auto r) MI_INLINED {
        const V factor = V{} + (scale ? scale[m + r] : Acc(1));
        unroll<N>([&](auto n) MI_INLINED {
          Acc* sum = to + r * sums_stride + n * L;
          store(sum, load<V>(sum) + tile.acc[r][n] * factor);
        });
      });
    }
  }

  // The bias is added last: the sums before it are then rounded relative to their own magnitude.
  void write(const Block& b, const Acc* y) const {
    const S* bias = static_cast<const S*>(call.bias.data) + b.group * call.bias.group + b.o0 * call.bias.row;
    for (int64_t row = 0; row < b.rows; ++row) {
      const int64_t dest_index = (b.group * p.rows + b.row0 + row) * p.out + b.o0;
      for (int64_t o = 0; o < b.outputs; o += L) {
        const int64_t valid = b.outputs - o;
        V sum = load<V>(y + row * b.vectors * L + o);
        if (call.bias.data && b.split == 0) sum += load_lanes<Acc>(bias + o * call.bias.row, call.bias.row, valid);
        if (plan.outer_splits > 1) {
          auto* partial = reinterpret_cast<Acc*>(executor.partials) + b.split * p.groups * p.rows * p.out;
          store_lanes<Acc>(partial + dest_index + o, 1, valid, sum);
        } else {
          store_lanes<Acc>(static_cast<S*>(call.y.data) + dest_index + o, 1, valid, sum);
        }
      }
    }
  }
};

}  // namespace

void forward_outputs(DType dtype, const ForwardCall& call, const ForwardPlan& plan, const Executor& executor) {
  run_family<ForwardOutputs>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
