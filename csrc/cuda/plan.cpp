#include "plan.h"

#include <algorithm>

namespace mi_kernels::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool on_matrix_instructions(DType dtype) { return storage_bytes(dtype) == 2 || dtype == DType::tf32; }

// What it takes to be worth a start of the pipeline and a partial sum.
constexpr int64_t kLeastStages = 8;

// Elements that partial sums may have in all.
constexpr int64_t kPartialElements = int64_t(1) << 24;

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

ForwardPlan plan_forward(const Problem& p, bool weight, DType dtype, const Machine& machine) {
  const int64_t depth = weight ? p.context * p.width : 0, stage = product_tile(dtype).depth;
  const int64_t steps = ceil_div(p.width, stage);
  // In float16 the products z x are made in tf32, at half the rate of matrix instructions. By items there are none, but the
  // sums over X are padded to whole stages: better as long as that adds less than it saves.
  const bool by_items = dtype == DType::f16 && (depth == 0 || 2 * p.width >= steps * stage);
  if (!by_items || depth == 0) return {plan_product(p.groups, p.rows, p.out, depth, true, dtype, machine), by_items};
  Grid g = plan_product(p.groups, p.rows, p.out, 0, false, dtype, machine);
  g.splits = splits_for(g.blocks(), p.groups * p.rows * p.out, p.context, ceil_div(kLeastStages, steps), machine);
  g.step = ceil_div(p.context, g.splits);
  g.splits = ceil_div(p.context, g.step);
  return {g, by_items};
}

Grid plan_input_grads(int64_t groups, int64_t rows, int64_t context, int64_t width, DType dtype, const Machine& machine) {
  const TileSize tile = input_grads_tile(dtype);
  Grid g{ceil_div(rows, tile.rows), ceil_div(width, tile.cols), 1, 0, groups};
  g.splits = splits_for(g.row_tiles * g.col_tiles * groups, groups * rows * width, context, 1, machine);
  g.step = std::max<int64_t>(ceil_div(context, g.splits), 1);
  g.splits = std::max<int64_t>(ceil_div(context, g.step), 1);
  return g;
}

const char* algorithm(DType dtype) {
  if (dtype == DType::tf32) return "mma-tf32";
  return on_matrix_instructions(dtype) ? "mma" : "fma";
}

bool prefers_sm90(const Problem& p, DType dtype, bool weight, const Machine& machine) {
  if (machine.arch != 90 || storage_bytes(dtype) != 2 || !weight || p.context == 0) return false;
  // Tiles of 128 rows and at least 64 outputs, steps of 64 inputs. *Estimates*: the engine is worth while where half of
  // the rows and outputs and three quarters of the inputs are there.
  return p.rows >= 64 && p.out >= 32 && p.width >= 48 * ceil_div(p.width, 64);
}

bool whole_chunks(const void* data, DType dtype, int64_t along, int64_t length, int64_t line, int64_t group, int64_t item) {
  const int64_t elements = 16 / storage_bytes(dtype);
  return along == 1 && length % elements == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && line % elements == 0 &&
         group % elements == 0 && item % elements == 0;
}

}  // namespace mi_kernels::cuda
