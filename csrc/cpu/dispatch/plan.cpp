#include "cpu/dispatch/plan.h"

namespace mi_kernels {
namespace {

using namespace plan;

constexpr int64_t kAlign = 64;

int64_t packed_rows_bytes(int64_t depth, const Machine& machine) {
  return round_up(kPackedRows * ceil_div(depth, machine.pair) * machine.word_bytes, kAlign);
}

Order choose_order(const ProblemSize& p) {
  // The product's inner axis pays for the epilogue, so the longer one goes inside.
  if (p.width >= p.context || p.width >= 64) return Order::width_inside;
  return Order::context_inside;
}

// Rows up to which reading W is what costs; a dtype that is multiplied in pairs reaches its own bound earlier,
// and tiles of outputs that are mostly empty earlier still.
int64_t stream_rows(const ProblemSize& p, int64_t most, const Machine& m) {
  return min(m.pair == 1 ? most : most - 2, p.out);
}

// In double: without W the sizes may have any product.
bool uncached(const ProblemSize& p, const Machine& m) {
  return double(p.out) * double(p.context) * double(p.width) * double(m.word_bytes / m.pair) >= double(kUncachedBytes);
}

RegionPlan plan_region(int64_t groups, int64_t outputs, int64_t extent, int64_t lanes, int64_t batch,
                       const Machine& m) {
  RegionPlan r{};
  const int64_t rows = outputs * extent;
  r.outputs = outputs, r.extent = extent;
  r.operations = 2 * groups * rows * lanes * batch;
  const int64_t vectors = ceil_div(lanes, m.lanes);
  r.vectors = max(ceil_div(vectors, max(ceil_div(vectors, kMaxRegionVectors), 1)), 1);
  r.lane_blocks = ceil_div(vectors, r.vectors);
  r.feature_step = max(ceil_div(extent, max(ceil_div(extent, kRegionRows), 1)), 1);
  r.feature_blocks = ceil_div(extent, r.feature_step);
  r.out_step = max(min(kRegionRows / r.feature_step, outputs), 1);
  r.row_step = r.out_step * r.feature_step;
  r.row_blocks = ceil_div(outputs, r.out_step) * r.feature_blocks;
  const int64_t regions = groups * r.row_blocks * r.lane_blocks;
  const int64_t result_bytes = max(groups * rows * lanes * m.acc_bytes, 1);
  r.batch_splits =
      min(splits(kPartialTasks, regions, r.operations, ceil_div(batch, 64)), max(kPartialBytes / result_bytes, 1));
  r.batch_step = round_up(max(ceil_div(batch, r.batch_splits), 1), 2);
  r.batch_splits = max(ceil_div(batch, r.batch_step), 1);
  // Products are added up one by one within a depth and then depth by depth: with 128 of them the rounding
  // of a long batch stays below that of PyTorch's own matrix product in float.
  constexpr int64_t kSumWords = 128;
  r.depth = min(r.batch_step, kSumWords * m.pair);
  r.tasks = regions * r.batch_splits;
  const int64_t plane = r.vectors * m.lanes;
  r.worker_bytes = packed_rows_bytes(r.depth, m) + round_up(ceil_div(r.depth, m.pair) * plane * m.word_bytes, kAlign) +
                   round_up(r.row_step * plane * m.acc_bytes, kAlign);
  const int64_t padded = round_up(r.depth, m.lanes * m.pair);  // of the transposed factors of the rows
  r.worker_bytes += round_up((r.out_step + r.feature_step) * padded * m.acc_bytes, kAlign) + kAlign;
  r.partial_bytes = r.batch_splits > 1 ? r.batch_splits * result_bytes : 0;
  return r;
}

}  // namespace

namespace {

// One task reads the whole rows of W of some outputs; its lanes run along (i, j).
void plan_stream(ForwardPlan& f, const ProblemSize& p, const Machine& m) {
  f.vectors = 1;
  f.lane_blocks = 1;
  f.outer_splits = 1;
  f.depth = kStreamDepth;
  const int64_t out_splits = splits(kTasks, p.groups, f.operations, ceil_div(p.out, 4));
  f.out_step = max(min(ceil_div(p.out, out_splits), 512), 1);
  f.out_blocks = ceil_div(p.out, f.out_step);
  f.tasks = p.groups * f.out_blocks;
  const int64_t element = m.word_bytes / m.pair, slack = 2 * m.lanes;
  f.worker_bytes = round_up(p.rows * (kStreamDepth + slack) * element, kAlign) +
                   round_up(p.rows * (p.width + slack) * m.acc_bytes, kAlign) +
                   round_up(f.out_step * p.rows * m.lanes * m.acc_bytes, kAlign) +
                   round_up(4 * m.lanes * m.pair * element, kAlign);
}

}  // namespace

ForwardPlan plan_forward(const ProblemSize& p, const Machine& m, bool weight, bool weight_z, bool weight_x) {
  ForwardPlan f{};
  f.order = choose_order(p);
  if (weight && p.rows <= stream_rows(p, kStreamRows, m) && p.context * p.width >= 4 * m.lanes &&
      p.width * p.rows <= (1 << 18))
    f.order = Order::stream;
  const bool width_inside = f.order == Order::width_inside;
  const int64_t inner = width_inside ? p.width : p.context, outer = width_inside ? p.context : p.width;
  f.operations =
      2 * p.groups * p.rows * p.out * (weight * p.context * p.width + weight_z * p.context + weight_x * p.width);
  if (f.order == Order::stream) {
    plan_stream(f, p, m);
    return f;
  }
  f.depth = min(max(p.width, p.context), kDepthWords * m.pair);
  const int64_t vectors = ceil_div(p.rows, m.lanes), vector_bytes = m.lanes * m.acc_bytes;
  // Planes of one vector of lanes: outputs, outer operand, packed inner operand.
  const int64_t out_planes = max(min(p.out, 4096), 1);
  f.vectors = max(block_vectors(vectors, (out_planes + outer + min(inner, f.depth)) * vector_bytes), 1);
  f.lane_blocks = ceil_div(vectors, f.vectors);
  const int64_t blocks = p.groups * f.lane_blocks;
  // Each task packs its lanes again, which pays from about kRowsWorthPacking rows on.
  constexpr int64_t kRowsWorthPacking = 128;
  const int64_t most = max(p.out * outer / kRowsWorthPacking, 1);
  const int64_t out_splits = max(splits(kTasks, blocks, f.operations, min(p.out, most)), ceil_div(p.out, out_planes));
  f.out_step = max(ceil_div(p.out, out_splits), 1);
  f.out_blocks = ceil_div(p.out, f.out_step);
  const int64_t result_bytes = max(p.groups * p.rows * p.out * m.acc_bytes, 1);
  f.outer_splits = weight ? splits(kPartialTasks, blocks * f.out_blocks, f.operations, outer / kPackedRows) : 1;
  f.outer_splits = max(min(f.outer_splits, kPartialBytes / result_bytes), 1);
  f.outer_step = max(ceil_div(outer, f.outer_splits), 1);
  f.outer_splits = max(ceil_div(outer, f.outer_step), 1);
  f.tasks = blocks * f.out_blocks * f.outer_splits;
  const int64_t lanes = f.vectors * m.lanes;
  f.worker_bytes = packed_rows_bytes(f.depth, m) + round_up(ceil_div(f.depth, m.pair) * lanes * m.word_bytes, kAlign) +
                   round_up(f.out_step * lanes * m.acc_bytes, kAlign) +
                   round_up(f.outer_step * lanes * m.acc_bytes, kAlign);
  f.partial_bytes = f.outer_splits > 1 ? f.outer_splits * result_bytes : 0;
  return f;
}

bool outputs_in_lanes(int64_t rows, int64_t out, int64_t depth, bool along, const Machine& m) {
  // Its rows have to pay for the matrix, which is packed for each region; with the rows in the lanes the operands and
  // the results are transposed, which weighs as much at 3/4 as many elements along the sum.
  const int64_t fewest = along ? max(depth * 3 / 4, 48) : 1;
  // Lanes may be empty, a few, or half of them where the other way transposes the matrix.
  const int64_t lanes = round_up(out, m.lanes);
  return depth > 0 && rows >= fewest && (along ? 4 * lanes <= 5 * out : lanes <= 2 * out) && out > 0;
}

LinearPlan plan_linear(int64_t groups, int64_t rows, int64_t out, const int64_t (&depths)[3], bool gate,
                       const Machine& m) {
  constexpr int64_t kMostRows = 1024, kFewestRows = 512, kPlaneBytes = 512 << 10;
  constexpr int64_t kFewTasks = 4, kFewestSharedRows = 32;
  LinearPlan l{};
  const int64_t sum = depths[0] + depths[1], longest = max(max(depths[0], depths[1]), depths[2]);
  l.operations = 2 * groups * rows * out * (sum + depths[2] + (gate ? 8 : 0));
  const int64_t stretches = ceil_div(longest, kDepthWords * m.pair);
  l.depth = round_up(ceil_div(longest, stretches), m.pair);
  l.kept = gate || depths[1] > 0 || depths[0] > l.depth;
  const int64_t vectors = ceil_div(out, m.lanes), planes = (l.kept ? 1 : 0) + (depths[2] > 0 ? 1 : 0);
  l.vectors = ceil_div(vectors, ceil_div(vectors, kMaxRegionVectors));
  l.lane_blocks = ceil_div(vectors, l.vectors);
  const int64_t row_bytes = planes * l.vectors * m.lanes * m.acc_bytes;
  const int64_t most = planes ? max(min(kPlaneBytes / row_bytes, kMostRows), kFewestRows) : kMostRows;
  // Each region packs the matrix again, so they are large, unless there would be too few of them.
  int64_t wanted = splits(kTasks, groups * l.lane_blocks, l.operations, rows / kFewestRows);
  if (groups * l.lane_blocks * wanted < kFewTasks)
    wanted = splits(kFewTasks, groups * l.lane_blocks, l.operations, rows / kFewestSharedRows);
  const int64_t blocks = max(wanted, ceil_div(rows, most));
  l.row_step = round_up(ceil_div(rows, blocks), 8);  // whole tiles
  l.row_blocks = ceil_div(rows, l.row_step);
  l.tasks = groups * l.row_blocks * l.lane_blocks;
  const int64_t lanes = l.vectors * m.lanes;
  l.worker_bytes = packed_rows_bytes(l.depth, m) + round_up(ceil_div(l.depth, m.pair) * lanes * m.word_bytes, kAlign) +
                   2 * round_up(lanes * m.acc_bytes, kAlign) +
                   planes * round_up(l.row_step * lanes * m.acc_bytes, kAlign);
  return l;
}

bool linear_streams(int64_t rows, int64_t out, int64_t depth, Lie lie, const Machine& m) {
  const bool across = lie == Lie::across;
  if (lie == Lie::neither || rows * depth > kLinearStreamElements) return false;
  // Along the sum every output costs an addition of lanes; where pairs are put together, every element costs that.
  const int64_t most = across && m.pair == 1 ? 2 * kLinearStreamRows : kLinearStreamRows;
  return rows <= most && (!across || out >= m.lanes);
}

LinearPlan plan_linear_stream(int64_t groups, int64_t rows, int64_t out, const int64_t (&depths)[2], bool across,
                              const Machine& m) {
  LinearPlan l{};
  l.stream = true, l.across = across;
  l.operations = 2 * groups * rows * out * (depths[0] + depths[1]);
  const int64_t vectors = ceil_div(out, m.lanes);
  // Across, a block is a run of memory for each element of the sum.
  const int64_t fewest = across ? 16 : 1;
  l.lane_blocks = splits(kTasks, groups, l.operations, vectors / fewest);
  l.vectors = ceil_div(vectors, l.lane_blocks);
  while (across && out % (l.vectors * m.lanes) > 0 && out % (l.vectors * m.lanes) < m.lanes) ++l.vectors;
  l.lane_blocks = ceil_div(vectors, l.vectors);
  l.group_step = ceil_div(groups, max(splits(kTasks, 1, l.operations, groups * l.lane_blocks) / l.lane_blocks, 1));
  l.tasks = ceil_div(groups, l.group_step) * l.lane_blocks;
  const int64_t element = m.word_bytes / m.pair, vector = m.lanes * m.pair;
  for (const int64_t depth : depths) l.worker_bytes += round_up(rows * round_up(depth, vector) * element, kAlign);
  l.worker_bytes += 2 * kLinearStreamVectors * m.lanes * m.acc_bytes;
  return l;
}

namespace {

// One product makes T for both gradients: tasks are ranges of the context and of the width.
void plan_together(InputGradsPlan& d, const ProblemSize& p, const Machine& m, bool want_x, bool want_z) {
  d.depth = min(p.out, kDepthWords * m.pair);
  const int64_t vectors = ceil_div(p.rows, m.lanes);
  // In the cache lie the planes of one stretch of the width and the packed gradients; the others pass by.
  const int64_t cached = 2 * min(p.width, kPackedRows) * m.acc_bytes + ceil_div(d.depth, m.pair) * m.word_bytes;
  const int64_t kept = 2 * (p.context + p.width) * m.acc_bytes / (kScratchBytes / kBlockBytes);
  // Each block of lanes packs the whole of W again.
  d.vectors = max(block_vectors(vectors, max(cached, kept) * m.lanes, 2 * kMaxBlockVectors), 1);
  d.lane_blocks = ceil_div(vectors, d.vectors);
  const int64_t blocks = p.groups * d.lane_blocks, row_bytes = max(p.groups * p.rows * m.acc_bytes, 1);
  // Where the context is split, dx is made of partial sums, where the width is split, dz: the smaller ones first. But a
  // W that comes from memory is to be read in long runs.
  const auto most = [&](bool want, int64_t features) {
    return want ? max(kPartialBytes / (row_bytes * max(features, 1)), 1) : max(max(p.context, p.width), 1);
  };
  const auto split_context = [&](int64_t tasks) {
    const int64_t wanted = splits(want_x ? kPartialTasks : kTasks, tasks, d.operations, p.context);
    d.context_step = max(ceil_div(p.context, min(wanted, most(want_x, p.width))), 1);
    d.x_splits = max(ceil_div(p.context, d.context_step), 1);
  };
  const auto split_width = [&](int64_t tasks) {
    const int64_t wanted = min(splits(kPartialTasks, tasks, d.operations, p.width / 64), most(want_z, p.context));
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
  d.worker_bytes = packed_rows_bytes(d.depth, m) + round_up(ceil_div(d.depth, m.pair) * lanes * m.word_bytes, kAlign) +
                   2 * round_up(d.context_step * lanes * m.acc_bytes, kAlign) +
                   2 * round_up(d.width_step * lanes * m.acc_bytes, kAlign);
}

// A product for each gradient: tasks are ranges of the outputs.
void plan_separate(InputGradsPlan& d, const ProblemSize& p, const Machine& m) {
  d.depth = min(max(max(p.context, p.width), p.out), kDepthWords * m.pair);
  const int64_t vectors = ceil_div(p.rows, m.lanes);
  // The two products take turns: in the cache lie the packed operand and the planes of the result of one of them.
  const int64_t cached =
      ceil_div(max(p.width, p.context), m.pair) * m.word_bytes + max(p.context, p.width) * m.acc_bytes;
  const int64_t kept = 2 * (p.context + p.width) * m.acc_bytes / (kScratchBytes / kBlockBytes);
  d.vectors = max(block_vectors(vectors, max(cached, kept) * m.lanes), 1);
  d.lane_blocks = ceil_div(vectors, d.vectors);
  const int64_t blocks = p.groups * d.lane_blocks;
  const int64_t split_bytes = max(p.groups * p.rows * (p.context + p.width) * m.acc_bytes, 1);
  d.splits = min(splits(kPartialTasks, blocks, d.operations, p.out), max(kPartialBytes / split_bytes, 1));
  d.out_step = max(ceil_div(p.out, d.splits), 1);
  d.splits = max(ceil_div(p.out, d.out_step), 1);
  d.x_splits = d.z_splits = d.splits;
  const int64_t lanes = d.vectors * m.lanes;
  d.worker_bytes = packed_rows_bytes(d.depth, m) +
                   2 * round_up(ceil_div(d.depth, m.pair) * lanes * m.word_bytes, kAlign) +
                   round_up(d.out_step * lanes * m.acc_bytes, kAlign) +
                   round_up(p.context * lanes * m.acc_bytes, kAlign) + round_up(p.width * lanes * m.acc_bytes, kAlign);
}

}  // namespace

namespace {

// Tasks are ranges of the context and, where those are few, of the outputs.
void plan_input_stream(InputGradsPlan& d, const ProblemSize& p, const Machine& m, bool want_x) {
  d.vectors = d.lane_blocks = 1;
  const int64_t split_bytes = max(p.groups * p.rows * max(p.width, p.context) * m.acc_bytes, 1);
  const int64_t most = max(kPartialBytes / split_bytes, 1);
  const int64_t context_parts = splits(min(kTasks, want_x ? most : kTasks), p.groups, d.operations, p.context);
  d.context_step = ceil_div(p.context, context_parts);
  d.z_splits =
      min(splits(kTasks, p.groups * context_parts, d.operations, p.out / kStreamOutputs), max(most / context_parts, 1));
  d.out_step = max(ceil_div(p.out, d.z_splits), 1);
  d.z_splits = max(ceil_div(p.out, d.out_step), 1);
  d.splits = d.x_splits = ceil_div(p.context, d.context_step) * d.z_splits;
  const int64_t element = m.word_bytes / m.pair, slack = 2 * m.lanes;
  d.worker_bytes =
      round_up(p.rows * (kStreamDepth + slack) * m.acc_bytes, kAlign) +
      3 * round_up(p.rows * (p.width + slack) * m.acc_bytes, kAlign) +
      round_up(p.rows * d.context_step * m.acc_bytes, kAlign) + round_up(p.rows * kStreamOutputs * element, kAlign) +
      round_up((kStreamDepth + slack) * element, kAlign) + round_up(4 * m.pair * m.lanes * element, kAlign);
}

}  // namespace

InputGradsPlan plan_input_grads(const ProblemSize& p, const Machine& m, bool weight, bool want_x, bool want_z) {
  InputGradsPlan d{};
  // One product of depth O and an epilogue of both reductions, or two products of depth X and Z: the
  // epilogue weighs as much as kEpilogueOutputs outputs. A few rows are bound by reading W.
  constexpr int64_t kEpilogueOutputs = 8;
  d.form = weight && p.out < kEpilogueOutputs ? InputForm::separate : InputForm::together;
  const int64_t streamed = uncached(p, m) ? min(kInputStreamRowsUncached, p.out) : stream_rows(p, kInputStreamRows, m);
  if (weight && p.rows <= streamed && p.context * p.width >= 4 * m.lanes && p.width * p.rows <= (1 << 18))
    d.form = InputForm::stream;
  d.operations = 2 * p.groups * p.rows * p.out * (weight ? p.context * p.width : p.context + p.width);
  if (d.form == InputForm::stream)
    plan_input_stream(d, p, m, want_x);
  else if (d.form == InputForm::separate)
    plan_separate(d, p, m);
  else
    plan_together(d, p, m, want_x, want_z);
  d.tasks = p.groups * d.lane_blocks * d.splits;
  const int64_t rows = p.groups * p.rows * m.acc_bytes;
  if (want_x && d.x_splits > 1) d.partial_bytes += d.x_splits * rows * p.width;
  if (want_z && d.z_splits > 1) d.partial_bytes += d.z_splits * rows * p.context;
  return d;
}

WeightGradsPlan plan_weight_grads(const ProblemSize& p, const Machine& m, const Machine& sums, const bool (&want)[4]) {
  WeightGradsPlan w{};
  w.context_lanes = p.width < 4 * m.lanes && p.context > p.width;
  const int64_t lanes = w.context_lanes ? p.context : p.width, outer = w.context_lanes ? p.width : p.context;
  // Of few elements PyTorch makes vectors and dot products, whose sums have many parts: no order of a sum in float is
  // as exact. This much work takes microseconds either way.
  constexpr int64_t kWideOperations = 1 << 17;
  const auto region = [&](int64_t extent, int64_t across) {
    RegionPlan r = plan_region(p.groups, p.out, extent, across, p.rows, m);
    if (r.operations > kWideOperations) return r;
    r = plan_region(p.groups, p.out, extent, across, p.rows, sums);
    r.wide = true;
    return r;
  };
  if (want[0]) w.weight = region(outer, lanes);
  w.weight_z = region(1, p.context);
  w.weight_x = region(1, p.width);
  w.bias = plan_region(p.groups, 1, 1, p.out, p.rows, sums);
  const RegionPlan* regions[4] = {&w.weight, &w.weight_z, &w.weight_x, &w.bias};
  for (int t = 0; t < 4; ++t) {
    if (!want[t]) continue;
    w.worker_bytes = max(w.worker_bytes, regions[t]->worker_bytes);
    w.partial_bytes = max(w.partial_bytes, regions[t]->partial_bytes);
  }
  return w;
}

}  // namespace mi_kernels
