// How a call is divided into tasks: a pure function of the sizes, the dtype and the instruction set, never of
// the number of threads, so that any number of threads gives the same bits.
#pragma once

#include <cstdint>

#include "common/problem_size.h"
#include "cpu/engine/blocking.h"
#include "cpu/engine/min_max.h"
#include "cpu/kernels/plans.h"

namespace mi_kernels {

// Tasks of a call that is worth sharing among threads: enough to keep many cores busy and to even out noise.
inline constexpr int64_t kTasks = 32;
// The same where more tasks mean partial sums to be added up afterwards.
inline constexpr int64_t kPartialTasks = 8;
// Operations (multiplications and additions) below which another task costs more than it saves.
inline constexpr int64_t kTaskOperations = 1 << 19;
// Cache that the panels of one block of lanes may fill: about half of a common L2.
inline constexpr int64_t kBlockBytes = 512 << 10;
inline constexpr int64_t kMaxBlockVectors = 12;
// Memory that the panels of one block of lanes may take where only a part of them has to stay in the cache.
inline constexpr int64_t kScratchBytes = 8 << 20;
// Rows and vectors of lanes of one task of a weight gradient: larger tasks generate and pack less twice.
inline constexpr int64_t kRegionRows = 2 * kBlockM;
inline constexpr int64_t kMaxRegionVectors = 16;
// Upper bound of the partial sums over all splits.
inline constexpr int64_t kPartialBytes = 8 << 20;

// Vectors of lanes in a block whose panels take `panel_bytes` for each vector, evened out over the blocks. More than
// two blocks are rounded up to an even number, more than four to a multiple of four, so that threads share them evenly.
constexpr int64_t block_vectors(int64_t vectors, int64_t panel_bytes, int64_t limit = kMaxBlockVectors) {
  const int64_t most = max(min(kBlockBytes / max(panel_bytes, 1), limit), 1);
  const int64_t blocks = max(ceil_div(vectors, most), 1);
  return ceil_div(vectors, round_up(blocks, blocks > 4 ? 4 : blocks > 2 ? 2 : 1));
}

// Into how many parts to split `extent` for `aim` tasks, given the tasks there are without it.
constexpr int64_t split_count(int64_t aim, int64_t tasks, int64_t operations, int64_t extent) {
  const int64_t wanted = min(aim / max(tasks, 1), operations / kTaskOperations / max(tasks, 1));
  return max(min(wanted, extent), 1);
}

// Whether W exceeds the cache. In double: without W the product of the sizes is not bounded.
bool uncached(const ProblemSize&, const MulTraits&);
// `gate`: the epilogue needs the batch in the lanes, unless W is streamed.
ForwardPlan plan_forward(const ProblemSize&, const MulTraits&, bool weight, bool weight_z, bool weight_x,
                         const WeightLayout&, bool gate = false);
// Whether the lanes should be outputs where W is not streamed, and the plan for that.
bool takes_output_lanes(const ProblemSize&, const MulTraits&, const WeightLayout&);
void plan_output_lanes(ForwardPlan&, const ProblemSize&, const MulTraits&);
void plan_stream_outputs(ForwardPlan&, const ProblemSize&, const MulTraits&, bool whole_sums);
// The forward pass of a gated form; `whole_rows`: softmax needs all outputs of a row in one task.
ForwardPlan plan_gate(const ProblemSize&, const MulTraits&, bool weight, bool weight_z, bool weight_x, bool shift,
                      bool whole_rows, const WeightLayout&);
// `depths`: lengths of the sums of two terms and of a gate's shift; `gate`: whether there is one.
LinearPlan plan_linear(int64_t groups, int64_t rows, int64_t out, const int64_t (&depths)[3], bool gate,
                       const MulTraits&);
// The same for a product of two linear forms with sums of these lengths.
LinearPlan plan_dual_linear(int64_t rows, int64_t out, int64_t ranks, const int64_t (&depths)[2], const MulTraits&);
// Whether a product without W streams its matrices; `major`: of all of them.
bool linear_streams(int64_t rows, int64_t out, int64_t depth, Major major, const MulTraits&);
LinearPlan plan_linear_stream(int64_t groups, int64_t rows, int64_t out, const int64_t (&depths)[2], bool n_major,
                              const MulTraits&);
// Whether a product without W should have its outputs in the lanes, as plan_linear does, rather than its rows.
// `k_major`: the matrix is contiguous along K, so that packing transposes it.
bool outputs_in_lanes(int64_t rows, int64_t out, int64_t depth, bool k_major, const MulTraits&);
// The same for short sums over a K-major matrix of each group, whatever the former says.
bool short_sums_in_output_lanes(int64_t groups, int64_t rows, int64_t out, int64_t depth, const MulTraits&);
InputGradsPlan plan_input_grads(const ProblemSize&, const MulTraits&, bool weight, bool want_x, bool want_z,
                                const WeightLayout&);
// Weight gradients of at most this many operations are summed as sum_traits says.
inline constexpr int64_t kWideOperations = 1 << 17;
// For a few rows: returns whether their weight gradients are outer products.
bool plan_outer(WeightGradsPlan&, const ProblemSize&, const MulTraits&, const MulTraits& sum_traits,
                const bool (&want)[4]);
// `one`: dV has one more column, for a feature of x that is 1.
WeightGradsPlan plan_weight_grads(const ProblemSize&, const MulTraits&, const MulTraits& sum_traits,
                                  const bool (&want)[4], bool one = false);

}  // namespace mi_kernels
