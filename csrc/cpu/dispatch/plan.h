// How a call is cut into tasks: a pure function of the sizes, the dtype and the instruction set, never of
// the number of threads, so that every number of threads gives the same bits.
#pragma once

#include <cstdint>

#include "common/problem_size.h"
#include "cpu/engine/integers.h"

namespace mi_kernels {

// What the planner has to know of the kernels of an instruction set for a dtype.
struct Machine {
  int64_t lanes;       // accumulators in a vector
  int64_t pair;        // elements along K in a word
  int64_t word_bytes;  // bytes of a packed word
  int64_t acc_bytes;   // bytes of an accumulator
};

namespace plan {

// Tasks wanted for a call that is worth sharing: enough to keep many cores busy and to even out noise.
inline constexpr int64_t kTasks = 32;
// The same where more tasks mean partial sums to be added up afterwards.
inline constexpr int64_t kPartialTasks = 8;
// Operations (multiplications and additions) below which another task costs more than it saves.
inline constexpr int64_t kTaskOperations = 1 << 19;
// Cache that the planes of one block of lanes may fill: about half of a common L2.
inline constexpr int64_t kBlockBytes = 512 << 10;
inline constexpr int64_t kMaxBlockVectors = 12;
// Memory that the planes of one block of lanes may take where the cache needs to hold only a part of them.
inline constexpr int64_t kScratchBytes = 8 << 20;
// Words along K packed at a time; with kRowBlock rows of them a packed row block is 128 KiB.
inline constexpr int64_t kDepthWords = 256;
inline constexpr int64_t kPackedRows = 128;
// Rows and vectors of lanes of one task of a weight gradient: the more of them, the less is generated and packed twice.
inline constexpr int64_t kRegionRows = 2 * kPackedRows;
inline constexpr int64_t kMaxRegionVectors = 16;
// Partial sums over all splits stay below this.
inline constexpr int64_t kPartialBytes = 8 << 20;

// Vectors of lanes in a block whose planes take `plane_bytes` for each vector, evened out over the blocks. A few
// blocks are made an even number and more of them a multiple of four, for workers to share.
constexpr int64_t block_vectors(int64_t vectors, int64_t plane_bytes, int64_t limit = kMaxBlockVectors) {
  const int64_t most = max(min(kBlockBytes / max(plane_bytes, 1), limit), 1);
  const int64_t blocks = max(ceil_div(vectors, most), 1);
  return ceil_div(vectors, round_up(blocks, blocks > 4 ? 4 : blocks > 2 ? 2 : 1));
}

// How many parts to cut `extent` into for `aim` tasks, given the tasks there are without it.
constexpr int64_t splits(int64_t aim, int64_t tasks, int64_t operations, int64_t extent) {
  const int64_t wanted = min(aim / max(tasks, 1), operations / kTaskOperations / max(tasks, 1));
  return max(min(wanted, extent), 1);
}

}  // namespace plan

// How the sum over (i, j) is taken. The axis that is summed inside the product is the inner one; the
// epilogue multiplies by the other operand and sums over the outer one. `stream` is for a few rows: products
// z_i x_j are made for a stretch of W at a time and W is read once, in the order in which it lies.
enum class Order : int { width_inside, context_inside, stream };

// Rows that `stream` takes at most, and elements along (i, j) of one stretch.
inline constexpr int64_t kStreamRows = 6;
inline constexpr int64_t kStreamDepth = 2048;

struct ForwardPlan {
  Order order;
  int64_t vectors, lane_blocks;      // vectors of lanes in a block, and blocks of them along the batch
  int64_t out_step, out_blocks;      // outputs of one task
  int64_t outer_step, outer_splits;  // outer features of one task; partial sums where there are several
  int64_t depth;                     // elements along K packed at a time
  int64_t tasks, operations, worker_bytes, partial_bytes;
};

// How dx and dz come about: one product for both, a product for each, or, for a few rows, both from a stretch of
// T(i, j) = sum_o g[o] W[o, i, j] at a time, with W read once, in runs as long as the stretch.
enum class InputForm : int { together, separate, stream };

// Rows that the stream takes at most, for a W that lies in the cache and for one of more bytes than that, and outputs
// and rows i of T that it adds up one by one.
inline constexpr int64_t kInputStreamRows = 8, kInputStreamRowsUncached = 16;
inline constexpr int64_t kUncachedBytes = 4 << 20;
inline constexpr int64_t kStreamOutputs = 32;
inline constexpr int64_t kStreamContext = 64;

struct InputGradsPlan {
  InputForm form;
  int64_t vectors, lane_blocks;
  int64_t context_step, width_step;    // together: features of one task; stream: context_step alone
  int64_t out_step;                    // separate, stream: outputs of one task
  int64_t splits, x_splits, z_splits;  // tasks of a block of lanes, and partial sums of each gradient
  int64_t depth;
  int64_t tasks, operations, worker_bytes, partial_bytes;
};

// One weight gradient: rows (output, feature) x lanes of the result, summed over the batch.
struct RegionPlan {
  bool wide;                                       // summed as sums_machine says: in double for float
  int64_t outputs, extent;                         // all rows
  int64_t out_step, feature_step, feature_blocks;  // those of a task
  int64_t row_step, row_blocks, vectors, lane_blocks, batch_step, batch_splits, depth;
  int64_t tasks, operations, worker_bytes, partial_bytes;
};

struct WeightGradsPlan {
  bool context_lanes;  // dW with z in the lanes and g x generated, instead of x and g z
  RegionPlan weight, weight_z, weight_x, bias;
  int64_t worker_bytes, partial_bytes;
};

// Rows up to which a product without W streams its matrix, elements of them that are copied at most, and vectors of
// sums of a tile of it.
inline constexpr int64_t kLinearStreamRows = 8;
inline constexpr int64_t kLinearStreamElements = 1 << 18;
inline constexpr int64_t kLinearStreamVectors = 64;

// A product without W: regions of rows of the batch times lanes of outputs, or, for a few rows, stretches of outputs.
struct LinearPlan {
  bool stream, across;  // across: lanes run along the outputs
  int64_t group_step;   // groups of one task of the stream
  int64_t row_step, row_blocks, vectors, lane_blocks;
  int64_t depth;  // elements along K packed at a time
  bool kept;      // sums are kept in planes until they are whole
  int64_t tasks, operations, worker_bytes;
};

ForwardPlan plan_forward(const ProblemSize&, const Machine&, bool weight, bool weight_z, bool weight_x);
// The forward pass of a gated form; `whole_rows`: softmax needs all outputs of a row in one task.
ForwardPlan plan_gate(const ProblemSize&, const Machine&, bool weight, bool weight_z, bool weight_x, bool shift,
                      bool whole_rows);
// `depths`: lengths of the sums, of two terms and of a gate's shift; `gate`: whether there is one.
LinearPlan plan_linear(int64_t groups, int64_t rows, int64_t out, const int64_t (&depths)[3], bool gate,
                       const Machine&);
// Along which axis the matrices of a product without W are contiguous: all along the sum, all along the outputs, or
// none of both.
enum class Lie { along, across, neither };
// Whether a product without W streams its matrices.
bool linear_streams(int64_t rows, int64_t out, int64_t depth, Lie lie, const Machine&);
LinearPlan plan_linear_stream(int64_t groups, int64_t rows, int64_t out, const int64_t (&depths)[2], bool across,
                              const Machine&);
// Whether a product without W wants its outputs in the lanes, as plan_linear has them, rather than its rows. `along`:
// the matrix is contiguous along the sum, so that packing transposes it.
bool outputs_in_lanes(int64_t rows, int64_t out, int64_t depth, bool along, const Machine&);
InputGradsPlan plan_input_grads(const ProblemSize&, const Machine&, bool weight, bool want_x, bool want_z);
WeightGradsPlan plan_weight_grads(const ProblemSize&, const Machine&, const Machine& sums, const bool (&want)[4]);

}  // namespace mi_kernels
