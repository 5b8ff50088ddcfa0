// How a call of the mma engine is cut into blocks: a pure function of sizes, dtype and machine.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/problem_size.h"
#include "cuda/host/device_properties.h"
#include "cuda/sm80/layout.h"

namespace mi_kernels::cuda {

struct TileSize {
  int64_t rows, cols, depth;
};
// Tiles of products, and of input gradients, which keep a second tile of sums.
TileSize product_tile(DType);
TileSize input_grads_tile(DType);

// A grid of tiles in one dimension: rows fastest (blocks that run together share the weights), then columns, splits of
// the sum, groups.
struct Grid {
  int64_t row_tiles, col_tiles, splits, step;  // step: places of the sum in a split, a multiple of the tile's depth
  int64_t groups;
  int64_t blocks() const { return row_tiles * col_tiles * splits * groups; }
};

// Results [groups][rows][cols] summed over depth; where it is split, partial sums of each split are kept.
Grid plan_product(int64_t groups, int64_t rows, int64_t cols, int64_t depth, bool may_split, DType, const Machine&);
// A forward pass of a few rows has a kernel of its own (stream.cuh), with tiles of kStreamOutputs outputs. It is bound
// by memory, where tf32 is no faster than float32.
inline constexpr int kStreamOutputs = 4;
bool streams(const ProblemSize&, DType);
constexpr int stream_rows(int64_t element_bytes) { return element_bytes == 2 ? 2 : 4; }  // of a block
// The forward pass: tiles of outputs, whose sum is over W's products z x, or, by items, over Z sums of X; splits are of
// Z X places or of Z items.
struct ForwardPlan {
  Grid grid;
  bool streams, by_items;
};
ForwardPlan plan_forward(const ProblemSize&, bool weight, DType, const Machine&);
// T[rows][width] of each of `context` items, summed over them to dx and along itself to dz; splits are of the items.
Grid plan_input_grads(int64_t groups, int64_t rows, int64_t context, int64_t width, DType, const Machine&);
// The same of a few rows (stream_grads.cuh), whose splits are of the items and, within those, of the outputs. W is read
// by chunks or by elements.
struct GradsStream {
  int team;  // threads along the width, a power of 2
  int64_t item_splits, out_splits, out_step;
};
Grid plan_grads_stream(const ProblemSize&, bool chunks, DType, const Machine&, GradsStream&);

// The arithmetic of a dtype, as a plan names it.
const char* algorithm(DType);

// Whether a forward pass is one for the sm_90a engine; where its tensors are not aligned to 16 bytes, the mma engine
// takes it all the same.
bool prefers_sm90(const ProblemSize&, DType, bool weight, const Machine&);

// Whether an operand can be brought in chunks of sixteen bytes: contiguous along a line of whole chunks, every line,
// group and item of which begins on a multiple of sixteen bytes. The only place that decides it.
bool whole_chunks(const void* data, DType, int64_t along, int64_t length, int64_t line, int64_t group, int64_t item);

}  // namespace mi_kernels::cuda
