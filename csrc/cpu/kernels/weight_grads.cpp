// dW, dU, dV and dc with features in the lanes, K being the batch. Rows of A for dW are products g z (or g x), which
// are generated one block at a time.
#include "cpu/engine/epilogues.h"
#include "cpu/engine/producers.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class WeightGrads {
  using SumMul = typename SumMulOf<S>::type;

  const WeightGradsCall& call;
  const WeightGradsPlan& plan;
  const Executor& executor;
  const ProblemSize& p = call.problem;

  // The strides of a result: row m = (o, f) and lane l are at o * out + f * feature + l * lane.
  struct Layout {
    int64_t extent, out, feature, lane;
  };
  // Rows of one task, all pairs of these outputs and features, and the part of the batch that is summed.
  struct Block {
    int64_t group, o0, outputs, f0, features, b0, depth;
  };

 public:
  WeightGrads(const WeightGradsCall& c, const WeightGradsPlan& w, const Executor& e) : call(c), plan(w), executor(e) {}

  void run() {
    if (call.weight.data) plan.weight.wide ? weight<SumMul>() : weight<Mul>();
    if (call.weight_z.data)
      plan.weight_z.wide ? matrix<SumMul>(plan.weight_z, call.z, p.context, 0, call.weight_z)
                         : matrix<Mul>(plan.weight_z, call.z, p.context, 0, call.weight_z);
    if (call.weight_x.data)
      plan.weight_x.wide ? matrix<SumMul>(plan.weight_x, call.x, p.width, call.one, call.weight_x)
                         : matrix<Mul>(plan.weight_x, call.x, p.width, call.one, call.weight_x);
    if (call.bias.data) column_sums(plan.bias);
  }

 private:
  template <class M>
  void weight() const {
    const bool context_lanes = plan.context_lanes;
    const int64_t zx = p.context * p.width;
    const TensorRef &factor = context_lanes ? call.x : call.z, &lanes = context_lanes ? call.z : call.x;
    const Layout layout{context_lanes ? p.width : p.context, zx, context_lanes ? 1 : p.width,
                        context_lanes ? p.width : 1};
    region<M>(plan.weight, lanes, context_lanes ? p.context : p.width, 0, call.weight, p.out * zx, layout,
              [&](const Block& b, ScratchAllocator& scratch) { return products<M>(b, factor, scratch); });
  }

  // dU or dV, with `one` more column where the inputs have one more feature, which is 1.
  template <class M>
  void matrix(const RegionPlan& r, const TensorRef& lanes, int64_t features, int64_t one,
              const OutputRef& result) const {
    const int64_t columns = features + one;
    region<M>(r, lanes, features, one, result, p.out * columns, {1, columns, 0, 1},
              [&](const Block& b, ScratchAllocator&) {
                return MatrixProducer<M, S>{feature_view(call.grad, b.group).at(b.o0, b.b0)};
              });
  }

  static View<S> feature_view(const TensorRef& t, int64_t group) {
    return {static_cast<const S*>(t.data) + group * t.group, t.col, t.row};
  }

  // Transposes both factors, so that a generated row is the product of two vectors along the batch.
  template <class M>
  ProductProducer<M> products(const Block& b, const TensorRef& factor, ScratchAllocator& scratch) const {
    const int64_t stride = ProductProducer<M>::padded(b.depth);
    auto* grad = scratch.allocate<typename M::Acc>(b.outputs * stride);
    auto* values = scratch.allocate<typename M::Acc>(b.features * stride);
    using PackAcc = typename AccMul<M>::type;
    pack<PackAcc>(batch_view<S>(call.grad, b.group).at(b.b0, b.o0), b.depth, stride, b.outputs, grad);
    pack<PackAcc>(batch_view<S>(factor, b.group).at(b.b0, b.f0), b.depth, stride, b.features, values);
    return {grad, values, stride, b.features};
  }

  // dc. For float all sums are in double: where the rows are equal, as for the gradient of y.sum(), PyTorch's pairwise
  // sum is exact or nearly so.
  void column_sums(const RegionPlan& r) const {
    using Acc = typename Mul::Acc;
    using Sum = typename SumMul::Acc;
    constexpr int L = Simd<Acc>::lanes;
    using V = Vec<Sum, L>;
    constexpr int64_t kSumBlock = 16;  // rows
    run_tasks(executor, r.tasks, [&](int64_t t, int64_t worker) {
      const int64_t split = t % r.batch_splits, block = t / r.batch_splits, lane_step = r.vectors * Simd<Sum>::lanes;
      const int64_t l0 = block % r.lane_blocks * lane_step, group = block / r.lane_blocks,
                    lane_count = min(lane_step, p.out - l0);
      auto* sums = reinterpret_cast<Sum*>(executor.scratch + worker * plan.worker_bytes);
      clear(sums, ceil_div(lane_count, L) * L);
      const auto grad = feature_view(call.grad, group);
      const int64_t end = min((split + 1) * r.batch_step, p.rows);
      for (int64_t b = split * r.batch_step; b < end; b += kSumBlock) {
        for (int64_t l = 0; l < lane_count; l += L) {
          const int64_t at = max(min(l, lane_count - L), 0);  // the last vector overlaps the one before
          V block_sum{};
          for (int64_t k = b; k < min(b + kSumBlock, end); ++k)
            block_sum +=
                __builtin_convertvector(load_lanes<Acc>(&grad(l0 + at, k), grad.mn_stride, lane_count - at), V);
          for (int64_t i = l - at; i < L; ++i) sums[at + i] += block_sum[i];
        }
      }
      const int64_t offset = group * p.out + l0;
      auto* partial = reinterpret_cast<Sum*>(executor.partials) + split * p.groups * p.out + offset;
      auto* out = static_cast<S*>(call.bias.data) + offset;
      for (int64_t l = 0; l < lane_count; ++l)
        r.batch_splits > 1 ? void(partial[l] = sums[l]) : from_acc(sums[l], out[l]);
    });
    if (r.batch_splits > 1)
      sum_splits(executor, reinterpret_cast<const Sum*>(executor.partials), r.batch_splits, p.groups * p.out,
                 static_cast<S*>(call.bias.data));
  }

  // result[m, l] = sum_b A[m, b] * lanes[l, b], in regions that are accumulated in scratch memory. `one`: there is one
  // more lane, of ones.
  template <class M, class MakeProducer>
  void region(const RegionPlan& r, const TensorRef& lanes, int64_t features, int64_t one, const OutputRef& result,
              int64_t group_size, const Layout& whole, const MakeProducer& make_producer) const {
    using Word = typename M::Word;
    using Acc = typename M::Acc;
    constexpr int L = Simd<Acc>::lanes;
    run_tasks(executor, r.tasks, [&](int64_t t, int64_t worker) {
      const int64_t split = t % r.batch_splits, block = t / r.batch_splits;
      const int64_t l0 = block % r.lane_blocks * r.vectors * L, row_task = block / r.lane_blocks;
      const int64_t row_block = row_task % r.row_blocks;
      Block b{};
      b.group = row_task / r.row_blocks;
      b.o0 = row_block / r.feature_blocks * r.out_step, b.outputs = min(r.out_step, r.outputs - b.o0);
      b.f0 = row_block % r.feature_blocks * r.feature_step, b.features = min(r.feature_step, r.extent - b.f0);
      const int64_t rows = b.outputs * b.features, lane_count = min(r.vectors * L, features + one - l0);
      const int64_t vectors = ceil_div(lane_count, L);
      ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
      auto* packed_a = scratch.allocate<Word>(kBlockM * ceil_div(r.depth, M::pair));
      auto* packed_b = scratch.allocate<Word>(ceil_div(r.depth, M::pair) * r.vectors * L);
      auto* panels = scratch.allocate<Acc>(r.row_step * r.vectors * L);
      const Layout layout{b.features, whole.out, whole.feature, whole.lane};
      const int64_t offset = b.group * group_size + b.o0 * whole.out + b.f0 * whole.feature;
      auto* out = static_cast<S*>(result.data) + offset;
      const auto sum = [&](int64_t begin, int64_t end, const auto& epilogue) {
        b.b0 = begin, b.depth = min(r.depth, end - begin);
        ScratchAllocator rest = scratch;
        const auto block = read_or_pack_b<M>(feature_view(lanes, b.group).at(l0, begin), min(lane_count, features - l0),
                                             vectors, b.depth, rows, packed_b);
        if (one) fill_with_ones<M, S>(features - l0, vectors, b.depth, packed_b);
        gemm<M>(make_producer(b, rest), 0, rows, 0, b.depth, block, vectors, packed_a, epilogue);
      };
      // A sum with a single block is stored directly.
      if (r.batch_splits == 1 && p.rows <= r.depth) return sum(0, p.rows, StoreRegion<M>{out, layout, l0, lane_count});
      clear(panels, rows * vectors * L);
      const int64_t batch_end = min((split + 1) * r.batch_step, p.rows);
      for (int64_t begin = split * r.batch_step; begin < batch_end; begin += r.depth)
        sum(begin, batch_end, Accumulate<M>{panels, rows});
      if (r.batch_splits > 1)
        write(panels, rows, l0, vectors, lane_count,
              reinterpret_cast<Acc*>(executor.partials) + split * p.groups * group_size + offset, layout);
      else
        write(panels, rows, l0, vectors, lane_count, out, layout);
    });
    if (r.batch_splits > 1)
      sum_splits(executor, reinterpret_cast<const Acc*>(executor.partials), r.batch_splits, p.groups * group_size,
                 static_cast<S*>(result.data));
  }

  // Iterates over the rows of the result from m on, with a single division.
  template <class Out>
  struct RowIterator {
    const Layout& layout;
    int64_t feature;
    Out* row;
    RowIterator(Out* out, const Layout& l, int64_t m) : layout(l), feature(m % l.extent) {
      row = out + m / l.extent * l.out + feature * l.feature;
    }
    MI_INLINE void next() {
      row += layout.feature;
      if (++feature == layout.extent) feature = 0, row += layout.out - layout.extent * layout.feature;
    }
  };

  template <class M>
  struct StoreRegion {
    using Acc = typename M::Acc;
    static constexpr int L = Simd<Acc>::lanes;
    S* out;
    Layout layout;
    int64_t l0, lane_count;
    template <int N>
    MI_INLINE void operator()(const Tile<M, N>& tile, int64_t m, int64_t valid, int64_t first) const {
      RowIterator<S> dest(out, layout, m);
      // After a short sum storing takes as long as the sum: whole tiles go straight from the registers.
      if (valid == kTileM && layout.lane == 1 && (first + N) * L <= lane_count) {
        const int64_t lane = l0 + first * L;
        return unroll<kTileM>([&](auto r) MI_INLINED {
          unroll<N>([&](auto n) MI_INLINED { store_acc<L>(dest.row + lane + n * L, tile.acc[r][n]); });
          dest.next();
        });
      }
      unroll<kTileM>([&](auto r) MI_INLINED {
        if (r < valid) {
          unroll<N>([&](auto n) MI_INLINED {
            const int64_t lane = (first + n) * L;
            store_lanes<Acc>(dest.row + (l0 + lane) * layout.lane, layout.lane, lane_count - lane, tile.acc[r][n]);
          });
          dest.next();
        }
      });
    }
  };

  template <class Acc, class Out>
  static void write(const Acc* panels, int64_t rows, int64_t l0, int64_t vectors, int64_t lane_count, Out* out,
                    const Layout& layout) {
    constexpr int L = Simd<Acc>::lanes;
    for_panels(vectors, [&](auto n, int64_t first) {
      const Acc* panel = panels + first * L * rows;
      RowIterator<Out> dest(out, layout, 0);
      for (int64_t m = 0; m < rows; ++m, dest.next()) {
        for (int v = 0; v < n; ++v) {
          const int64_t lane = (first + v) * L;
          store_lanes<Acc>(dest.row + (l0 + lane) * layout.lane, layout.lane, lane_count - lane,
                           load<Vec<Acc>>(panel + (m * n + v) * L));
        }
      }
    });
  }
};

}  // namespace

void weight_grads(DType dtype, const WeightGradsCall& call, const WeightGradsPlan& plan, const Executor& executor) {
  plan.outer ? weight_grads_outer(dtype, call, plan, executor) : run_family<WeightGrads>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
