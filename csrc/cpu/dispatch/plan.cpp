#include "cpu/dispatch/plan.h"

namespace mi_kernels {

bool uncached(const ProblemSize& p, const MulTraits& m) {
  return double(p.out) * double(p.context) * double(p.width) * double(m.word_bytes / m.pair) >= double(kUncachedBytes);
}

namespace {

int64_t packed_a_bytes(int64_t depth, const MulTraits& traits) {
  return scratch_bytes(kBlockM * ceil_div(depth, traits.pair) * traits.word_bytes);
}

Order choose_order(const ProblemSize& p) {
  // The longer the inner axis, the less the epilogue weighs.
  if (p.width >= p.context || p.width >= 64) return Order::width_inside;
  return Order::context_inside;
}

// Rows up to which a call is bound by reading W. A dtype that is multiplied in pairs is bound by arithmetic earlier,
// and so are few outputs, which leave tiles mostly empty.
int64_t stream_rows(const ProblemSize& p, int64_t most, const MulTraits& m) {
  return min(m.pair == 1 ? most : most - 2, p.out);
}

RegionPlan plan_region(int64_t groups, int64_t outputs, int64_t extent, int64_t lanes, int64_t batch,
                       const MulTraits& m) {
  RegionPlan r{};
  const int64_t rows = outputs * extent;
  r.outputs = outputs, r.extent = extent;
  r.operations = 2 * groups * rows * lanes * batch;
  int64_t regions = 0;
  const auto divide = [&](int64_t most_rows, int64_t most_vectors) {
    const int64_t vectors = ceil_div(lanes, m.lanes);
    r.vectors = max(ceil_div(vectors, max(ceil_div(vectors, most_vectors), 1)), 1);
    r.lane_blocks = ceil_div(vectors, r.vectors);
    r.feature_step = max(ceil_div(extent, max(ceil_div(extent, most_rows), 1)), 1);
    r.feature_blocks = ceil_div(extent, r.feature_step);
    const int64_t most_outputs = max(most_rows / r.feature_step, 1),
                  even = ceil_div(outputs, max(ceil_div(outputs, most_outputs), 1));
    r.out_step = max(min(round_up(even, kOutputLaneRows), min(most_outputs, outputs)), 1);
    r.row_step = r.out_step * r.feature_step;
    r.row_blocks = ceil_div(outputs, r.out_step) * r.feature_blocks;
    regions = groups * r.row_blocks * r.lane_blocks;
  };
  // Smaller regions pack their operands more often, which is one step for each of these many products; partial sums
  // are written and read again, which takes as long as some tens of products, and more outside of the cache.
  constexpr int64_t kFewestRegionRows = 64, kFewestRegionVectors = 6, kFewestBatch = 128;
  const int64_t wanted = min(kPartialTasks, r.operations / kTaskOperations);
  int64_t most_rows = kRegionRows, most_vectors = kMaxRegionVectors;
  divide(most_rows, most_vectors);
  while (regions < wanted && most_rows > kFewestRegionRows) divide(most_rows /= 2, most_vectors);
  while (regions < wanted && most_vectors > kFewestRegionVectors)
    divide(most_rows, most_vectors = max(most_vectors / 2, kFewestRegionVectors));
  const int64_t result_bytes = max(groups * rows * lanes * m.acc_bytes, 1);
  r.batch_splits = min(split_count(kPartialTasks, regions, r.operations, batch / kFewestBatch),
                       max(kPartialBytes / result_bytes, 1));
  r.batch_step = round_up(max(ceil_div(batch, r.batch_splits), 1), 2);
  r.batch_splits = max(ceil_div(batch, r.batch_step), 1);
  // Each depth is one summation block: with 128 products in it, the rounding error of a long batch stays below that of
  // PyTorch's own matrix product in float. Pairs of 16 bits are rounded more coarsely, and what is one block is stored
  // from the registers. Blocks are of one length, as a short one costs as much as a long one to add up.
  constexpr int64_t kSumWords = 128;
  const int64_t longest = kSumWords * m.pair * m.pair;
  r.depth = round_up(ceil_div(r.batch_step, ceil_div(r.batch_step, longest)), 2);
  r.tasks = regions * r.batch_splits;
  const int64_t panel = r.vectors * m.lanes;
  r.worker_bytes = packed_a_bytes(r.depth, m) + scratch_bytes(ceil_div(r.depth, m.pair) * panel * m.word_bytes) +
                   scratch_bytes(r.row_step * panel * m.acc_bytes);
  const int64_t padded = round_up(r.depth, m.lanes * m.pair);  // row length of the two transposed factors
  r.worker_bytes += scratch_bytes((r.out_step + r.feature_step) * padded * m.acc_bytes) + kScratchAlign;
  r.partial_bytes = r.batch_splits > 1 ? r.batch_splits * result_bytes : 0;
  return r;
}

// Whether a few rows can be streamed: W has whole vectors that are contiguous.
bool streams(const WeightLayout& layout, const ProblemSize& p, const MulTraits& m) {
  if (layout.major == Major::neither || p.width * p.rows > 1 << 18) return false;
  if (layout.major == Major::n) return true;
  return layout.flat ? p.context * p.width >= 4 * m.lanes : p.width >= 2 * m.lanes * m.pair;
}

// Groups of one task, for `blocks` tasks of each group.
int64_t group_step(int64_t groups, int64_t blocks, int64_t operations) {
  return max(ceil_div(groups, max(split_count(kTasks, 1, operations, groups * blocks) / max(blocks, 1), 1)), 1);
}

// A task reads all of W[o] for some outputs o; its lanes run along (i, j).
void plan_stream(ForwardPlan& f, const ProblemSize& p, const MulTraits& m) {
  f.vectors = 1;
  f.lane_blocks = 1;
  f.outer_splits = 1;
  f.depth = kStreamDepth;
  const int64_t out_splits = split_count(kTasks, p.groups, f.operations, ceil_div(p.out, 4));
  f.out_step = max(min(ceil_div(p.out, out_splits), 512), 1);
  f.out_blocks = ceil_div(p.out, f.out_step);
  f.group_step = group_step(p.groups, f.out_blocks, f.operations);
  f.tasks = ceil_div(p.groups, f.group_step) * f.out_blocks;
  const int64_t element = m.word_bytes / m.pair, slack = 2 * m.lanes;
  f.worker_bytes = scratch_bytes(p.rows * (kStreamDepth + slack) * element) +
                   scratch_bytes(p.rows * (p.width + slack) * m.acc_bytes) +
                   scratch_bytes(f.out_step * p.rows * m.lanes * m.acc_bytes) +
                   scratch_bytes(4 * m.lanes * m.pair * element);
}

}  // namespace

// The lanes are outputs. A task sums over a range of (i, j), unless the sums must be whole.
void plan_stream_outputs(ForwardPlan& f, const ProblemSize& p, const MulTraits& m, bool whole_sums) {
  f.vectors = 1;
  f.lane_blocks = 1;
  f.depth = kStreamDepthOutputs;
  const int64_t length = p.context * p.width, result_bytes = max(p.groups * p.rows * p.out * m.acc_bytes, 1);
  const int64_t splits = split_count(kPartialTasks, p.groups, f.operations, length / kStreamDepthOutputs);
  f.outer_splits = whole_sums ? 1 : max(min(splits, kPartialBytes / result_bytes), 1);
  f.outer_step = max(round_up(ceil_div(length, f.outer_splits), m.pair), 1);
  f.outer_splits = max(ceil_div(length, f.outer_step), 1);
  // Each block of outputs generates the products again, and reads shorter runs of W.
  const int64_t parts = split_count(kTasks, p.groups * f.outer_splits, f.operations, p.out / (8 * m.lanes));
  f.out_step = max(round_up(ceil_div(p.out, max(parts, ceil_div(p.out, 4096))), m.lanes), 1);
  while (p.out > f.out_step && p.out % f.out_step > 0 && p.out % f.out_step < m.lanes) f.out_step += m.lanes;
  f.out_blocks = ceil_div(p.out, f.out_step);
  const int64_t blocks = f.outer_splits * f.out_blocks;
  f.group_step = group_step(p.groups, blocks, f.operations);
  f.tasks = ceil_div(p.groups, f.group_step) * blocks;
  const int64_t element = m.word_bytes / m.pair, slack = 2 * m.lanes;
  f.worker_bytes = scratch_bytes(p.rows * (kStreamDepthOutputs + slack) * element) +
                   scratch_bytes(p.rows * (p.width + slack) * m.acc_bytes) +
                   scratch_bytes(p.rows * f.out_step * m.acc_bytes) + scratch_bytes(m.pair * m.lanes * m.acc_bytes);
  f.partial_bytes = f.outer_splits > 1 ? f.outer_splits * result_bytes : 0;
}

ForwardPlan plan_forward(const ProblemSize& p, const MulTraits& m, bool weight, bool weight_z, bool weight_x,
                         const WeightLayout& layout, bool gate) {
  ForwardPlan f{};
  f.layout = layout;
  f.order = choose_order(p);
  if (weight && p.rows <= stream_rows(p, kStreamRows, m) && streams(layout, p, m)) f.order = Order::stream;
  const bool width_inside = f.order == Order::width_inside;
  const int64_t inner = width_inside ? p.width : p.context, outer = width_inside ? p.context : p.width;
  f.operations =
      2 * p.groups * p.rows * p.out * (weight * p.context * p.width + weight_z * p.context + weight_x * p.width);
  f.outputs_first = layout.major != Major::n && (!width_inside || layout.outputs_slowest);
  if (f.order == Order::stream) {
    layout.major == Major::n ? plan_stream_outputs(f, p, m, false) : plan_stream(f, p, m);
    return f;
  }
  f.depth = min(max(p.width, p.context), kBlockWords * m.pair);
  if (weight && !gate && width_inside && takes_output_lanes(p, m, layout)) {
    plan_output_lanes(f, p, m);
    return f;
  }
  const int64_t vectors = ceil_div(p.rows, m.lanes), vector_bytes = m.lanes * m.acc_bytes;
  const int64_t rows_of_a = p.out * (weight ? outer : 1);
  constexpr int64_t kRowsWorthPacking = 128;
  // Panels of one vector of lanes: outputs, outer input, packed inner input.
  const int64_t out_panels = max(min(p.out, 4096), 1), y_panels = f.outputs_first ? 1 : 2;
  f.vectors = max(block_vectors(vectors, (y_panels * out_panels + outer + min(inner, f.depth)) * vector_bytes), 1);
  // Too few rows of A to share: halves of the lanes then, which read them again.
  if (p.groups == 1 && f.vectors == vectors && rows_of_a < 4 * kRowsWorthPacking && f.operations >= 2 * kTaskOperations)
    f.vectors = ceil_div(vectors, 2);
  f.lane_blocks = ceil_div(vectors, f.vectors);
  const int64_t blocks = p.groups * f.lane_blocks;
  // Each task packs its B operand again, which pays off from about kRowsWorthPacking rows of A on.
  const int64_t most = max(rows_of_a / kRowsWorthPacking, 1);
  const int64_t result_bytes = max(p.groups * p.rows * p.out * m.acc_bytes, 1);
  const auto split_outputs = [&](int64_t tasks, int64_t parts) {
    const int64_t out_splits = max(split_count(kTasks, tasks, f.operations, parts), ceil_div(p.out, out_panels));
    f.out_step = max(ceil_div(p.out, out_splits), 1);
    f.out_blocks = ceil_div(p.out, f.out_step);
  };
  const auto split_outer = [&](int64_t tasks, int64_t parts) {
    f.outer_splits = weight ? split_count(kPartialTasks, tasks, f.operations, parts) : 1;
    f.outer_splits = max(min(f.outer_splits, kPartialBytes / result_bytes), 1);
    f.outer_step = max(ceil_div(outer, f.outer_splits), 1);
    f.outer_splits = max(ceil_div(outer, f.outer_step), 1);
  };
  if (f.outputs_first || !weight) {
    split_outputs(blocks, min(p.out, most));
    split_outer(blocks * f.out_blocks, outer / kBlockM);
  } else {  // a part of the outer axis is contiguous, a few outputs are a short run
    constexpr int64_t kFewestOutputs = 32;
    split_outer(blocks, outer / kOuterBlock);
    split_outputs(blocks * f.outer_splits, p.out / kFewestOutputs);
  }
  f.tasks = blocks * f.out_blocks * f.outer_splits;
  const int64_t lanes = f.vectors * m.lanes;
  f.worker_bytes = packed_a_bytes(f.depth, m) + scratch_bytes(ceil_div(f.depth, m.pair) * lanes * m.word_bytes) +
                   y_panels * scratch_bytes(f.out_step * lanes * m.acc_bytes) +
                   scratch_bytes(f.outer_step * lanes * m.acc_bytes);
  f.partial_bytes = f.outer_splits > 1 ? f.outer_splits * result_bytes : 0;
  return f;
}

bool outputs_in_lanes(int64_t rows, int64_t out, int64_t depth, bool k_major, const MulTraits& m) {
  // The matrix is packed for each region, which takes enough rows to pay off. With the rows in the lanes, the inputs
  // and the results are transposed instead, which costs the same at 3/4 as many rows as elements along K.
  const int64_t fewest = k_major ? max(depth * 3 / 4, 48) : 1;
  // At most a fifth of the lanes may be empty, or half of them where the alternative is to transpose the matrix.
  const int64_t lanes = round_up(out, m.lanes);
  return depth > 0 && rows >= fewest && (k_major ? 4 * lanes <= 5 * out : lanes <= 2 * out) && out > 0;
}

// Compares products that are computed, empty rows and lanes included: packing the matrix costs as much as kPacking more
// rows, and with the rows in the lanes, to transpose inputs and results as much as kTransposition more elements along
// K.
bool short_sums_in_output_lanes(int64_t groups, int64_t rows, int64_t out, int64_t depth, const MulTraits& m) {
  constexpr int64_t kShortSum = 128, kPacking = 4, kTransposition = 16;
  return groups > 1 && depth > 0 && depth <= kShortSum &&
         (round_up(rows, kOutputLaneRows / 2) + kPacking) * round_up(out, m.lanes) * depth <
             round_up(rows, m.lanes) * out * (depth + kTransposition);
}

namespace {

// `panels`: blocks of accumulators in memory.
LinearPlan plan_regions(LinearPlan l, int64_t groups, int64_t rows, int64_t out, int64_t panels, const MulTraits& m) {
  constexpr int64_t kMostRows = 1024, kFewestRows = 512, kPanelBytes = 512 << 10;
  constexpr int64_t kFewTasks = 4, kFewestSharedRows = 32;
  const int64_t vectors = ceil_div(out, m.lanes);
  l.vectors = ceil_div(vectors, ceil_div(vectors, kMaxRegionVectors));
  l.lane_blocks = ceil_div(vectors, l.vectors);
  const int64_t row_bytes = panels * l.vectors * m.lanes * m.acc_bytes;
  const int64_t most = panels ? max(min(kPanelBytes / row_bytes, kMostRows), kFewestRows) : kMostRows;
  // Each region packs the matrix again, so regions are large, unless there would be too few of them.
  int64_t wanted = split_count(kTasks, groups * l.lane_blocks, l.operations, rows / kFewestRows);
  if (groups * l.lane_blocks * wanted < kFewTasks)
    wanted = split_count(kFewTasks, groups * l.lane_blocks, l.operations, rows / kFewestSharedRows);
  const int64_t blocks = max(wanted, ceil_div(rows, most));
  l.row_step = round_up(ceil_div(rows, blocks), 8);  // whole tiles
  l.row_blocks = ceil_div(rows, l.row_step);
  l.tasks = groups * l.row_blocks * l.lane_blocks;
  const int64_t lanes = l.vectors * m.lanes;
  l.worker_bytes = packed_a_bytes(l.depth, m) + scratch_bytes(ceil_div(l.depth, m.pair) * lanes * m.word_bytes) +
                   2 * scratch_bytes(lanes * m.acc_bytes) + panels * scratch_bytes(l.row_step * lanes * m.acc_bytes);
  return l;
}

// Elements along K of the longest sum that are packed at a time.
int64_t packed_depth(int64_t longest, const MulTraits& m) {
  return round_up(ceil_div(longest, ceil_div(longest, kBlockWords * m.pair)), m.pair);
}

}  // namespace

LinearPlan plan_linear(int64_t groups, int64_t rows, int64_t out, const int64_t (&depths)[3], bool gate,
                       const MulTraits& m) {
  LinearPlan l{};
  l.depth = packed_depth(max(max(depths[0], depths[1]), depths[2]), m);
  l.operations = 2 * groups * rows * out * (depths[0] + depths[1] + depths[2] + (gate ? 8 : 0));
  l.buffered = gate || depths[1] > 0 || depths[0] > l.depth;
  return plan_regions(l, groups, rows, out, l.buffered + (depths[2] > 0), m);
}

LinearPlan plan_dual_linear(int64_t rows, int64_t out, int64_t ranks, const int64_t (&depths)[2], const MulTraits& m) {
  LinearPlan l{};
  l.depth = packed_depth(max(depths[0], depths[1]), m);
  l.operations = 2 * rows * out * ranks * (depths[0] + depths[1] + 8);
  l.buffered = true;
  return plan_regions(l, 1, rows, out, 1 + (depths[1] > l.depth) + (ranks > 1), m);
}

bool linear_streams(int64_t rows, int64_t out, int64_t depth, Major major, const MulTraits& m) {
  const bool n_major = major == Major::n;
  if (major == Major::neither || rows * depth > kLinearStreamElements) return false;
  // A K-major matrix costs a reduction over lanes for each output; an N-major one in pairs costs an interleaving for
  // each element.
  if (n_major) return rows <= (m.pair == 1 ? 2 * kLinearStreamRows : kLinearStreamRows) && out >= m.lanes;
  // More rows would leave a quarter of the lanes of the batch empty; a long sum makes the reduction worth it.
  const bool sparse = rows <= 3 * kLinearStreamRows && 4 * rows <= 3 * round_up(rows, m.lanes) && depth >= 256;
  return rows <= kLinearStreamRows || sparse;
}

LinearPlan plan_linear_stream(int64_t groups, int64_t rows, int64_t out, const int64_t (&depths)[2], bool n_major,
                              const MulTraits& m) {
  LinearPlan l{};
  l.stream = true, l.n_major = n_major;
  l.operations = 2 * groups * rows * out * (depths[0] + depths[1]);
  const int64_t vectors = ceil_div(out, m.lanes);
  // A block of an N-major matrix is one run of memory for each k, which should not be short.
  const int64_t fewest = n_major ? 16 : 1;
  l.lane_blocks = split_count(kTasks, groups, l.operations, vectors / fewest);
  l.vectors = ceil_div(vectors, l.lane_blocks);
  while (n_major && out % (l.vectors * m.lanes) > 0 && out % (l.vectors * m.lanes) < m.lanes) ++l.vectors;
  l.lane_blocks = ceil_div(vectors, l.vectors);
  l.group_step = ceil_div(groups, max(split_count(kTasks, 1, l.operations, groups * l.lane_blocks) / l.lane_blocks, 1));
  l.tasks = ceil_div(groups, l.group_step) * l.lane_blocks;
  const int64_t element = m.word_bytes / m.pair, vector = m.lanes * m.pair;
  for (const int64_t depth : depths) l.worker_bytes += scratch_bytes(rows * round_up(depth, vector) * element);
  l.worker_bytes += 2 * kLinearStreamVectors * m.lanes * m.acc_bytes;
  return l;
}

namespace {

// One product computes T for both gradients: tasks are ranges of the context and of the width.
void plan_fused(InputGradsPlan& d, const ProblemSize& p, const MulTraits& m, bool want_x, bool want_z) {
  d.depth = min(p.out, kBlockWords * m.pair);
  const int64_t vectors = ceil_div(p.rows, m.lanes);
  // The panels of one range of the width and the packed gradients should stay in the cache; the others are streamed.
  const int64_t cached = 2 * min(p.width, kBlockM) * m.acc_bytes + ceil_div(d.depth, m.pair) * m.word_bytes;
  const int64_t in_scratch = 2 * (p.context + p.width) * m.acc_bytes / (kScratchBytes / kBlockBytes);
  // Each block of lanes packs all of W again.
  d.vectors = max(block_vectors(vectors, max(cached, in_scratch) * m.lanes, 2 * kMaxBlockVectors), 1);
  d.lane_blocks = ceil_div(vectors, d.vectors);
  const int64_t blocks = p.groups * d.lane_blocks, row_bytes = max(p.groups * p.rows * m.acc_bytes, 1);
  // Splitting the context makes partial sums of dx, splitting the width makes partial sums of dz: the smaller ones come
  // first. But a W that exceeds the cache should be read in long runs.
  const auto most = [&](bool want, int64_t features) {
    return want ? max(kPartialBytes / (row_bytes * max(features, 1)), 1) : max(max(p.context, p.width), 1);
  };
  const auto split_context = [&](int64_t tasks) {
    const int64_t wanted = split_count(want_x ? kPartialTasks : kTasks, tasks, d.operations, p.context);
    d.context_step = max(ceil_div(p.context, min(wanted, most(want_x, p.width))), 1);
    d.x_splits = max(ceil_div(p.context, d.context_step), 1);
  };
  const auto split_width = [&](int64_t tasks) {
    const int64_t wanted = min(split_count(kPartialTasks, tasks, d.operations, p.width / 64), most(want_z, p.context));
    d.width_step = max(round_up(ceil_div(p.width, wanted > 1 ? wanted / 2 * 2 : 1), 8), 1);
    d.width_step = min(d.width_step, max(p.width, 1));
    d.z_splits = max(ceil_div(p.width, d.width_step), 1);
  };
  if (!uncached(p, m) && want_x * p.width > want_z * p.context) {
    split_width(blocks);
    split_context(blocks * d.z_splits);
  } else {
    split_context(blocks);
    split_width(blocks * d.x_splits);
  }
  d.splits = d.x_splits * d.z_splits;
  const int64_t lanes = d.vectors * m.lanes;
  d.worker_bytes = packed_a_bytes(d.depth, m) + scratch_bytes(ceil_div(d.depth, m.pair) * lanes * m.word_bytes) +
                   2 * scratch_bytes(d.context_step * lanes * m.acc_bytes) +
                   2 * scratch_bytes(d.width_step * lanes * m.acc_bytes);
}

// One product for each gradient: tasks are ranges of the outputs.
void plan_split(InputGradsPlan& d, const ProblemSize& p, const MulTraits& m) {
  d.depth = min(max(max(p.context, p.width), p.out), kBlockWords * m.pair);
  const int64_t vectors = ceil_div(p.rows, m.lanes);
  // The two products take turns: the packed operand and the result's panels of one of them should stay in the cache.
  const int64_t cached =
      ceil_div(max(p.width, p.context), m.pair) * m.word_bytes + max(p.context, p.width) * m.acc_bytes;
  const int64_t in_scratch = 2 * (p.context + p.width) * m.acc_bytes / (kScratchBytes / kBlockBytes);
  d.vectors = max(block_vectors(vectors, max(cached, in_scratch) * m.lanes), 1);
  d.lane_blocks = ceil_div(vectors, d.vectors);
  const int64_t blocks = p.groups * d.lane_blocks;
  const int64_t split_bytes = max(p.groups * p.rows * (p.context + p.width) * m.acc_bytes, 1);
  d.splits = min(split_count(kPartialTasks, blocks, d.operations, p.out), max(kPartialBytes / split_bytes, 1));
  d.out_step = max(ceil_div(p.out, d.splits), 1);
  d.splits = max(ceil_div(p.out, d.out_step), 1);
  d.x_splits = d.z_splits = d.splits;
  const int64_t lanes = d.vectors * m.lanes;
  d.worker_bytes = packed_a_bytes(d.depth, m) + 2 * scratch_bytes(ceil_div(d.depth, m.pair) * lanes * m.word_bytes) +
                   scratch_bytes(d.out_step * lanes * m.acc_bytes) + scratch_bytes(p.context * lanes * m.acc_bytes) +
                   scratch_bytes(p.width * lanes * m.acc_bytes);
}

}  // namespace

namespace {

// Tasks are ranges of the context and, where those are few, of the outputs.
void plan_input_stream(InputGradsPlan& d, const ProblemSize& p, const MulTraits& m, bool want_x) {
  const bool n_major = d.layout.major == Major::n;
  d.vectors = d.lane_blocks = 1;
  const int64_t split_bytes = max(p.groups * p.rows * max(p.width, p.context) * m.acc_bytes, 1);
  const int64_t most = max(kPartialBytes / split_bytes, 1);
  const int64_t context_parts = split_count(min(kTasks, want_x ? most : kTasks), p.groups, d.operations, p.context);
  d.context_step = ceil_div(p.context, context_parts);
  d.z_splits = min(split_count(kTasks, p.groups * context_parts, d.operations, p.out / kStreamOutputs),
                   max(most / context_parts, 1));
  if (n_major) d.z_splits = 1;
  d.out_step = max(ceil_div(p.out, d.z_splits), 1);
  d.z_splits = max(ceil_div(p.out, d.out_step), 1);
  d.splits = d.x_splits = ceil_div(p.context, d.context_step) * d.z_splits;
  d.group_step = group_step(p.groups, d.splits, d.operations);
  const int64_t element = m.word_bytes / m.pair, slack = 2 * m.lanes;
  const int64_t outputs = n_major ? round_up(p.out, m.lanes * m.pair) : kStreamOutputs;
  d.worker_bytes = scratch_bytes(p.rows * (kStreamDepth + slack) * m.acc_bytes) +
                   3 * scratch_bytes(p.rows * (p.width + slack) * m.acc_bytes) +
                   scratch_bytes(p.rows * d.context_step * m.acc_bytes) + scratch_bytes(p.rows * outputs * element) +
                   scratch_bytes((kStreamDepth + slack) * element) + scratch_bytes(4 * m.pair * m.lanes * element);
}

}  // namespace

InputGradsPlan plan_input_grads(const ProblemSize& p, const MulTraits& m, bool weight, bool want_x, bool want_z,
                                const WeightLayout& layout) {
  InputGradsPlan d{};
  d.layout = layout, d.group_step = 1;
  // One product of depth O with both reductions in its epilogue, or two products of depth X and Z: the epilogue costs
  // as much as kEpilogueOutputs outputs. A few rows are bound by reading W.
  constexpr int64_t kEpilogueOutputs = 8;
  d.form = weight && p.out < kEpilogueOutputs ? InputForm::split : InputForm::fused;
  const int64_t streamed = uncached(p, m) ? min(kInputStreamRowsUncached, p.out) : stream_rows(p, kInputStreamRows, m);
  if (weight && p.rows <= streamed && streams(layout, p, m)) d.form = InputForm::stream;
  d.operations = 2 * p.groups * p.rows * p.out * (weight ? p.context * p.width : p.context + p.width);
  if (d.form == InputForm::stream)
    plan_input_stream(d, p, m, want_x);
  else if (d.form == InputForm::split)
    plan_split(d, p, m);
  else
    plan_fused(d, p, m, want_x, want_z);
  d.tasks = ceil_div(p.groups, d.group_step) * d.lane_blocks * d.splits;
  const int64_t rows = p.groups * p.rows * m.acc_bytes;
  if (want_x && d.x_splits > 1) d.partial_bytes += d.x_splits * rows * p.width;
  if (want_z && d.z_splits > 1) d.partial_bytes += d.z_splits * rows * p.context;
  return d;
}

WeightGradsPlan plan_weight_grads(const ProblemSize& p, const MulTraits& m, const MulTraits& sum_traits,
                                  const bool (&want)[4], bool one) {
  WeightGradsPlan w{};
  if (!one && plan_outer(w, p, m, sum_traits, want)) return w;
  w.context_lanes = p.width < 4 * m.lanes && p.context > p.width;
  const int64_t lanes = w.context_lanes ? p.context : p.width, outer = w.context_lanes ? p.width : p.context;
  // For small sizes PyTorch computes vectors and dot products, whose pairwise sums are more exact than any order of a
  // plain sum in float. This much work takes microseconds either way.
  const auto region = [&](int64_t extent, int64_t lane_count) {
    RegionPlan r = plan_region(p.groups, p.out, extent, lane_count, p.rows, m);
    if (r.operations > kWideOperations) return r;
    r = plan_region(p.groups, p.out, extent, lane_count, p.rows, sum_traits);
    r.wide = true;
    return r;
  };
  if (want[0]) w.weight = region(outer, lanes);
  w.weight_z = region(1, p.context);
  w.weight_x = region(1, p.width + one);
  w.bias = plan_region(p.groups, 1, 1, p.out, p.rows, sum_traits);
  const RegionPlan* regions[4] = {&w.weight, &w.weight_z, &w.weight_x, &w.bias};
  for (int t = 0; t < 4; ++t) {
    if (!want[t]) continue;
    w.worker_bytes = max(w.worker_bytes, regions[t]->worker_bytes);
    w.partial_bytes = max(w.partial_bytes, regions[t]->partial_bytes);
  }
  return w;
}

}  // namespace mi_kernels
