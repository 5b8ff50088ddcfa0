// y = z^T W x + U z + V x + c: the batch lies in the lanes, rows are W[(o, outer), inner] with one feature axis
// summed inside the product and the other one, times its operand, by the epilogue. U, V and c join the same
// accumulators, so that the whole formula is one pass.
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
  using Plain = typename AccMul<Mul>::type;
  static constexpr int L = Simd<Acc>::lanes;

  const ForwardCall& call;
  const ForwardPlan& plan;
  const Execution& execution;
  const ProblemSize& p = call.problem;
  const bool width_inside = plan.order == Order::width_inside;
  const int64_t inner = width_inside ? p.width : p.context;
  const int64_t outer = width_inside ? p.context : p.width;
  const TensorRef &inner_operand = width_inside ? call.x : call.z, &outer_operand = width_inside ? call.z : call.x;
  const TensorRef& shift_weight = call.gate.shift_weight;
  const bool shift_there = call.gate.shift_weight.data || call.gate.shift_bias.data;
  const TensorRef& inner_matrix = width_inside ? call.weight_x : call.weight_z;
  const TensorRef& outer_matrix = width_inside ? call.weight_z : call.weight_x;

 public:
  Forward(const ForwardCall& c, const ForwardPlan& f, const Execution& e) : call(c), plan(f), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    if (plan.outer_splits > 1) add_partials();
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t split = t % plan.outer_splits, block = t / plan.outer_splits;
    const int64_t o0 = block % plan.out_blocks * plan.out_step, lane_task = block / plan.out_blocks;
    const int64_t lane0 = lane_task % plan.lane_blocks * plan.vectors * L, group = lane_task / plan.lane_blocks;
    const int64_t outputs = min(plan.out_step, p.out - o0), width = min(plan.vectors * L, p.rows - lane0);
    const int64_t vectors = ceil_div(width, L);

    Arena arena{execution.scratch + worker * plan.worker_bytes};
    auto* rows = arena.take<Word>(kRowBlock * ceil_div(plan.depth, Mul::pair));
    auto* lanes = arena.take<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* y = arena.take<Acc>(plan.out_step * plan.vectors * L);
    auto* factors = arena.take<Acc>(plan.outer_step * plan.vectors * L);
    const int64_t plane = call.gate.present ? plan.out_step * plan.vectors * L : 0;
    auto *x = arena.take<Acc>(plane), *shift = arena.take<Acc>(shift_there ? plane : 0);

    clear(y, outputs * vectors * L);
    if (shift_there) clear(shift, outputs * vectors * L);
    const AddRows<Mul> add{y, outputs}, add_shift{shift, outputs};
    const auto inner_view = rows_view<S>(inner_operand, group), outer_view = rows_view<S>(outer_operand, group);
    const int64_t i0 = split * plan.outer_step, extent = min(plan.outer_step, outer - i0);
    if (call.weight.data && extent > 0) pack_lanes<Plain>(outer_view.at(lane0, i0), width, vectors, extent, factors);
    const TensorRef none, &inner_shift = width_inside ? none : shift_weight,
                          &outer_shift = width_inside ? shift_weight : none;
    const auto linear = [&](const TensorRef& m, int64_t k0, int64_t depth, const AddRows<Mul>& to) {
      if (m.data && split == 0) add_linear(m, group, o0, outputs, k0, depth, lanes, vectors, rows, to);
    };
    for (int64_t k0 = 0; k0 < inner && (call.weight.data || inner_matrix.data || inner_shift.data); k0 += plan.depth) {
      const int64_t depth = min(plan.depth, inner - k0);
      pack_lanes<Mul>(inner_view.at(lane0, k0), width, vectors, depth, lanes);
      if (call.weight.data) product(group, o0, outputs, i0, extent, k0, depth, lanes, vectors, rows, y, factors);
      linear(inner_matrix, k0, depth, add);
      linear(inner_shift, k0, depth, add_shift);
    }
    for (int64_t k0 = 0; k0 < outer && split == 0 && (outer_matrix.data || outer_shift.data); k0 += plan.depth) {
      const int64_t depth = min(plan.depth, outer - k0);
      pack_lanes<Mul>(outer_view.at(lane0, k0), width, vectors, depth, lanes);
      linear(outer_matrix, k0, depth, add);
      linear(outer_shift, k0, depth, add_shift);
    }
    if (split == 0) add_bias(call.bias, y, group, o0, outputs, vectors);
    const int64_t offset = (group * p.rows + lane0) * p.out + o0;
    if (call.gate.present) {
      add_bias(call.gate.shift_bias, shift, group, o0, outputs, vectors);
      pack_lanes<Plain>(rows_view<S>(call.x, group).at(lane0, o0), width, vectors, outputs, x);
      if (call.gate.kept.data)
        unpack_planes(y, outputs, vectors, width, static_cast<S*>(call.gate.kept.data) + offset, p.out);
      gate_planes(call.gate, y, x, shift_there ? shift : nullptr, outputs, vectors);
    }
    if (plan.outer_splits > 1) {
      auto* partial = reinterpret_cast<Acc*>(execution.partials) + split * p.groups * p.rows * p.out;
      unpack_planes(y, outputs, vectors, width, partial + offset, p.out);
    } else {
      unpack_planes(y, outputs, vectors, width, static_cast<S*>(call.y.data) + offset, p.out);
    }
  }

  // Last, as the formula is written: what comes before is rounded at its own size, not at that of the bias.
  void add_bias(const TensorRef& from, Acc* y, int64_t group, int64_t o0, int64_t outputs, int64_t vectors) const {
    if (!from.data) return;
    const S* bias = static_cast<const S*>(from.data) + group * from.group;
    for_strips(vectors, [&](auto n, int64_t first) {
      Acc* plane = y + first * L * outputs;
      for (int64_t o = 0; o < outputs; ++o) {
        const Acc value = to_acc(bias[(o0 + o) * from.row]);
        for (int l = 0; l < n * L; ++l) plane[o * n * L + l] += value;
      }
    });
  }

  void add_linear(const TensorRef& m, int64_t group, int64_t o0, int64_t outputs, int64_t k0, int64_t depth,
                  const Word* lanes, int64_t vectors, Word* rows, const AddRows<Mul>& add) const {
    const S* data = static_cast<const S*>(m.data) + group * m.group + o0 * m.row;
    if (call.weight.data)  // a small part of the work
      contract<Mul>(MatrixRows<Mul, S>{{data, m.row, m.col}}, 0, outputs, k0, depth, lanes, vectors, rows, add);
    else
      contract<Mul>(WeightRows<Mul, S>{data, m.row * outputs, m.row, m.col, outputs}, 0, outputs, k0, depth, lanes,
                    vectors, rows, add);
  }

  void product(int64_t group, int64_t o0, int64_t outputs, int64_t i0, int64_t extent, int64_t k0, int64_t depth,
               const Word* lanes, int64_t vectors, Word* rows, Acc* y, const Acc* factors) const {
    const ReduceOuter<Mul> reduce{y, factors, outputs, extent};
    const auto visit = [&](const auto& all) {  // all: rows of outputs from o0 and of the outer axis from i0
      if (extent == outer) return contract<Mul>(all, 0, outputs * extent, k0, depth, lanes, vectors, rows, reduce);
      for (int64_t o = 0; o < outputs; ++o) {  // a part of the outer axis: rows follow each other within an output
        auto one = all;
        one.data += o * all.out_stride;
        one.out_stride = extent * all.row_stride;
        contract<Mul>(one, 0, extent, k0, depth, lanes, vectors, rows, Shifted<ReduceOuter<Mul>>{reduce, o * extent});
      }
    };
    if (call.words.data) {
      using Elem = typename Mul::Elem;
      const int64_t row = call.words.row;
      visit(WeightRows<Mul, Elem>{static_cast<const Elem*>(call.words.data) + (o0 * outer + i0) * row, outer * row, row,
                                  1, extent, row % Mul::pair == 0});
    } else {
      const int64_t outer_stride = width_inside ? p.width : 1, inner_stride = width_inside ? 1 : p.width;
      const S* data = static_cast<const S*>(call.weight.data) + group * call.weight.group + o0 * p.context * p.width +
                      i0 * outer_stride;
      visit(WeightRows<Mul, S>{data, p.context * p.width, outer_stride, inner_stride, extent});
    }
  }

  void add_partials() const {
    const Acc* partials = reinterpret_cast<const Acc*>(execution.partials);
    sum_splits(execution, partials, plan.outer_splits, p.groups * p.rows * p.out, static_cast<S*>(call.y.data));
  }
};

}  // namespace

void forward(DType dtype, const ForwardCall& call, const ForwardPlan& plan, const Execution& execution) {
  if (plan.order == Order::stream)
    forward_stream(dtype, call, plan, execution);
  else
    run_family<Forward>(dtype, call, plan, execution);
}

}  // namespace mi_kernels::MI_ISA
