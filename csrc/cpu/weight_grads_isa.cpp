// dW, dU, dV, dc: features lie in the lanes and the batch along K. The rows of dW are products g z (or g x),
// generated while packing.
#include "epilogues.h"
#include "family.h"
#include "producers.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class WeightGrads {
  using SumMul = typename SumMulOf<S>::type;

  const WeightGradsCall& call;
  const WeightGradsPlan& plan;
  const Execution& execution;
  const Problem& p = call.problem;

  // Where a result lies: row m = (o, f) and lane l at o * out + f * feature + l * lane.
  struct Layout {
    int64_t extent, out, feature, lane;
  };

 public:
  WeightGrads(const WeightGradsCall& c, const WeightGradsPlan& w, const Execution& e)
      : call(c), plan(w), execution(e) {}

  void run() {
    const bool swap = plan.context_lanes;
    const int64_t zx = p.context * p.width;
    if (call.weight.data) {
      const Operand &factor = swap ? call.x : call.z, &lanes = swap ? call.z : call.x;
      const int64_t extent = swap ? p.width : p.context;
      const Layout layout{extent, zx, swap ? 1 : p.width, swap ? p.width : 1};
      region<Mul>(plan.weight, p.out * extent, lanes, swap ? p.context : p.width, call.weight, p.out * zx, layout,
             [&](int64_t g) { return ProductRows<Mul, S>{along_batch(call.grad, g), along_batch(factor, g), extent}; });
    }
    if (call.weight_z.data)
      region<SumMul>(plan.weight_z, p.out, call.z, p.context, call.weight_z, p.out * p.context, {1, p.context, 0, 1},
             [&](int64_t g) { return MatrixRows<SumMul, S>{along_batch(call.grad, g)}; });
    if (call.weight_x.data)
      region<SumMul>(plan.weight_x, p.out, call.x, p.width, call.weight_x, p.out * p.width, {1, p.width, 0, 1},
             [&](int64_t g) { return MatrixRows<SumMul, S>{along_batch(call.grad, g)}; });
    if (call.bias.data)
      region<SumMul>(plan.bias, 1, call.grad, p.out, call.bias, p.out, {1, 0, 0, 1}, [](int64_t) { return OneRow<SumMul>{}; });
  }

 private:
  static View<S> along_batch(const Operand& t, int64_t group) {
    return {static_cast<const S*>(t.data) + group * t.group, t.col, t.row};
  }

  // result[m, l] = sum_b rows(m, b) * lanes(l, b), cut into regions that are accumulated in scratch.
  template <class M, class MakeRows>
  void region(const RegionPlan& r, int64_t rows, const Operand& lanes, int64_t lane_count, const Result& result,
              int64_t group_size, Layout layout, const MakeRows& make_rows) const {
    using Word = typename M::Word;
    using Acc = typename M::Acc;
    constexpr int L = Simd<Acc>::lanes;
    run_tasks(execution, r.tasks, [&](int64_t t, int64_t worker) {
      const int64_t split = t % r.batch_splits, block = t / r.batch_splits;
      const int64_t l0 = block % r.lane_blocks * r.vectors * L, row_task = block / r.lane_blocks;
      const int64_t m0 = row_task % r.row_blocks * r.row_step, group = row_task / r.row_blocks;
      const int64_t m1 = min(m0 + r.row_step, rows), width = min(r.vectors * L, lane_count - l0);
      const int64_t vectors = ceil_div(width, L);
      Arena arena{execution.scratch + worker * plan.worker_bytes};
      auto* row_buffer = arena.take<Word>(kRowBlock * ceil_div(r.depth, M::pair));
      auto* lane_buffer = arena.take<Word>(ceil_div(r.depth, M::pair) * r.vectors * L);
      auto* planes = arena.take<Acc>(r.row_step * r.vectors * L);
      const auto view = along_batch(lanes, group);
      const auto producer = make_rows(group);
      if (r.batch_splits == 1 && p.rows <= r.depth) {  // the sum is done in one go: straight to the result
        pack_lanes<M>(view.at(l0, 0), width, vectors, p.rows, lane_buffer);
        const StoreRows<M> store_rows{static_cast<S*>(result.data) + group * group_size, layout, l0, width};
        contract<M>(producer, m0, m1, 0, p.rows, lane_buffer, vectors, row_buffer, store_rows);
        return;
      }
      clear(planes, (m1 - m0) * vectors * L);
      const AddRows<M> add{planes, m1 - m0};
      const int64_t batch_end = min((split + 1) * r.batch_step, p.rows);
      for (int64_t b = split * r.batch_step; b < batch_end; b += r.depth) {
        const int64_t depth = min(r.depth, batch_end - b);
        pack_lanes<M>(view.at(l0, b), width, vectors, depth, lane_buffer);
        contract<M>(producer, m0, m1, b, depth, lane_buffer, vectors, row_buffer, Shifted<AddRows<M>>{add, -m0});
      }
      if (r.batch_splits > 1) {
        auto* partial = reinterpret_cast<Acc*>(execution.partials) + (split * p.groups + group) * group_size;
        write(planes, m0, m1, l0, vectors, width, partial, layout);
      } else {
        write(planes, m0, m1, l0, vectors, width, static_cast<S*>(result.data) + group * group_size, layout);
      }
    });
    if (r.batch_splits > 1)
      sum_splits(execution, reinterpret_cast<const Acc*>(execution.partials), r.batch_splits,
                                  p.groups * group_size, static_cast<S*>(result.data));
  }

  // A row of lanes to where it belongs in the result.
  template <class Acc, class Out>
  static MI_INLINE void store_row(Out* out, const Layout& layout, int64_t m, int64_t lane, int64_t valid,
                                  const Vec<Acc>& value) {
    constexpr int L = Simd<Acc>::lanes;
    const int64_t o = m / layout.extent, f = m - o * layout.extent;
    Out* to = out + o * layout.out + f * layout.feature + lane * layout.lane;
    if (valid >= L && layout.lane == 1) {
      store_acc<L>(to, value);
    } else {
      Acc values[L];
      store(values, value);
      for (int64_t l = 0; l < min(valid, L); ++l) from_acc(values[l], to[l * layout.lane]);
    }
  }

  template <class M>
  struct StoreRows {
    using Acc = typename M::Acc;
    static constexpr int L = Simd<Acc>::lanes;
    S* out;
    Layout layout;
    int64_t l0, width;
    template <int N>
    MI_INLINE void operator()(const Tile<M, N>& tile, int64_t m, int64_t valid, int64_t first) const {
      unroll<kRows>([&](auto r) {
        if (r < valid) {
          unroll<N>([&](auto n) {
            const int64_t lane = (first + n) * L;
            store_row<Acc>(out, layout, m + r, l0 + lane, width - lane, tile.acc[r][n]);
          });
        }
      });
    }
  };

  template <class Acc, class Out>
  static void write(const Acc* planes, int64_t m0, int64_t m1, int64_t l0, int64_t vectors, int64_t width, Out* out,
                    Layout layout) {
    constexpr int L = Simd<Acc>::lanes;
    for_strips(vectors, [&](auto n, int64_t first) {
      const Acc* strip = planes + first * L * (m1 - m0);
      for (int64_t m = m0; m < m1; ++m) {
        for (int v = 0; v < n; ++v) {
          const int64_t lane = (first + v) * L;
          store_row<Acc>(out, layout, m, l0 + lane, width - lane, load<Vec<Acc>>(strip + ((m - m0) * n + v) * L));
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
