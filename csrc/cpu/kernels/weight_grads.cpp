// dW, dU, dV, dc: features lie in the lanes and the batch along K. The rows of dW are products g z (or g x),
// generated a block at a time.
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
  const Execution& execution;
  const ProblemSize& p = call.problem;

  // Where a result lies: row m = (o, f) and lane l at o * out + f * feature + l * lane.
  struct Layout {
    int64_t extent, out, feature, lane;
  };
  // Rows of one task: all pairs of these outputs and features; and the stretch of the batch that is summed.
  struct Block {
    int64_t group, o0, outputs, f0, features, b0, depth;
  };

 public:
  WeightGrads(const WeightGradsCall& c, const WeightGradsPlan& w, const Execution& e)
      : call(c), plan(w), execution(e) {}

  void run() {
    if (call.weight.data) plan.weight.wide ? weight<SumMul>() : weight<Mul>();
    if (call.weight_z.data)
      plan.weight_z.wide ? matrix<SumMul>(plan.weight_z, call.z, p.context, call.weight_z)
                         : matrix<Mul>(plan.weight_z, call.z, p.context, call.weight_z);
    if (call.weight_x.data)
      plan.weight_x.wide ? matrix<SumMul>(plan.weight_x, call.x, p.width, call.weight_x)
                         : matrix<Mul>(plan.weight_x, call.x, p.width, call.weight_x);
    if (call.bias.data) column_sums(plan.bias);
  }

 private:
  template <class M>
  void weight() const {
    const bool swap = plan.context_lanes;
    const int64_t zx = p.context * p.width;
    const TensorRef &factor = swap ? call.x : call.z, &lanes = swap ? call.z : call.x;
    const Layout layout{swap ? p.width : p.context, zx, swap ? 1 : p.width, swap ? p.width : 1};
    region<M>(plan.weight, lanes, swap ? p.context : p.width, call.weight, p.out * zx, layout,
              [&](const Block& b, Arena& arena) { return products<M>(b, factor, arena); });
  }

  // dU or dV.
  template <class M>
  void matrix(const RegionPlan& r, const TensorRef& lanes, int64_t features, const Result& result) const {
    region<M>(r, lanes, features, result, p.out * features, {1, features, 0, 1},
              [&](const Block& b, Arena&) { return MatrixRows<M, S>{along_batch(call.grad, b.group).at(b.o0, b.b0)}; });
  }

  static View<S> along_batch(const TensorRef& t, int64_t group) {
    return {static_cast<const S*>(t.data) + group * t.group, t.col, t.row};
  }

  // Both factors with the batch contiguous, so that a generated row is a product of two vectors.
  template <class M>
  ProductRows<M> products(const Block& b, const TensorRef& factor, Arena& arena) const {
    const int64_t stride = ProductRows<M>::padded(b.depth);
    auto* grad = arena.take<typename M::Acc>(b.outputs * stride);
    auto* values = arena.take<typename M::Acc>(b.features * stride);
    using Plain = typename AccMul<M>::type;
    pack<Plain>(rows_view<S>(call.grad, b.group).at(b.b0, b.o0), b.depth, stride, b.outputs, grad);
    pack<Plain>(rows_view<S>(factor, b.group).at(b.b0, b.f0), b.depth, stride, b.features, values);
    return {grad, values, stride, b.features};
  }

  // dc, in double for float from the first row on: of equal rows, as y.sum() makes them, PyTorch's sum of parts is
  // exact or nearly so.
  void column_sums(const RegionPlan& r) const {
    using Acc = typename Mul::Acc;
    using Sum = typename SumMul::Acc;
    constexpr int L = Simd<Acc>::lanes;
    using V = Vec<Sum, L>;
    constexpr int64_t kChain = 16;  // rows to a visit of the sums
    run_tasks(execution, r.tasks, [&](int64_t t, int64_t worker) {
      const int64_t split = t % r.batch_splits, block = t / r.batch_splits, lanes = r.vectors * Simd<Sum>::lanes;
      const int64_t l0 = block % r.lane_blocks * lanes, group = block / r.lane_blocks, width = min(lanes, p.out - l0);
      auto* sums = reinterpret_cast<Sum*>(execution.scratch + worker * plan.worker_bytes);
      clear(sums, ceil_div(width, L) * L);
      const auto grad = along_batch(call.grad, group);
      const int64_t end = min((split + 1) * r.batch_step, p.rows);
      for (int64_t b = split * r.batch_step; b < end; b += kChain) {
        for (int64_t l = 0; l < width; l += L) {
          const int64_t at = max(min(l, width - L), 0);  // whole vectors: the last one meets lanes again
          V chain{};
          for (int64_t k = b; k < min(b + kChain, end); ++k)
            chain += __builtin_convertvector(load_lanes<Acc>(&grad(l0 + at, k), grad.w_stride, width - at), V);
          for (int64_t i = l - at; i < L; ++i) sums[at + i] += chain[i];
        }
      }
      const int64_t offset = group * p.out + l0;
      auto* partial = reinterpret_cast<Sum*>(execution.partials) + split * p.groups * p.out + offset;
      auto* out = static_cast<S*>(call.bias.data) + offset;
      for (int64_t l = 0; l < width; ++l) r.batch_splits > 1 ? void(partial[l] = sums[l]) : from_acc(sums[l], out[l]);
    });
    if (r.batch_splits > 1)
      sum_splits(execution, reinterpret_cast<const Sum*>(execution.partials), r.batch_splits, p.groups * p.out,
                 static_cast<S*>(call.bias.data));
  }

  // result[m, l] = sum_b rows(m, b) * lanes(l, b), cut into regions that are accumulated in scratch.
  template <class M, class MakeRows>
  void region(const RegionPlan& r, const TensorRef& lanes, int64_t lane_count, const Result& result, int64_t group_size,
              const Layout& whole, const MakeRows& make_rows) const {
    using Word = typename M::Word;
    using Acc = typename M::Acc;
    constexpr int L = Simd<Acc>::lanes;
    run_tasks(execution, r.tasks, [&](int64_t t, int64_t worker) {
      const int64_t split = t % r.batch_splits, block = t / r.batch_splits;
      const int64_t l0 = block % r.lane_blocks * r.vectors * L, row_task = block / r.lane_blocks;
      const int64_t row_block = row_task % r.row_blocks;
      Block b{};
      b.group = row_task / r.row_blocks;
      b.o0 = row_block / r.feature_blocks * r.out_step, b.outputs = min(r.out_step, r.outputs - b.o0);
      b.f0 = row_block % r.feature_blocks * r.feature_step, b.features = min(r.feature_step, r.extent - b.f0);
      const int64_t rows = b.outputs * b.features, width = min(r.vectors * L, lane_count - l0);
      const int64_t vectors = ceil_div(width, L);
      Arena arena{execution.scratch + worker * plan.worker_bytes};
      auto* row_buffer = arena.take<Word>(kRowBlock * ceil_div(r.depth, M::pair));
      auto* lane_buffer = arena.take<Word>(ceil_div(r.depth, M::pair) * r.vectors * L);
      auto* planes = arena.take<Acc>(r.row_step * r.vectors * L);
      const Layout layout{b.features, whole.out, whole.feature, whole.lane};
      const int64_t offset = b.group * group_size + b.o0 * whole.out + b.f0 * whole.feature;
      auto* out = static_cast<S*>(result.data) + offset;
      const auto sum = [&](int64_t begin, int64_t end, const auto& epilogue) {
        b.b0 = begin, b.depth = min(r.depth, end - begin);
        Arena rest = arena;
        pack_lanes<M>(along_batch(lanes, b.group).at(l0, begin), width, vectors, b.depth, lane_buffer);
        contract<M>(make_rows(b, rest), 0, rows, 0, b.depth, lane_buffer, vectors, row_buffer, epilogue);
      };
      // The sum is done in one go: straight to the result.
      if (r.batch_splits == 1 && p.rows <= r.depth) return sum(0, p.rows, StoreRows<M>{out, layout, l0, width});
      clear(planes, rows * vectors * L);
      const int64_t batch_end = min((split + 1) * r.batch_step, p.rows);
      for (int64_t begin = split * r.batch_step; begin < batch_end; begin += r.depth)
        sum(begin, batch_end, AddRows<M>{planes, rows});
      if (r.batch_splits > 1)
        write(planes, rows, l0, vectors, width,
              reinterpret_cast<Acc*>(execution.partials) + split * p.groups * group_size + offset, layout);
      else
        write(planes, rows, l0, vectors, width, out, layout);
    });
    if (r.batch_splits > 1)
      sum_splits(execution, reinterpret_cast<const Acc*>(execution.partials), r.batch_splits, p.groups * group_size,
                 static_cast<S*>(result.data));
  }

  // Walks over the rows of the result from m on, with one division for all of them.
  template <class Out>
  struct Cursor {
    const Layout& layout;
    int64_t feature;
    Out* row;
    Cursor(Out* out, const Layout& l, int64_t m) : layout(l), feature(m % l.extent) {
      row = out + m / l.extent * l.out + feature * l.feature;
    }
    MI_INLINE void next() {
      row += layout.feature;
      if (++feature == layout.extent) feature = 0, row += layout.out - layout.extent * layout.feature;
    }
  };

  template <class M>
  struct StoreRows {
    using Acc = typename M::Acc;
    static constexpr int L = Simd<Acc>::lanes;
    S* out;
    Layout layout;
    int64_t l0, width;
    template <int N>
    MI_INLINE void operator()(const Tile<M, N>& tile, int64_t m, int64_t valid, int64_t first) const {
      Cursor<S> to(out, layout, m);
      unroll<kRows>([&](auto r) {
        if (r < valid) {
          unroll<N>([&](auto n) {
            const int64_t lane = (first + n) * L;
            store_lanes<Acc>(to.row + (l0 + lane) * layout.lane, layout.lane, width - lane, tile.acc[r][n]);
          });
          to.next();
        }
      });
    }
  };

  template <class Acc, class Out>
  static void write(const Acc* planes, int64_t rows, int64_t l0, int64_t vectors, int64_t width, Out* out,
                    const Layout& layout) {
    constexpr int L = Simd<Acc>::lanes;
    for_strips(vectors, [&](auto n, int64_t first) {
      const Acc* strip = planes + first * L * rows;
      Cursor<Out> to(out, layout, 0);
      for (int64_t m = 0; m < rows; ++m, to.next()) {
        for (int v = 0; v < n; ++v) {
          const int64_t lane = (first + v) * L;
          store_lanes<Acc>(to.row + (l0 + lane) * layout.lane, layout.lane, width - lane,
                           load<Vec<Acc>>(strip + (m * n + v) * L));
        }
      }
    });
  }
};

}  // namespace

void weight_grads(DType dtype, const WeightGradsCall& call, const WeightGradsPlan& plan, const Execution& execution) {
  run_family<WeightGrads>(dtype, call, plan, execution);
}

}  // namespace mi_kernels::MI_ISA
