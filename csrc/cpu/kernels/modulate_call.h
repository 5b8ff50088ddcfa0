// What the modulation kernels are called with.
#pragma once

#include <cstdint>

#include "common/modulate_operands.h"

namespace mi_kernels {

// Elements of a chunk of the inner axis, and of one task.
inline constexpr int64_t kModulateChunk = 1024;
inline constexpr int64_t kModulateTask = 1 << 16;
// Elements up to which runs are computed many at a time: whatever is done once a run would cost as much as the run.
inline constexpr int64_t kShortRun = 256;

// chunks: of the inner axis; 0 where all operands are one contiguous run, which is divided into tasks as it is.
struct ModulateCall : ModulateOperands {
  int64_t chunks, row_step, tasks;
};

using ModulateGradsCall = ModulateGradsOperands;

// A unit has one set of sums: it is one position on the kept axes, and one chunk of the inner axis if that is kept, or
// a piece of the last kept axis.
struct ModulateGradsPlan {
  int64_t chunks, rows;              // chunks of the inner axis, if it is kept; positions that a unit is summed over
  int64_t units, unit_step, splits;  // splits: parts of the rows of a unit, whose partial sums are added in order
  int64_t row_step, tasks, operations, worker_bytes, partial_bytes;
  int64_t runs;     // of a unit, if these are short ones; a unit is then a piece of the last kept axis. 0 otherwise
  int64_t repeats;  // short runs with the same scales that are computed as one
};

}  // namespace mi_kernels
