#include "cuda/host/plan.h"

#include <algorithm>

#include "common/integers.h"

namespace mi_kernels::cuda {
namespace {

bool on_matrix_instructions(DType dtype) { return storage_bytes(dtype) == 2 || dtype == DType::tf32; }

// Terms of one chain: more of them in float32 would round more than PyTorch's blocked sums. What 16 bits round is more
// than any chain does, and float64 is held to less than it has.
int64_t longest_chain(DType dtype) { return dtype == DType::f32 ? 256 : int64_t(1) << 40; }

// What it takes to be worth a start of the pipeline and a partial sum.
constexpr int64_t kLeastStages = 8;

// Elements that partial sums may have in all.
constexpr int64_t kPartialElements = int64_t(1) << 22;

// Splits of an extent of `units` for `tiles` tiles of `elements` results: as many as fill the processors twice, each of
// at least `least` units.
int64_t splits_for(int64_t tiles, int64_t elements, int64_t units, int64_t least, const Machine& machine) {
  const int64_t wanted = 2 * machine.processors / std::max<int64_t>(tiles, 1);
  const int64_t most = std::min(units / least, kPartialElements / std::max<int64_t>(elements, 1));
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1));
}

}  // namespace

TileSize product_tile(DType dtype) {
  const int64_t depth = kStageBytes / storage_bytes(dtype), side = on_matrix_instructions(dtype) ? 128 : 64;
  return {side, side, depth};
}

TileSize input_grads_tile(DType dtype) {
  const int64_t depth = kStageBytes / storage_bytes(dtype);
  return {on_matrix_instructions(dtype) ? 128 : 64, 64, depth};
}

Grid plan_product(int64_t groups, int64_t rows, int64_t cols, int64_t depth, bool may_split, DType dtype,
                  const Machine& machine) {
  const TileSize tile = product_tile(dtype);
  Grid g{ceil_div(rows, tile.rows), ceil_div(cols, tile.cols), 1, 0, groups};
  const int64_t steps = ceil_div(depth, tile.depth);
  if (may_split)
    g.splits = splits_for(g.row_tiles * g.col_tiles * groups, groups * rows * cols, steps, kLeastStages, machine);
  const int64_t split_steps = std::max<int64_t>(ceil_div(steps, g.splits), 1);
  g.splits = std::max<int64_t>(ceil_div(steps, split_steps), 1);
  g.step = split_steps * tile.depth;
  return g;
}

// Up to two blocks along the rows, of which the second finds W in L2. *Estimate*: a GPU has 10 to 20 multiply-adds in
// the time in which its memory delivers 2 bytes, and an element of W costs one for each row, one for its conversion and
// half of one for the products.
bool streams(const ProblemSize& p, DType dtype) {
  return dtype != DType::tf32 && p.rows <= 2 * stream_rows(storage_bytes(dtype));
}

namespace {

Grid plan_stream(const ProblemSize& p, int64_t depth, DType dtype, const Machine& machine) {
  Grid g{ceil_div(p.rows, stream_rows(storage_bytes(dtype))), ceil_div(p.out, kStreamOutputs), 1, 0, p.groups};
  const int64_t stride = kEngineThreads * 16 / storage_bytes(dtype), steps = ceil_div(depth, stride);
  // Two steps are what it takes to have the next chunk under way.
  g.splits = splits_for(g.row_tiles * g.col_tiles * p.groups, p.groups * p.rows * p.out, steps, 2, machine);
  const int64_t split_steps = std::max<int64_t>(ceil_div(steps, g.splits), 1);
  g.splits = std::max<int64_t>(ceil_div(steps, split_steps), 1);
  g.step = split_steps * stride;
  return g;
}

}  // namespace

