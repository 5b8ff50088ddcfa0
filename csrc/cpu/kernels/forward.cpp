// y = z^T W x + U z + V x + c with the batch in the lanes. Rows of A are W[(o, outer), inner], or W[(outer, o), inner]
// where outputs are not the slowest axis in memory: the product sums over the inner feature axis, and the epilogue
// multiplies by the other input and sums over the outer axis. U z, V x and c are added to the same accumulators.
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

  struct Block {  // a part of W: outputs, outer features and elements along K, and the vectors of lanes
    int64_t group, o0, outputs, i0, extent, k0, depth, vectors;
  };

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
    auto* y_block = scratch.allocate<Acc>(plan.outputs_first ? 0 : plan.out_step * plan.vectors * L);
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
        multiply_weight({group, o0, outputs, i0, extent, k0, depth, vectors}, packed_b, packed_a, y, y_block,
                        outer_panels);
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
      pack_b<PackAcc>(batch_view<S>(call.gate.x, group).at(lane0, o0), lane_count, vectors, outputs, x);
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

  void multiply_weight(const Block& b, const Word* packed_b, Word* packed_a, Acc* y, Acc* y_block,
                       const Acc* outer_panels) const {
    const bool outputs_first = plan.outputs_first;
    const auto multiply = [&](const auto& all) {  // all: rows from (o0, i0) on
      if (outputs_first)
        multiply_by_output(b, all, packed_b, packed_a, ReduceOuter<Mul>{y, outer_panels, b.outputs, b.extent});
      else
        multiply_by_feature(b, all, packed_b, packed_a, y, y_block, outer_panels);
    };
    if (call.packed_weight.data) {
      using Elem = typename Mul::Elem;
      const int64_t row = call.packed_weight.row, outer_stride = row * (outputs_first ? 1 : p.out),
                    out_stride = row * (outputs_first ? outer : 1);
      const auto* data = static_cast<const Elem*>(call.packed_weight.data);
      multiply(rows(b, data, out_stride, outer_stride, 1, row % Mul::pair == 0));
    } else {
      const WeightRef& w = call.weight;
      multiply(rows(b, static_cast<const S*>(w.data) + b.group * w.group, w.out, width_inside ? w.context : w.width,
                    width_inside ? w.width : w.context));
    }
  }

  template <class T>
  WeightProducer<Mul, T> rows(const Block& b, const T* data, int64_t out_stride, int64_t outer_stride,
                              int64_t inner_stride, bool padded = false) const {
    data += b.o0 * out_stride + b.i0 * outer_stride;
    if (plan.outputs_first) return {data, out_stride, outer_stride, inner_stride, b.extent, padded};
    return {data, outer_stride, out_stride, inner_stride, b.outputs, padded};
  }

  // Rows (o, i).
  template <class Producer>
  void multiply_by_output(const Block& b, const Producer& all, const Word* packed_b, Word* packed_a,
                          const ReduceOuter<Mul>& reduce) const {
    if (b.extent == outer)
      return gemm<Mul>(all, 0, b.outputs * b.extent, b.k0, b.depth, packed_b, b.vectors, packed_a, reduce);
    for (int64_t o = 0; o < b.outputs; ++o) {  // a part of the outer axis: rows are contiguous for one output only
      Producer one = all;
      one.data += o * all.outer_stride;
      one.outer_stride = b.extent * all.row_stride;
      gemm<Mul>(one, 0, b.extent, b.k0, b.depth, packed_b, b.vectors, packed_a,
                OffsetRows<ReduceOuter<Mul>>{reduce, o * b.extent});
    }
  }

  // Rows (i, o): the epilogue adds one i at a time, so there are summation blocks of these.
  template <class Producer>
  void multiply_by_feature(const Block& b, const Producer& all, const Word* packed_b, Word* packed_a, Acc* y,
                           Acc* y_block, const Acc* outer_panels) const {
    const int64_t size = b.outputs * b.vectors * L;
    for (int64_t i = 0; i < b.extent; i += kOuterBlock) {
      const int64_t end = min(i + kOuterBlock, b.extent);
      const ScaleAccumulate<Mul> add{y_block, outer_panels, b.outputs, b.extent};
      clear(y_block, size);
      gemm<Mul>(all, i * b.outputs, end * b.outputs, b.k0, b.depth, packed_b, b.vectors, packed_a, add,
                b.extent * b.outputs);
      for (int64_t e = 0; e < size; e += L) store(y + e, load<Vec<Acc>>(y + e) + load<Vec<Acc>>(y_block + e));
    }
  }

  void add_partials() const {
    const Acc* partials = reinterpret_cast<const Acc*>(executor.partials);
    sum_splits(executor, partials, plan.outer_splits, p.groups * p.rows * p.out, static_cast<S*>(call.y.data));
  }
};

}  // namespace

void forward(DType dtype, const ForwardCall& call, const ForwardPlan& plan, const Executor& executor) {
  if (plan.order == Order::stream && plan.layout.major == Major::n)
    forward_stream_outputs(dtype, call, plan, executor);
  else if (plan.order == Order::stream)
    forward_stream(dtype, call, plan, executor);
  else if (plan.output_lanes)
    forward_outputs(dtype, call, plan, executor);
  else
    run_family<Forward>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
