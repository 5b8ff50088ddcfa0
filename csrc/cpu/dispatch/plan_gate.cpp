#include "cpu/dispatch/plan.h"

namespace mi_kernels {
namespace {

// Outputs of a task without W: they share the packed context, and their panels stay in the cache beside it.
constexpr int64_t kLinearOutputs = 128;

}  // namespace

// An output has up to three panels (gate, x and shift) instead of one. The sums of a gate are never split: the
// activation needs the whole sum.
ForwardPlan plan_gate(const ProblemSize& p, const MulTraits& m, bool weight, bool weight_z, bool weight_x, bool shift,
                      bool whole_rows, const WeightLayout& layout) {
  ForwardPlan f = plan_forward(p, m, weight, weight_z, weight_x, layout, true);
  if (f.order == Order::stream) {
    if (layout.major == Major::n) plan_stream_outputs(f, p, m, true);
    return f;
  }
  const bool width_inside = f.order == Order::width_inside;
  const int64_t outer = weight ? (width_inside ? p.context : p.width) : 0;
  f.operations += 2 * p.rows * p.out * ((shift ? p.context : 0) + 8);
  f.depth = min(max(weight || weight_x ? p.width : 0, p.context), kBlockWords * m.pair);
  f.depth = max(f.depth, 1);
  f.out_step = whole_rows ? p.out : min(p.out, weight ? min(f.out_step, 1024) : kLinearOutputs);
  f.out_step = max(f.out_step, 1);
  const int64_t panels = shift ? 3 : 2, vector_bytes = m.lanes * m.acc_bytes;
  const int64_t vectors = ceil_div(p.rows, m.lanes);
  const int64_t y_block = f.outputs_first ? 0 : f.out_step;
  f.vectors = max(block_vectors(vectors, (panels * f.out_step + y_block + outer + f.depth) * vector_bytes), 1);
  // Narrower tasks where there would be too few of them.
  f.out_blocks = ceil_div(p.out, f.out_step);
  while (f.vectors > 3 && p.groups * ceil_div(vectors, f.vectors) * f.out_blocks < kTasks / 4)
    f.vectors = ceil_div(f.vectors, 2);
  f.lane_blocks = ceil_div(vectors, f.vectors);
  f.outer_splits = 1;
  f.outer_step = outer;
  f.tasks = p.groups * f.lane_blocks * f.out_blocks;
  const int64_t lanes = f.vectors * m.lanes;
  f.worker_bytes = scratch_bytes(kBlockM * ceil_div(f.depth, m.pair) * m.word_bytes) +
                   scratch_bytes(ceil_div(f.depth, m.pair) * lanes * m.word_bytes) +
                   panels * scratch_bytes(f.out_step * lanes * m.acc_bytes) +
                   scratch_bytes(f.outer_step * lanes * m.acc_bytes) + scratch_bytes(y_block * lanes * m.acc_bytes);
  f.partial_bytes = 0;
  return f;
}

}  // namespace mi_kernels