ForwardPlan plan_forward(const ProblemSize& p, bool weight, DType dtype, const Machine& machine) {
  const int64_t depth = weight ? p.context * p.width : 0, stage = product_tile(dtype).depth;
  if (streams(p, dtype)) return {plan_stream(p, depth, dtype, machine), true, false};
  const int64_t steps = ceil_div(p.width, stage);
  // In float16 the products z x are made in tf32, at half the rate of matrix instructions. By items there are none, but
  // the sums over X are padded to whole stages: better as long as that adds less than it saves.
  const bool by_items = dtype == DType::f16 && (depth == 0 || 2 * p.width >= steps * stage);
  if (!by_items || depth == 0)
    return {plan_product(p.groups, p.rows, p.out, depth, true, dtype, machine), false, by_items};
  Grid g = plan_product(p.groups, p.rows, p.out, 0, false, dtype, machine);
  g.splits = splits_for(g.blocks(), p.groups * p.rows * p.out, p.context, ceil_div(kLeastStages, steps), machine);
  g.step = ceil_div(p.context, g.splits);
  g.splits = ceil_div(p.context, g.step);
  return {g, false, by_items};
}

Grid plan_input_grads(int64_t groups, int64_t rows, int64_t context, int64_t width, DType dtype,
                      const Machine& machine) {
  const TileSize tile = input_grads_tile(dtype);
  Grid g{ceil_div(rows, tile.rows), ceil_div(width, tile.cols), 1, 0, groups};
  g.splits = splits_for(g.row_tiles * g.col_tiles * groups, groups * rows * width, context, 1, machine);
  g.step = std::min(std::max<int64_t>(ceil_div(context, g.splits), 1), longest_chain(dtype));
  g.splits = std::max<int64_t>(ceil_div(context, g.step), 1);
  return g;
}

Grid plan_grads_stream(const ProblemSize& p, bool chunks, DType dtype, const Machine& machine, GradsStream& s) {
  const int64_t elements = chunks ? 16 / storage_bytes(dtype) : 1, across = ceil_div(p.width, elements);
  s.team = 1;
  while (s.team < kEngineThreads && s.team < across) s.team *= 2;
  Grid g{ceil_div(p.rows, stream_rows(storage_bytes(dtype))), ceil_div(across, s.team), 1, 0, p.groups};
  const int64_t tiles = g.row_tiles * g.col_tiles * p.groups, results = p.groups * p.rows * p.width;
  const int64_t teams = kEngineThreads / s.team, turns = ceil_div(p.context, teams);
  constexpr int64_t least = 32;  // outputs of a split
  s.out_splits = std::max<int64_t>(ceil_div(p.out, longest_chain(dtype)), 1);
  s.item_splits = splits_for(tiles * s.out_splits, results * s.out_splits, turns, 1, machine);
  g.step = std::min(std::max<int64_t>(ceil_div(turns, s.item_splits), 1), longest_chain(dtype)) * teams;
  s.item_splits = std::max<int64_t>(ceil_div(p.context, g.step), 1);
  s.out_splits =
      std::max(s.out_splits, splits_for(tiles * s.item_splits, results * s.item_splits, p.out, least, machine));
  s.out_step = std::max<int64_t>(ceil_div(p.out, s.out_splits), 1);
  s.out_splits = std::max<int64_t>(ceil_div(p.out, s.out_step), 1);
  g.splits = s.item_splits * s.out_splits;
  return g;
}

const char* algorithm(DType dtype) {
  if (dtype == DType::tf32) return "mma-tf32";
  return on_matrix_instructions(dtype) ? "mma" : "fma";
}

bool prefers_sm90(const ProblemSize& p, DType dtype, bool weight, const Machine& machine) {
  if (machine.arch != 90 || storage_bytes(dtype) != 2 || !weight || p.context == 0) return false;
  // Tiles of 128 rows and at least 64 outputs, steps of 64 inputs. *Estimates*: the engine is worth while where half of
  // the rows and outputs and three quarters of the inputs are there.
  return p.rows >= 64 && p.out >= 32 && p.width >= 48 * ceil_div(p.width, 64);
}

bool whole_chunks(const void* data, DType dtype, int64_t along, int64_t length, int64_t line, int64_t group,
                  int64_t item) {
  const int64_t elements = 16 / storage_bytes(dtype);
  return along == 1 && length % elements == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && line % elements == 0 &&
         group % elements == 0 && item % elements == 0;
}

}  // namespace mi_kernels::cuda
