#include "cuda/host/plan.h"

#include <algorithm>

#include "common/integers.h"
#include "cuda/host/weight_layout.h"
#include "cuda/sm80/layout.h"
#include "cuda/small_batch/tile.h"

namespace mi_kernels::cuda {
namespace {

bool has_matrix_instructions(DType dtype) { return storage_bytes(dtype) == 2 || dtype == DType::tf32; }

// The most terms of a summation block. A longer one in float32 would round more than PyTorch's blocked sums do; 16-bit
// inputs are rounded more than any sum of them, and float64 has digits to spare.
int64_t max_summation_block(DType dtype) { return dtype == DType::f32 ? 256 : int64_t(1) << 40; }

bool has_whole_chunks(int64_t elements, DType dtype) { return elements % (16 / storage_bytes(dtype)) == 0; }

// Whether a W along the outputs is copied although the mma engine could read it there: it would gather each chunk by
// elements, once for each of several row tiles, and reads the copy, with `inner` features in a line, by cp.async.
bool gathers_more_than_a_copy(const ProblemSize& p, const WeightLayout& layout, int64_t inner, const TileShape& tile,
                              DType dtype) {
  const bool chunked = layout.aligned && has_whole_chunks(p.out, dtype);
  return !chunked && has_whole_chunks(inner, dtype) && p.rows > tile.rows;
}

// The least that is worth the start of a pipeline and a partial sum.
constexpr int64_t kMinStagesPerSplit = 8;

constexpr int64_t kMaxPartialElements = int64_t(1) << 22;  // of all splits together

// How often to split `units` if there are `tiles` tiles and `elements` results: enough for two blocks on each
// multiprocessor, but with at least `min_units` in each split.
int64_t split_count(int64_t tiles, int64_t elements, int64_t units, int64_t min_units, const DeviceProperties& device) {
  const int64_t wanted = 2 * device.sm_count / std::max<int64_t>(tiles, 1);
  const int64_t most = std::min(units / min_units, kMaxPartialElements / std::max<int64_t>(elements, 1));
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1));
}

}  // namespace

TileShape matmul_tile(DType dtype) {
  const int64_t stage_k = kStageBytes / storage_bytes(dtype), side = has_matrix_instructions(dtype) ? 128 : 64;
  return {side, side, stage_k};
}

TileShape input_grads_tile(DType dtype) {
  const int64_t stage_k = kStageBytes / storage_bytes(dtype);
  return {has_matrix_instructions(dtype) ? 128 : 64, 64, stage_k};
}

Grid plan_matmul(int64_t groups, int64_t rows, int64_t cols, int64_t k, bool may_split, DType dtype,
                 const DeviceProperties& device) {
  const TileShape tile = matmul_tile(dtype);
  Grid g{ceil_div(rows, tile.rows), ceil_div(cols, tile.cols), 1, 0, groups};
  const int64_t stages = ceil_div(k, tile.k);
  if (may_split)
    g.splits =
        split_count(g.row_tiles * g.col_tiles * groups, groups * rows * cols, stages, kMinStagesPerSplit, device);
  const int64_t split_stages = std::max<int64_t>(ceil_div(stages, g.splits), 1);
  g.splits = std::max<int64_t>(ceil_div(stages, split_stages), 1);
  g.split_size = split_stages * tile.k;
  return g;
}

// Up to two blocks along the rows, of which the second finds W in L2. *Estimate*: a GPU has 10 to 20 multiply-adds in
// the time in which its memory delivers 2 bytes, and an element of W costs one for each row, one for its conversion and
// half of one for the products.
bool use_small_batch(const ProblemSize& p, DType dtype) {
  return dtype != DType::tf32 && p.rows <= 2 * small_batch_rows(storage_bytes(dtype));
}

namespace {

// Splits a reduction over k, of which a block takes `step` elements at a time. With fewer than two steps there is
// nothing to have in flight.
void split_in_steps(Grid& g, const ProblemSize& p, int64_t k, int64_t step, const DeviceProperties& device) {
  const int64_t steps = ceil_div(k, step);
  g.splits = split_count(g.row_tiles * g.col_tiles * p.groups, p.groups * p.rows * p.out, steps, 2, device);
  const int64_t split_steps = std::max<int64_t>(ceil_div(steps, g.splits), 1);
  g.splits = std::max<int64_t>(ceil_div(steps, split_steps), 1);
  g.split_size = split_steps * step;
}

Grid plan_small_batch_forward(const ProblemSize& p, int64_t k, DType dtype, const DeviceProperties& device) {
  Grid g{ceil_div(p.rows, small_batch_rows(storage_bytes(dtype))), ceil_div(p.out, kSmallBatchOutputs), 1, 0, p.groups};
  split_in_steps(g, p, k, kSmallBatchThreads * 16 / storage_bytes(dtype), device);
  return g;
}

Grid plan_small_batch_forward_n_major(const ProblemSize& p, int64_t k, bool aligned, DType dtype,
                                      const DeviceProperties& device) {
  const bool vectorized = aligned && has_whole_chunks(p.out, dtype);
  const int64_t chunks = vectorized ? p.out * storage_bytes(dtype) / 16 : p.out;
  const int64_t group_threads = small_batch_group_threads(chunks, vectorized);
  Grid g{ceil_div(p.rows, small_batch_rows(storage_bytes(dtype))), ceil_div(chunks, group_threads), 1, 0, p.groups};
  split_in_steps(g, p, k, kSmallBatchThreads / group_threads * kSmallBatchInFlight, device);
  return g;
}

}  // namespace

