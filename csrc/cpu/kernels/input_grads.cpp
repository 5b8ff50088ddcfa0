// dx and dz with the batch in the lanes. Either one product computes T(i, j) = sum_o g[o] W[o, i, j], tile by tile, and
// the epilogue does both reductions (fused); or each gradient has its own product, whose epilogue sums over the outputs
// (split), which reads W in memory order.
#include "cpu/engine/epilogues.h"
#include "cpu/engine/producers.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class InputGrads {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using PackAcc = typename AccMul<Mul>::type;
  static constexpr int L = Simd<Acc>::lanes;

  const InputGradsCall& call;
  const InputGradsPlan& plan;
  const Executor& executor;
  const ProblemSize& p = call.problem;
  const bool want_x = call.dx.data != nullptr, want_z = call.dz.data != nullptr;
  const InputPartials<Acc> partials{call, plan, executor};

  struct Range {
    int64_t begin, size;
  };
  static Range part(int64_t index, int64_t step, int64_t extent) {
    return {index * step, min(step, extent - index * step)};
  }
  struct Block {  // the lanes of one task
    int64_t group, lane0, lane_count, vectors;
  };

 public:
  InputGrads(const InputGradsCall& c, const InputGradsPlan& d, const Executor& e) : call(c), plan(d), executor(e) {}

  void run() {
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) {
      const int64_t split = t % plan.splits, lane_task = t / plan.splits;
      const int64_t lane0 = lane_task % plan.lane_blocks * plan.vectors * L;
      const int64_t lane_count = min(plan.vectors * L, p.rows - lane0);
      const Block block{lane_task / plan.lane_blocks, lane0, lane_count, ceil_div(lane_count, L)};
      ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
      plan.form == InputForm::split ? run_split(block, split, scratch) : run_fused(block, split, scratch);
    });
    partials.template sum<S>();
  }

 private:
  void run_fused(const Block& b, int64_t split, ScratchAllocator& scratch) const {
    const int64_t width_split = split % plan.z_splits, context_split = split / plan.z_splits;
    const Range context = part(context_split, plan.context_step, p.context);
    const Range width = part(width_split, plan.width_step, p.width);
    auto* packed_a = scratch.allocate<Word>(kBlockM * ceil_div(plan.depth, Mul::pair));
    auto* packed_b = scratch.allocate<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* z = scratch.allocate<Acc>(plan.context_step * plan.vectors * L);
    auto* dz = scratch.allocate<Acc>(plan.context_step * plan.vectors * L);
    auto* x = scratch.allocate<Acc>(plan.width_step * plan.vectors * L);
    auto* dx = scratch.allocate<Acc>(plan.width_step * plan.vectors * L);
    clear(dz, context.size * b.vectors * L);
    clear(dx, width.size * b.vectors * L);
    if (call.weight.data && want_x) load_panels(call.z, b, context, z);
    if (call.weight.data && want_z) load_panels(call.x, b, width, x);

    const ReduceBoth<Mul> both{dx, dz, x, z, context.size, width.size, want_x, want_z};
    for (int64_t o0 = 0; o0 < p.out; o0 += plan.depth) {
      const int64_t depth = min(plan.depth, p.out - o0);
      pack_b<Mul>(batch_view<S>(call.grad, b.group).at(b.lane0, o0), b.lane_count, b.vectors, depth, packed_b);
      if (call.weight.data) multiply_weight(b, context, width, o0, depth, packed_b, packed_a, both);
      add_linear(b, o0, depth, packed_b, packed_a, context_split == 0 ? width : Range{}, dx,
                 width_split == 0 ? context : Range{}, dz);
    }
    write(b, dx, width, p.width, call.dx, plan.x_splits, partials.x(context_split));
    write(b, dz, context, p.context, call.dz, plan.z_splits, partials.z(width_split));
  }

  void multiply_weight(const Block& b, Range context, Range width, int64_t o0, int64_t depth, const Word* packed_b,
                       Word* packed_a, const ReduceBoth<Mul>& both) const {
    // Rows (i, j), K being o: neighbours in j are contiguous, so packing copies whole vectors, or rows are contiguous.
    const WeightRef& w = call.weight;
    const WeightProducer<Mul, S> rows{weight(b.group, o0) + context.begin * w.context + width.begin * w.width,
                                      w.context, w.width, w.out, width.size};
    if (width.size == p.width && p.width <= kBlockM) {
      gemm<Mul>(rows, 0, context.size * width.size, 0, depth, packed_b, b.vectors, packed_a, both);
      return;
    }
    // One range of the width for all of the context: its panels stay in the cache, however large X is.
    const int64_t ranges = max(ceil_div(width.size, kBlockM), 1);
    const int64_t step = ceil_div(ceil_div(width.size, ranges), kTileM) * kTileM;
    for (int64_t j = 0; j < width.size; j += step) {
      for (int64_t i = 0; i < context.size; ++i) {
        const int64_t count = min(step, width.size - j);
        const WeightProducer<Mul, S> range{rows.data + i * w.context + j * w.width, count * w.width, w.width, w.out,
                                           count};
        gemm<Mul>(range, 0, count, 0, depth, packed_b, b.vectors, packed_a,
                  OffsetRows<ReduceBoth<Mul>>{both, i * width.size + j});
      }
    }
  }

  void run_split(const Block& b, int64_t split, ScratchAllocator& scratch) const {
    const Range out = part(split, plan.out_step, p.out);
    auto* packed_a = scratch.allocate<Word>(kBlockM * ceil_div(plan.depth, Mul::pair));
    auto* packed_x = scratch.allocate<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* packed_z = scratch.allocate<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* g = scratch.allocate<Acc>(plan.out_step * plan.vectors * L);
    auto* dz = scratch.allocate<Acc>(p.context * plan.vectors * L);
    auto* dx = scratch.allocate<Acc>(p.width * plan.vectors * L);
    clear(dz, p.context * b.vectors * L);
    clear(dx, p.width * b.vectors * L);
    load_panels(call.grad, b, out, g);

    const S* w = weight(b.group, out.begin);
    const WeightRef& ref = call.weight;
    // Rows (o, i), K being j, give dz; rows (o, j), K being i, give dx.
    const WeightProducer<Mul, S> rows_z{w, ref.out, ref.context, ref.width, p.context},
        rows_x{w, ref.out, ref.width, ref.context, p.width};
    const ScaleAccumulate<Mul> to_z{dz, g, p.context, out.size}, to_x{dx, g, p.width, out.size};
    const bool do_z = call.weight.data && want_z, do_x = call.weight.data && want_x;
    const auto x_view = batch_view<S>(call.x, b.group), z_view = batch_view<S>(call.z, b.group);
    // If both packed inputs fit, W is read one output at a time, and both products use it while it is in the cache.
    const bool fit = p.width <= plan.depth && p.context <= plan.depth;
    const int64_t step = fit ? 1 : max(out.size, 1);
    for (int64_t o = 0; o < out.size; o += step) {
      for (int64_t k0 = 0; do_z && k0 < p.width; k0 += plan.depth) {
        const int64_t depth = min(plan.depth, p.width - k0);
        if (!fit || o == 0) pack_b<Mul>(x_view.at(b.lane0, k0), b.lane_count, b.vectors, depth, packed_x);
        gemm<Mul>(rows_z, o * p.context, (o + step) * p.context, k0, depth, packed_x, b.vectors, packed_a, to_z);
      }
      for (int64_t k0 = 0; do_x && k0 < p.context; k0 += plan.depth) {
        const int64_t depth = min(plan.depth, p.context - k0);
        if (!fit || o == 0) pack_b<Mul>(z_view.at(b.lane0, k0), b.lane_count, b.vectors, depth, packed_z);
        gemm<Mul>(rows_x, o * p.width, (o + step) * p.width, k0, depth, packed_z, b.vectors, packed_a, to_x);
      }
    }
    for (int64_t o0 = 0; o0 < out.size && (call.weight_x.data || call.weight_z.data); o0 += plan.depth) {
      const int64_t depth = min(plan.depth, out.size - o0);
      pack_b<Mul>(batch_view<S>(call.grad, b.group).at(b.lane0, out.begin + o0), b.lane_count, b.vectors, depth,
                  packed_x);
      add_linear(b, out.begin + o0, depth, packed_x, packed_a, {0, p.width}, dx, {0, p.context}, dz);
    }
    write(b, dx, {0, p.width}, p.width, call.dx, plan.x_splits, partials.x(split));
    write(b, dz, {0, p.context}, p.context, call.dz, plan.z_splits, partials.z(split));
  }

  // dx += g V and dz += g U for the outputs from o0 on; `packed_b` holds their gradients.
  void add_linear(const Block& b, int64_t o0, int64_t depth, const Word* packed_b, Word* packed_a, Range width, Acc* dx,
                  Range context, Acc* dz) const {
    const auto multiply = [&](const TensorRef& m, Range columns, Acc* to) {
      const S* first = static_cast<const S*>(m.data) + b.group * m.group + o0 * m.row + columns.begin * m.col;
      const Accumulate<Mul> add{to, columns.size};
      if (call.weight.data)  // a small part of the work
        gemm<Mul>(MatrixProducer<Mul, S>{{first, m.col, m.row}}, 0, columns.size, 0, depth, packed_b, b.vectors,
                  packed_a, add);
      else
        gemm<Mul>(WeightProducer<Mul, S>{first, m.col * columns.size, m.col, m.row, columns.size}, 0, columns.size, 0,
                  depth, packed_b, b.vectors, packed_a, add);
    };
    if (want_x && call.weight_x.data) multiply(call.weight_x, width, dx);
    if (want_z && call.weight_z.data) multiply(call.weight_z, context, dz);
  }

  const S* weight(int64_t group, int64_t o0) const {
    return static_cast<const S*>(call.weight.data) + group * call.weight.group + o0 * call.weight.out;
  }

  void load_panels(const TensorRef& input, const Block& b, Range features, Acc* panels) const {
    pack_b<PackAcc>(batch_view<S>(input, b.group).at(b.lane0, features.begin), b.lane_count, b.vectors, features.size,
                    panels);
  }

  void write(const Block& b, const Acc* panels, Range range, int64_t features, const OutputRef& out, int64_t splits,
             Acc* partial) const {
    if (!out.data) return;
    const int64_t offset = (b.group * p.rows + b.lane0) * features + range.begin;
    if (splits > 1)
      unpack_panels(panels, range.size, b.vectors, b.lane_count, partial + offset, features);
    else
      unpack_panels(panels, range.size, b.vectors, b.lane_count, static_cast<S*>(out.data) + offset, features);
  }
};

}  // namespace

void input_grads(DType dtype, const InputGradsCall& call, const InputGradsPlan& plan, const Executor& executor) {
  if (plan.form == InputForm::stream)
    input_grads_stream(dtype, call, plan, executor);
  else
    run_family<InputGrads>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
