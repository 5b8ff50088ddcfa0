// dx and dz: the batch lies in the lanes. Either one product makes T(i, j) = sum_o g[o] W[o, i, j], tile by
// tile, and the epilogue takes both reductions of it (together); or each gradient has a product of its own
// and the epilogue sums over the outputs (separate), which reads W in the order in which it lies.
#include "cpu/engine/epilogues.h"
#include "cpu/engine/producers.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class InputGrads {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using Plain = typename AccMul<Mul>::type;
  static constexpr int L = Simd<Acc>::lanes;

  const InputGradsCall& call;
  const InputGradsPlan& plan;
  const Execution& execution;
  const ProblemSize& p = call.problem;
  const bool want_x = call.dx.data != nullptr, want_z = call.dz.data != nullptr;
  const InputPartials<Acc> partials{call, plan, execution};

  struct Range {
    int64_t begin, size;
  };
  static Range part(int64_t index, int64_t step, int64_t extent) {
    return {index * step, min(step, extent - index * step)};
  }
  struct Block {  // lanes of one task
    int64_t group, lane0, lanes, vectors;
  };

 public:
  InputGrads(const InputGradsCall& c, const InputGradsPlan& d, const Execution& e) : call(c), plan(d), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) {
      const int64_t split = t % plan.splits, lane_task = t / plan.splits;
      const int64_t lane0 = lane_task % plan.lane_blocks * plan.vectors * L;
      const int64_t lanes = min(plan.vectors * L, p.rows - lane0);
      const Block block{lane_task / plan.lane_blocks, lane0, lanes, ceil_div(lanes, L)};
      Arena arena{execution.scratch + worker * plan.worker_bytes};
      plan.form == InputForm::separate ? separate(block, split, arena) : together(block, split, arena);
    });
    partials.template sum<S>();
  }

 private:
  void together(const Block& b, int64_t split, Arena& arena) const {
    const int64_t width_split = split % plan.z_splits, context_split = split / plan.z_splits;
    const Range context = part(context_split, plan.context_step, p.context);
    const Range width = part(width_split, plan.width_step, p.width);
    auto* buffer = arena.take<Word>(kRowBlock * ceil_div(plan.depth, Mul::pair));
    auto* lanes = arena.take<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* z = arena.take<Acc>(plan.context_step * plan.vectors * L);
    auto* dz = arena.take<Acc>(plan.context_step * plan.vectors * L);
    auto* x = arena.take<Acc>(plan.width_step * plan.vectors * L);
    auto* dx = arena.take<Acc>(plan.width_step * plan.vectors * L);
    clear(dz, context.size * b.vectors * L);
    clear(dx, width.size * b.vectors * L);
    if (call.weight.data && want_x) planes_of(call.z, b, context, z);
    if (call.weight.data && want_z) planes_of(call.x, b, width, x);

    const ReduceBoth<Mul> both{dx, dz, x, z, context.size, width.size, want_x, want_z};
    for (int64_t o0 = 0; o0 < p.out; o0 += plan.depth) {
      const int64_t depth = min(plan.depth, p.out - o0);
      pack_lanes<Mul>(rows_view<S>(call.grad, b.group).at(b.lane0, o0), b.lanes, b.vectors, depth, lanes);
      if (call.weight.data) product(b, context, width, o0, depth, lanes, buffer, both);
      linear(b, o0, depth, lanes, buffer, context_split == 0 ? width : Range{}, dx,
             width_split == 0 ? context : Range{}, dz);
    }
    write(b, dx, width, p.width, call.dx, plan.x_splits, partials.x(context_split));
    write(b, dz, context, p.context, call.dz, plan.z_splits, partials.z(width_split));
  }

  void product(const Block& b, Range context, Range width, int64_t o0, int64_t depth, const Word* lanes, Word* buffer,
               const ReduceBoth<Mul>& both) const {
    // Row (i, j) along o: neighbours in j are neighbours in memory, so packing copies whole vectors.
    const View<S> view{weight(b.group, o0) + context.begin * p.width + width.begin, 1, p.context * p.width};
    if (width.size == p.width && p.width <= kRowBlock) {
      contract<Mul>(MatrixRows<Mul, S>{view}, 0, context.size * width.size, 0, depth, lanes, b.vectors, buffer, both);
      return;
    }
    // One stretch of the width for all of the context: its planes stay in the cache, whatever X is.
    const int64_t stretches = max(ceil_div(width.size, kRowBlock), 1);
    const int64_t step = ceil_div(ceil_div(width.size, stretches), kRows) * kRows;
    for (int64_t j = 0; j < width.size; j += step) {
      for (int64_t i = 0; i < context.size; ++i)
        contract<Mul>(MatrixRows<Mul, S>{view.at(i * p.width + j, 0)}, 0, min(step, width.size - j), 0, depth, lanes,
                      b.vectors, buffer, Shifted<ReduceBoth<Mul>>{both, i * width.size + j});
    }
  }

  void separate(const Block& b, int64_t split, Arena& arena) const {
    const Range out = part(split, plan.out_step, p.out);
    auto* buffer = arena.take<Word>(kRowBlock * ceil_div(plan.depth, Mul::pair));
    auto* x_lanes = arena.take<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* z_lanes = arena.take<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* g = arena.take<Acc>(plan.out_step * plan.vectors * L);
    auto* dz = arena.take<Acc>(p.context * plan.vectors * L);
    auto* dx = arena.take<Acc>(p.width * plan.vectors * L);
    clear(dz, p.context * b.vectors * L);
    clear(dx, p.width * b.vectors * L);
    planes_of(call.grad, b, out, g);

    const S* w = weight(b.group, out.begin);
    const int64_t zx = p.context * p.width;
    // Rows (o, i) along j give dz, rows (o, j) along i give dx.
    const WeightRows<Mul, S> along_x{w, zx, p.width, 1, p.context}, along_z{w, zx, 1, p.width, p.width};
    const ScaleRows<Mul> to_z{dz, g, p.context, out.size}, to_x{dx, g, p.width, out.size};
    const bool do_z = call.weight.data && want_z, do_x = call.weight.data && want_x;
    const auto x_view = rows_view<S>(call.x, b.group), z_view = rows_view<S>(call.z, b.group);
    // Where both operands fit, W is met one output at a time, by both products while it is in the cache.
    const bool fit = p.width <= plan.depth && p.context <= plan.depth;
    const int64_t step = fit ? 1 : max(out.size, 1);
    for (int64_t o = 0; o < out.size; o += step) {
      for (int64_t k0 = 0; do_z && k0 < p.width; k0 += plan.depth) {
        const int64_t depth = min(plan.depth, p.width - k0);
        if (!fit || o == 0) pack_lanes<Mul>(x_view.at(b.lane0, k0), b.lanes, b.vectors, depth, x_lanes);
        contract<Mul>(along_x, o * p.context, (o + step) * p.context, k0, depth, x_lanes, b.vectors, buffer, to_z);
      }
      for (int64_t k0 = 0; do_x && k0 < p.context; k0 += plan.depth) {
        const int64_t depth = min(plan.depth, p.context - k0);
        if (!fit || o == 0) pack_lanes<Mul>(z_view.at(b.lane0, k0), b.lanes, b.vectors, depth, z_lanes);
        contract<Mul>(along_z, o * p.width, (o + step) * p.width, k0, depth, z_lanes, b.vectors, buffer, to_x);
      }
    }
    for (int64_t o0 = 0; o0 < out.size && (call.weight_x.data || call.weight_z.data); o0 += plan.depth) {
      const int64_t depth = min(plan.depth, out.size - o0);
      pack_lanes<Mul>(rows_view<S>(call.grad, b.group).at(b.lane0, out.begin + o0), b.lanes, b.vectors, depth, x_lanes);
      linear(b, out.begin + o0, depth, x_lanes, buffer, {0, p.width}, dx, {0, p.context}, dz);
    }
    write(b, dx, {0, p.width}, p.width, call.dx, plan.x_splits, partials.x(split));
    write(b, dz, {0, p.context}, p.context, call.dz, plan.z_splits, partials.z(split));
  }

  // dx += g V and dz += g U for the outputs from o0, whose gradients lie in the lanes.
  void linear(const Block& b, int64_t o0, int64_t depth, const Word* lanes, Word* buffer, Range width, Acc* dx,
              Range context, Acc* dz) const {
    if (want_x && call.weight_x.data)
      contract<Mul>(columns(call.weight_x, b.group, o0, width.begin), 0, width.size, 0, depth, lanes, b.vectors, buffer,
                    AddRows<Mul>{dx, width.size});
    if (want_z && call.weight_z.data)
      contract<Mul>(columns(call.weight_z, b.group, o0, context.begin), 0, context.size, 0, depth, lanes, b.vectors,
                    buffer, AddRows<Mul>{dz, context.size});
  }

  const S* weight(int64_t group, int64_t o0) const {
    return static_cast<const S*>(call.weight.data) + group * call.weight.group + o0 * p.context * p.width;
  }

  MatrixRows<Mul, S> columns(const TensorRef& m, int64_t group, int64_t o0, int64_t column) const {
    return {{static_cast<const S*>(m.data) + group * m.group + o0 * m.row + column * m.col, m.col, m.row}};
  }

  void planes_of(const TensorRef& operand, const Block& b, Range features, Acc* planes) const {
    pack_lanes<Plain>(rows_view<S>(operand, b.group).at(b.lane0, features.begin), b.lanes, b.vectors, features.size,
                      planes);
  }

  void write(const Block& b, const Acc* planes, Range range, int64_t features, const Result& out, int64_t splits,
             Acc* partial) const {
    if (!out.data) return;
    const int64_t offset = (b.group * p.rows + b.lane0) * features + range.begin;
    if (splits > 1)
      unpack_planes(planes, range.size, b.vectors, b.lanes, partial + offset, features);
    else
      unpack_planes(planes, range.size, b.vectors, b.lanes, static_cast<S*>(out.data) + offset, features);
  }
};

}  // namespace

void input_grads(DType dtype, const InputGradsCall& call, const InputGradsPlan& plan, const Execution& execution) {
  if (plan.form == InputForm::stream)
    input_grads_stream(dtype, call, plan, execution);
  else
    run_family<InputGrads>(dtype, call, plan, execution);
}

}  // namespace mi_kernels::MI_ISA
