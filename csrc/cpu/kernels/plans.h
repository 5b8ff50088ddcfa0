// Plans as the kernels read them; dispatch/plan.h computes them.
#pragma once

#include <cstdint>

#include "cpu/engine/min_max.h"

namespace mi_kernels {

// How an instruction set multiplies a dtype, as far as a plan depends on it.
struct MulTraits {
  int64_t lanes;       // accumulators in a vector
  int64_t pair;        // elements along K in a packed word
  int64_t word_bytes;  // bytes of a packed word
  int64_t acc_bytes;   // bytes of an accumulator
};

// Every piece of scratch memory is aligned to, and padded to a multiple of, this many bytes.
inline constexpr int64_t kScratchAlign = 64;
MI_HOST_DEVICE constexpr int64_t scratch_bytes(int64_t bytes) { return round_up(bytes, kScratchAlign); }

// The contiguous axis of a matrix, or of W: K (of W the width), the outputs, or neither.
enum class Major : int { k, n, neither };

// How W lies in memory. The width is the faster of its two feature axes: where it is not, x and z change places.
struct WeightLayout {
  Major major = Major::k;
  bool flat = true;             // context and width are one evenly spaced axis
  bool outputs_slowest = true;  // outputs are further apart than features of the context
  bool exchanged = false;       // x and z have changed places
};

// How the sum over (i, j) is computed. The inner axis is the K of the matrix product; the epilogue multiplies by the
// other input and sums over the outer axis. `stream` is for a few rows: products z_i x_j are generated for one chunk of
// (i, j) at a time, and W is read once, in memory order.
enum class Order : int { width_inside, context_inside, stream };

// The largest number of rows that `stream` handles, and the elements along (i, j) of one chunk.
inline constexpr int64_t kStreamRows = 6;
inline constexpr int64_t kStreamDepth = 2048;

// The same for W with contiguous outputs, whose chunk of kTileVectors is read again for each tile of rows.
inline constexpr int64_t kStreamDepthOutputs = 512;

// Outer features in one summation block where the epilogue adds a feature at a time.
inline constexpr int64_t kOuterBlock = 32;

struct ForwardPlan {
  Order order;
  WeightLayout layout;
  bool outputs_first;                // rows of A are (o, outer), otherwise (outer, o)
  bool output_lanes;                 // outputs are in the lanes, and rows of the batch those of A
  int64_t row_step, row_blocks;      // rows of one task if so
  int64_t group_step;                // groups of one task of the stream
  int64_t vectors, lane_blocks;      // vectors in a block of lanes, and such blocks along the batch
  int64_t out_step, out_blocks;      // outputs of one task
  int64_t outer_step, outer_splits;  // outer features (pairs (i, j) for a stream with the outputs in the lanes) of one
                                     // task; more than one split makes partial sums
  int64_t depth;                     // elements along K that are packed at a time
  int64_t tasks, operations, worker_bytes, partial_bytes;
};

// How dx and dz are computed: from one product with both reductions in its epilogue (fused), from one product each
// (split), or, for a few rows, both from one chunk of T(i, j) = sum_o g[o] W[o, i, j] at a time, W being read once
// (stream).
enum class InputForm : int { fused, split, stream };

// The largest number of rows that the stream handles where W fits in the cache, and where it has more than
// kUncachedBytes; outputs, and rows i of T, in one summation block.
inline constexpr int64_t kInputStreamRows = 8, kInputStreamRowsUncached = 16;
inline constexpr int64_t kUncachedBytes = 4 << 20;
inline constexpr int64_t kStreamOutputs = 32;
inline constexpr int64_t kStreamContext = 64;

struct InputGradsPlan {
  InputForm form;
  WeightLayout layout;
  int64_t group_step;  // groups of one task of the stream
  int64_t vectors, lane_blocks;
  int64_t context_step, width_step;    // features of one task: both for fused, context_step for stream
  int64_t out_step;                    // outputs of one task, for split and stream
  int64_t splits, x_splits, z_splits;  // tasks of a block of lanes, and partial sums of each gradient
  int64_t depth;
  int64_t tasks, operations, worker_bytes, partial_bytes;
};

// Rows of a task with outputs in the lanes are a multiple of this one, of which every tile's rows are a divisor.
inline constexpr int64_t kOutputLaneRows = 8;

// One weight gradient: rows (output, feature) x lanes of the result, summed over the batch.
struct RegionPlan {
  bool wide;                                       // accumulated as sum_traits says: float in double
  int64_t outputs, extent;                         // outputs and features of all rows
  int64_t out_step, feature_step, feature_blocks;  // those of one task
  int64_t row_step, row_blocks, vectors, lane_blocks, batch_step, batch_splits, depth;
  int64_t tasks, operations, worker_bytes, partial_bytes;
};

// The largest number of rows whose weight gradients are written straight to their memory, as outer products.
inline constexpr int64_t kOuterRows = 4;

struct WeightGradsPlan {
  bool context_lanes;  // dW has z in the lanes and rows g x, rather than x in the lanes and rows g z
  bool outer;          // few rows: the tasks of a region are ranges of row_step rows of its result, over all groups
  RegionPlan weight, weight_z, weight_x, bias;
  int64_t worker_bytes, partial_bytes;
};

// For a product without W that streams its matrix: the largest number of rows, the largest number of their elements
// (they are copied), and the vectors of accumulators of a tile.
inline constexpr int64_t kLinearStreamRows = 8;
inline constexpr int64_t kLinearStreamElements = 1 << 18;
inline constexpr int64_t kLinearStreamVectors = 64;

// A product without W: rows of the batch x lanes of outputs, or, for a few rows, ranges of outputs.
struct LinearPlan {
  bool stream, n_major;  // n_major: the stream's lanes are outputs, not elements along K
  int64_t group_step;    // groups of one task of the stream
  int64_t row_step, row_blocks, vectors, lane_blocks;
  int64_t depth;  // elements along K that are packed at a time
  bool buffered;  // sums are accumulated in panels until they are complete
  int64_t tasks, operations, worker_bytes;
};

}  // namespace mi_kernels
