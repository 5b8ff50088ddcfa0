#include "cpu/dispatch/plan.h"

namespace mi_kernels {

using namespace plan;

namespace {

constexpr int64_t kAlign = 64;
// Outputs of a task without W: the packed context serves them all, and their planes stay in cache beside it.
constexpr int64_t kLinearOutputs = 128;

}  // namespace

// Three planes for an output (gate, x and shift) instead of one. The sums of a gate are never split: the activation
// wants them whole.
ForwardPlan plan_gate(const ProblemSize& p, const Machine& m, bool weight, bool weight_z, bool weight_x, bool shift,
                      bool whole_rows) {
  ForwardPlan f = plan_forward(p, m, weight, weight_z, weight_x);
  if (f.order == Order::stream) return f;
  const bool width_inside = f.order == Order::width_inside;
  const int64_t outer = weight ? (width_inside ? p.context : p.width) : 0;
  f.operations += 2 * p.rows * p.out * ((shift ? p.context : 0) + 8);
  f.depth = min(max(weight || weight_x ? p.width : 0, p.context), kDepthWords * m.pair);
  f.depth = max(f.depth, 1);
  f.out_step = whole_rows ? p.out : min(p.out, weight ? min(f.out_step, 1024) : kLinearOutputs);
  f.out_step = max(f.out_step, 1);
  const int64_t planes = shift ? 3 : 2, vector_bytes = m.lanes * m.acc_bytes;
  const int64_t vectors = ceil_div(p.rows, m.lanes);
  f.vectors = max(block_vectors(vectors, (planes * f.out_step + outer + f.depth) * vector_bytes), 1);
  // Fewer lanes for each task where there would be too few tasks.
  f.out_blocks = ceil_div(p.out, f.out_step);
  while (f.vectors > 3 && p.groups * ceil_div(vectors, f.vectors) * f.out_blocks < kTasks / 4)
    f.vectors = ceil_div(f.vectors, 2);
  f.lane_blocks = ceil_div(vectors, f.vectors);
  f.outer_splits = 1;
  f.outer_step = outer;
  f.tasks = p.groups * f.lane_blocks * f.out_blocks;
  const int64_t lanes = f.vectors * m.lanes;
  f.worker_bytes = round_up(kPackedRows * ceil_div(f.depth, m.pair) * m.word_bytes, kAlign) +
                   round_up(ceil_div(f.depth, m.pair) * lanes * m.word_bytes, kAlign) +
                   planes * round_up(f.out_step * lanes * m.acc_bytes, kAlign) +
                   round_up(f.outer_step * lanes * m.acc_bytes, kAlign);
  f.partial_bytes = 0;
  return f;
}

}  // namespace mi_kernels