ForwardPlan plan_forward(const ProblemSize& p, const WeightLayout* layout, DType dtype,
                         const DeviceProperties& device) {
  const int64_t k = layout ? p.context * p.width : 0, stage_k = matmul_tile(dtype).k;
  const int64_t stages = ceil_div(p.width, stage_k);
  ForwardPlan plan{};
  // In float16 the products z x are generated as tf32, at half the rate of matrix instructions. Per context there are
  // none, but the sums over X are padded to whole stages: better as long as that adds less than it saves.
  plan.per_context = dtype == DType::f16 && (k == 0 || 2 * p.width >= stages * stage_k);
  plan.small_batch = use_small_batch(p, dtype);
  if (plan.small_batch) plan.per_context = false;
  plan.n_major = k > 0 && layout->n_major && (layout->flat || plan.per_context);
  if (plan.n_major && !plan.small_batch)
    plan.n_major = !gathers_more_than_a_copy(p, *layout, plan.per_context ? p.width : k, matmul_tile(dtype), dtype);
  plan.repacked = k > 0 && !plan.n_major && !(layout->k_major && (layout->flat || plan.per_context));
  if (plan.small_batch && plan.n_major) {
    plan.grid = plan_small_batch_forward_n_major(p, k, layout->aligned, dtype, device);
  } else if (plan.small_batch) {
    plan.grid = plan_small_batch_forward(p, k, dtype, device);
  } else if (!plan.per_context || k == 0) {
    plan.grid = plan_matmul(p.groups, p.rows, p.out, k, true, dtype, device);
  } else {
    Grid& g = plan.grid;
    g = plan_matmul(p.groups, p.rows, p.out, 0, false, dtype, device);
    g.splits =
        split_count(g.blocks(), p.groups * p.rows * p.out, p.context, ceil_div(kMinStagesPerSplit, stages), device);
    g.split_size = ceil_div(p.context, g.splits);
    g.splits = ceil_div(p.context, g.split_size);
  }
  return plan;
}

// The mma engine would spill in float64 if it summed along contiguous outputs.
bool repacks_for_input_grads(const ProblemSize& p, const WeightLayout& layout, DType dtype) {
  const bool reads_n_major =
      use_small_batch(p, dtype) ||
      (dtype != DType::f64 && !gathers_more_than_a_copy(p, layout, p.width, input_grads_tile(dtype), dtype));
  return !layout.k_major && !(layout.n_major && reads_n_major);
}

Grid plan_input_grads(int64_t groups, int64_t rows, int64_t context, int64_t width, DType dtype,
                      const DeviceProperties& device) {
  const TileShape tile = input_grads_tile(dtype);
  Grid g{ceil_div(rows, tile.rows), ceil_div(width, tile.cols), 1, 0, groups};
  g.splits = split_count(g.row_tiles * g.col_tiles * groups, groups * rows * width, context, 1, device);
  g.split_size = std::min(std::max<int64_t>(ceil_div(context, g.splits), 1), max_summation_block(dtype));
  g.splits = std::max<int64_t>(ceil_div(context, g.split_size), 1);
  return g;
}

