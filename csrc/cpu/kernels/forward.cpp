// y = z^T W x + U z + V x + c with the batch in the lanes. Rows of A are W[(o, outer), inner]: the product sums over
// the inner feature axis, and the epilogue multiplies by the other input and sums over the outer axis. U z, V x and c
// are added to the same accumulators.
#include "cpu/engine/epilogues.h"
#include "cpu/engine/producers.h"
#include "cpu/kernels/family.h"
#include "cpu/kernels/gate_epilogue.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class Forward {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using PackAcc = typename AccMul<Mul>::type;
  static constexpr int L = Simd<Acc>::lanes;

  const ForwardCall& call;
  const ForwardPlan& plan;
  const Executor& executor;
  const ProblemSize& p = call.problem;
  const bool width_inside = plan.order == Order::width_inside;
  const int64_t inner = width_inside ? p.width : p.context;
  const int64_t outer = width_inside ? p.context : p.width;
  const TensorRef &inner_input = width_inside ? call.x : call.z, &outer_input = width_inside ? call.z : call.x;
  const TensorRef& shift_weight = call.gate.shift_weight;
  const bool has_shift = call.gate.shift_weight.data || call.gate.shift_bias.data;
  const TensorRef& inner_matrix = width_inside ? call.weight_x : call.weight_z;
  const TensorRef& outer_matrix = width_inside ? call.weight_z : call.weight_x;

 public:
  Forward(const ForwardCall& c, const ForwardPlan& f, const Executor& e) : call(c), plan(f), executor(e) {}

  void run() {
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    if (plan.outer_splits > 1) add_partials();
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t split = t % plan.outer_splits, block = t / plan.outer_splits;
    const int64_t o0 = block % plan.out_blocks * plan.out_step, lane_task = block / plan.out_blocks;
    const int64_t lane0 = lane_task % plan.lane_blocks * plan.vectors * L, group = lane_task / plan.lane_blocks;
    const int64_t outputs = min(plan.out_step, p.out - o0), lane_count = min(plan.vectors * L, p.rows - lane0);
    const int64_t vectors = ceil_div(lane_count, L);

    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    auto* packed_a = scratch.allocate<Word>(kBlockM * ceil_div(plan.depth, Mul::pair));
    auto* packed_b = scratch.allocate<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* y = scratch.allocate<Acc>(plan.out_step * plan.vectors * L);
    auto* outer_panels = scratch.allocate<Acc>(plan.outer_step * plan.vectors * L);
    const int64_t panel_size = call.gate.present ? plan.out_step * plan.vectors * L : 0;
    auto *x = scratch.allocate<Acc>(panel_size), *shift = scratch.allocate<Acc>(has_shift ? panel_size : 0);

    clear(y, outputs * vectors * L);
    if (has_shift) clear(shift, outputs * vectors * L);
    const Accumulate<Mul> add{y, outputs}, add_shift{shift, outputs};
    const auto inner_view = batch_view<S>(inner_input, group), outer_view = batch_view<S>(outer_input, group);
    const int64_t i0 = split * plan.outer_step, extent = min(plan.outer_step, outer - i0);
    if (call.weight.data && extent > 0)
      pack_b<PackAcc>(outer_view.at(lane0, i0), lane_count, vectors, extent, outer_panels);
    const TensorRef none, &inner_shift = width_inside ? none : shift_weight,
                          &outer_shift = width_inside ? shift_weight : none;
    const auto linear = [&](const TensorRef& m, int64_t k0, int64_t depth, const Accumulate<Mul>& to) {
      if (m.data && split == 0) add_linear(m, group, o0, outputs, k0, depth, packed_b, vectors, packed_a, to);
    };
    for (int64_t k0 = 0; k0 < inner && (call.weight.data || inner_matrix.data || inner_shift.data); k0 += plan.depth) {
      const int64_t depth = min(plan.depth, inner - k0);
      pack_b<Mul>(inner_view.at(lane0, k0), lane_count, vectors, depth, packed_b);
      if (call.weight.data)
        multiply_weight(group, o0, outputs, i0, extent, k0, depth, packed_b, vectors, packed_a, y, outer_panels);
      linear(inner_matrix, k0, depth, add);
      linear(inner_shift, k0, depth, add_shift);
    }
    for (int64_t k0 = 0; k0 < outer && split == 0 && (outer_matrix.data || outer_shift.data); k0 += plan.depth) {
      const int64_t depth = min(plan.depth, outer - k0);
      pack_b<Mul>(outer_view.at(lane0, k0), lane_count, vectors, depth, packed_b);
      linear(outer_matrix, k0, depth, add);
      linear(outer_shift, k0, depth, add_shift);
    }
    if (split == 0) add_bias(call.bias, y, group, o0, outputs, vectors);
    const int64_t offset = (group * p.rows + lane0) * p.out + o0;
    if (call.gate.present) {
      add_bias(call.gate.shift_bias, shift, group, o0, outputs, vectors);
      pack_b<PackAcc>(batch_view<S>(call.x, group).at(lane0, o0), lane_count, vectors, outputs, x);
      if (call.gate.pre_activation.data)
        unpack_panels(y, outputs, vectors, lane_count, static_cast<S*>(call.gate.pre_activation.data) + offset, p.out);
      gate_panels(call.gate, y, x, has_shift ? shift : nullptr, outputs, vectors);
    }
    if (plan.outer_splits > 1) {
      auto* partial = reinterpret_cast<Acc*>(executor.partials) + split * p.groups * p.rows * p.out;
      unpack_panels(y, outputs, vectors, lane_count, partial + offset, p.out);
    } else {
      unpack_panels(y, outputs, vectors, lane_count, static_cast<S*>(call.y.data) + offset, p.out);
    }
  }

  // The bias is added last: the sums before it are then rounded relative to their own magnitude.
  void add_bias(const TensorRef& from, Acc* y, int64_t group, int64_t o0, int64_t outputs, int64_t vectors) const {
    if (!from.data) return;
    const S* bias = static_cast<const S*>(from.data) + group * from.group;
    for_panels(vectors, [&](auto n, int64_t first) {
      Acc* panel = y + first * L * outputs;
      for (int64_t o = 0; o < outputs; ++o) {
        const Acc value = to_acc(bias[(o0 + o) * from.row]);
        for (int l = 0; l < n * L; ++l) panel[o * n * L + l] += value;
      }
    });
  }

  void add_linear(const TensorRef& m, int64_t group, int64_t o0, int64_t outputs, int64_t k0, int64_t depth,
                  const Word* packed_b, int64_t vectors, Word* packed_a, const Accumulate<Mul>& add) const {
    const S* data = static_cast<const S*>(m.data) + group * m.group + o0 * m.row;
    if (call.weight.data)  // a small part of the work
      gemm<Mul>(MatrixProducer<Mul, S>{{data, m.row, m.col}}, 0, outputs, k0, depth, packed_b, vectors, packed_a, add);
    else
      gemm<Mul>(WeightProducer<Mul, S>{data, m.row * outputs, m.row, m.col, outputs}, 0, outputs, k0, depth, packed_b,
                vectors, packed_a, add);
  }

  void multiply_weight(int64_t group, int64_t o0, int64_t outputs, int64_t i0, int64_t extent, int64_t k0,
                       int64_t depth, const Word* packed_b, int64_t vectors, Word* packed_a, Acc* y,
                       const Acc* outer_panels) const {
    const ReduceOuter<Mul> reduce{y, outer_panels, outputs, extent};
    const auto multiply = [&](const auto& all) {  // all: rows (o, i) from (o0, i0) on
      if (extent == outer) return gemm<Mul>(all, 0, outputs * extent, k0, depth, packed_b, vectors, packed_a, reduce);
      for (int64_t o = 0; o < outputs; ++o) {  // a part of the outer axis: rows are contiguous for one output only
        auto one = all;
        one.data += o * all.out_stride;
        one.out_stride = extent * all.row_stride;
        gemm<Mul>(one, 0, extent, k0, depth, packed_b, vectors, packed_a,
                  OffsetRows<ReduceOuter<Mul>>{reduce, o * extent});
      }
    };
    if (call.packed_weight.data) {
      using Elem = typename Mul::Elem;
      const int64_t row = call.packed_weight.row;
      multiply(WeightProducer<Mul, Elem>{static_cast<const Elem*>(call.packed_weight.data) + (o0 * outer + i0) * row,
                                         outer * row, row, 1, extent, row % Mul::pair == 0});
    } else {
      const int64_t outer_stride = width_inside ? p.width : 1, inner_stride = width_inside ? 1 : p.width;
      const S* data = static_cast<const S*>(call.weight.data) + group * call.weight.group + o0 * p.context * p.width +
                      i0 * outer_stride;
      multiply(WeightProducer<Mul, S>{data, p.context * p.width, outer_stride, inner_stride, extent});
    }
  }

  void add_partials() const {
    const Acc* partials = reinterpret_cast<const Acc*>(executor.partials);
    sum_splits(executor, partials, plan.outer_splits, p.groups * p.rows * p.out, static_cast<S*>(call.y.data));
  }
};

}  // namespace

void forward(DType dtype, const ForwardCall& call, const ForwardPlan& plan, const Executor& executor) {
  if (plan.order == Order::stream)
    forward_stream(dtype, call, plan, executor);
  else
    run_family<Forward>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
