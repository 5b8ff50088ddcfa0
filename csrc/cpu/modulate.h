// What the dispatcher (modulate.cpp) and the kernels of one instruction set (modulate*_isa.cpp) share.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../axes.h"
#include "../dtypes.h"

namespace mi_kernels {

struct Execution;

// Elements of an inner run that are handled at a time, and of one task.
inline constexpr int64_t kModulateChunk = 1024;
inline constexpr int64_t kModulateTask = 1 << 16;

// y = (act(scale) + offset) * x + shift over outer axes and an inner one.
struct ModulateCall {
  int64_t axes;
  Axis outer[kMaxAxes], inner;
  const void *x, *scale, *shift;  // shift may be null
  void* y;                        // contiguous along the inner axis
  Activation activation;
  double offset;
  int64_t rows, chunks, row_step, tasks;
};

// dx = (act(scale) + offset) g; sums over the reduced axes of x g, times act'(scale), and of g. Axes are those that
// scale (or shift) has, kept, and those it has not, reduced; the inner one is of either kind.
struct ModulateGradsCall {
  int64_t kept_axes, reduced_axes;
  Axis kept[kMaxAxes], reduced[kMaxAxes], inner;
  bool inner_kept;
  const void *grad, *x, *scale;
  void *dx, *dscale, *dshift;  // null where not wanted; the sums have the strides of kShift, and kY is dx
  Activation activation;
  double offset;
};

// A unit is what one sum is taken for: a chunk of the inner axis, where it is kept, at one place of the kept axes.
struct ModulateGradsPlan {
  int64_t groups, chunks, rows;      // kept places, chunks of the inner axis, reduced places
  int64_t units, unit_step, splits;  // splits: parts of the rows of a unit, whose sums are added in their order
  int64_t row_step, tasks, operations, worker_bytes, partial_bytes;
};

}  // namespace mi_kernels