Grid plan_small_batch_input_grads(const ProblemSize& p, bool vectorized, DType dtype, const DeviceProperties& device,
                                  InputGradsSplits& s) {
  const int64_t elements = vectorized ? 16 / storage_bytes(dtype) : 1, chunks = ceil_div(p.width, elements);
  s.group_threads = 1;
  while (s.group_threads < kSmallBatchThreads && s.group_threads < chunks) s.group_threads *= 2;
  Grid g{ceil_div(p.rows, small_batch_rows(storage_bytes(dtype))), ceil_div(chunks, s.group_threads), 1, 0, p.groups};
  const int64_t tiles = g.row_tiles * g.col_tiles * p.groups, results = p.groups * p.rows * p.width;
  const int64_t thread_groups = kSmallBatchThreads / s.group_threads, turns = ceil_div(p.context, thread_groups);
  constexpr int64_t kMinOutputsPerSplit = 32;
  s.out_splits = std::max<int64_t>(ceil_div(p.out, max_summation_block(dtype)), 1);
  s.context_splits = split_count(tiles * s.out_splits, results * s.out_splits, turns, 1, device);
  g.split_size =
      std::min(std::max<int64_t>(ceil_div(turns, s.context_splits), 1), max_summation_block(dtype)) * thread_groups;
  s.context_splits = std::max<int64_t>(ceil_div(p.context, g.split_size), 1);
  s.out_splits = std::max(s.out_splits, split_count(tiles * s.context_splits, results * s.context_splits, p.out,
                                                    kMinOutputsPerSplit, device));
  s.out_split_size = std::max<int64_t>(ceil_div(p.out, s.out_splits), 1);
  s.out_splits = std::max<int64_t>(ceil_div(p.out, s.out_split_size), 1);
  g.splits = s.context_splits * s.out_splits;
  return g;
}

Grid plan_small_batch_input_grads_n_major(const ProblemSize& p, bool vectorized, DType dtype,
                                          const DeviceProperties& device, InputGradsSplits& s) {
  const int64_t elements = vectorized ? 16 / storage_bytes(dtype) : 1;
  s.group_threads = small_batch_group_threads(ceil_div(p.out, elements), vectorized);
  const int64_t thread_groups = kSmallBatchThreads / s.group_threads, step = s.group_threads * elements;
  Grid g{ceil_div(p.rows, small_batch_rows(storage_bytes(dtype))), ceil_div(p.width, thread_groups), 1, 0, p.groups};
  const int64_t tiles = g.row_tiles * g.col_tiles * p.groups, results = p.groups * p.rows * p.width;
  const int64_t turns = ceil_div(p.context, kSmallBatchInFlight);
  constexpr int64_t kMinStepsPerSplit = 8;
  s.out_splits = std::max<int64_t>(ceil_div(p.out, s.group_threads * max_summation_block(dtype)), 1);
  s.context_splits = split_count(tiles * s.out_splits, results * s.out_splits, turns, 1, device);
  g.split_size = std::min(std::max<int64_t>(ceil_div(turns, s.context_splits), 1) * kSmallBatchInFlight,
                          max_summation_block(dtype));
  s.context_splits = std::max<int64_t>(ceil_div(p.context, g.split_size), 1);
  s.out_splits = std::max(s.out_splits, split_count(tiles * s.context_splits, results * s.context_splits,
                                                    ceil_div(p.out, step), kMinStepsPerSplit, device));
  s.out_split_size = std::max<int64_t>(ceil_div(ceil_div(p.out, s.out_splits), step), 1) * step;
  s.out_splits = std::max<int64_t>(ceil_div(p.out, s.out_split_size), 1);
  g.splits = s.context_splits * s.out_splits;
  return g;
}

const char* algorithm_name(DType dtype) {
  if (dtype == DType::tf32) return "mma-tf32";
  return has_matrix_instructions(dtype) ? "mma" : "fma";
}

// The dimensions of a tensor map are nested, with the outputs outside. CUDA's documentation wants each stride to be a
// multiple of the one before: until a GPU has taken others, they are not tried.
bool repacks_for_sm90(const WeightLayout& layout) { return !(layout.k_major && layout.nested); }

bool prefers_sm90(const ProblemSize& p, DType dtype, const WeightLayout* layout, const DeviceProperties& device) {
  if (device.arch != 90 || storage_bytes(dtype) != 2 || !layout || p.context == 0) return false;
  // *Estimate*: a copy of W moves 4 bytes an element, in which time the engine does the products of 360 rows (4.3 TB/s,
  // 770 TFLOP/s). The mma engine reads W where it lies, but takes half as long again for the products.
  constexpr int64_t kMinRowsForCopy = 720;
  const int64_t rows = layout->shared ? p.groups * p.rows : p.rows;  // of one copy
  if (repacks_for_sm90(*layout) && rows < kMinRowsForCopy && !plan_forward(p, layout, dtype, device).repacked)
    return false;
  // *Estimate*: its tiles of 128 rows by at least 64 outputs and steps of 64 inputs pay off if half of the rows and
  // outputs and three quarters of the inputs are not padding.
  return p.rows >= 64 && p.out >= 32 && p.width >= 48 * ceil_div(p.width, 64);
}

bool can_vectorize(const void* data, DType dtype, int64_t inner_stride, int64_t inner_size, int64_t outer_stride,
                   int64_t group_stride, int64_t context_stride) {
  const int64_t elements = 16 / storage_bytes(dtype);
  return inner_stride == 1 && inner_size % elements == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         outer_stride % elements == 0 && group_stride % elements == 0 && context_stride % elements == 0;
}

}  // namespace mi_kernels::cuda
