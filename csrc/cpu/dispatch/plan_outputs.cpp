#include "cpu/dispatch/plan.h"

namespace mi_kernels {

// Compares, for each word of W, products that are computed (empty lanes and rows included) plus the cost of packing W
// for the batch in the lanes, which is that of half a vector of products where W is in the cache:
//   outputs in the lanes: round_up(rows) round_up(out)         batch: round_up(rows) out (1 + lanes / (2 rows + lanes))
// In shorter sums the epilogue, which reads and writes y for each of them, would weigh too much.
bool takes_output_lanes(const ProblemSize& p, const MulTraits& m, const WeightLayout& layout) {
  constexpr int64_t kShortestSum = 16;  // in words
  if (layout.major != Major::n || p.width < kShortestSum * m.pair || p.rows == 0) return false;
  const int64_t output_lanes = round_up(p.rows, kOutputLaneRows) * round_up(p.out, m.lanes),
                batch_lanes = round_up(p.rows, m.lanes) * p.out;
  return output_lanes * (2 * p.rows + m.lanes) <= batch_lanes * (2 * p.rows + 2 * m.lanes);
}

// A task has all of x for its rows and outputs, and a range of the context.
void plan_output_lanes(ForwardPlan& f, const ProblemSize& p, const MulTraits& m) {
  constexpr int64_t kMostRows = 256, kFewestRows = 128, kMostVectors = 24;
  const int64_t fewest_vectors = 4 * m.pair;  // W is read in runs of this length
  const int64_t row_parts = split_count(kTasks, p.groups, f.operations, p.rows / kFewestRows);
  f.output_lanes = true;
  f.row_step = round_up(ceil_div(p.rows, max(row_parts, ceil_div(p.rows, kMostRows))), kOutputLaneRows);
  f.row_blocks = ceil_div(p.rows, f.row_step);
  const int64_t blocks = p.groups * f.row_blocks, vectors = ceil_div(p.out, m.lanes);
  const int64_t result_bytes = max(p.groups * p.rows * p.out * m.acc_bytes, 1);
  f.outer_splits = split_count(kPartialTasks, blocks, f.operations, p.context / kOuterBlock);
  f.outer_splits = max(min(f.outer_splits, kPartialBytes / result_bytes), 1);
  f.outer_step = max(ceil_div(p.context, f.outer_splits), 1);
  f.outer_splits = max(ceil_div(p.context, f.outer_step), 1);
  const int64_t parts = split_count(kTasks, blocks * f.outer_splits, f.operations, vectors / fewest_vectors);
  f.vectors = ceil_div(vectors, max(parts, ceil_div(vectors, kMostVectors)));
  f.out_step = f.vectors * m.lanes;
  f.out_blocks = ceil_div(p.out, f.out_step);
  f.tasks = blocks * f.outer_splits * f.out_blocks;
  const int64_t words = ceil_div(f.depth, m.pair);
  f.worker_bytes = scratch_bytes(f.row_step * words * m.word_bytes) + scratch_bytes(f.out_step * words * m.word_bytes) +
                   scratch_bytes(kOuterBlock * f.row_step * m.acc_bytes) +
                   2 * scratch_bytes(f.row_step * f.out_step * m.acc_bytes);
  f.partial_bytes = f.outer_splits > 1 ? f.outer_splits * result_bytes : 0;
}

}  // namespace mi_kernels
