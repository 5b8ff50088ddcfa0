// What the dispatcher (modulate.cpp) and the kernels of one instruction set (modulate*_isa.cpp) share.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/modulate_operands.h"

namespace mi_kernels {

struct Execution;

// Elements of an inner run that are handled at a time, and of one task.
inline constexpr int64_t kModulateChunk = 1024;
inline constexpr int64_t kModulateTask = 1 << 16;

struct ModulateCall : ModulateOperands {
  int64_t chunks, row_step, tasks;
};

using ModulateGradsCall = ModulateGradsOperands;

// A unit is what one sum is taken for: a chunk of the inner axis, where it is kept, at one place of the kept axes.
struct ModulateGradsPlan {
  int64_t groups, chunks, rows;      // kept places, chunks of the inner axis, reduced places
  int64_t units, unit_step, splits;  // splits: parts of the rows of a unit, whose sums are added in their order
  int64_t row_step, tasks, operations, worker_bytes, partial_bytes;
};

}  // namespace mi_kernels
