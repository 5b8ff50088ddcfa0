// What the host and the kernels of modulation share: calls, and how they are cut into blocks.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../axes.h"
#include "../dtypes.h"
#include "machine.h"

namespace mi_kernels::cuda {

inline constexpr int kModulateThreads = 256;

// y = (act(scale) + offset) * x + shift; the axes are in the order of y in memory, the inner one last.
struct ModulateCall {
  int64_t axes;
  Axis outer[kMaxAxes], inner;
  const void *x, *scale, *shift;  // shift may be null
  void* y;                        // contiguous along the inner axis
  Activation activation;
  double offset;
  int64_t rows;    // places on the outer axes
  int64_t chunks;  // sixteen bytes of y each, along the inner axis
  int64_t blocks;
  bool whole[kOperands];  // of which operands a chunk is read or written at once
};

// dx = (act(scale) + offset) g; sums over the reduced axes of x g, times act'(scale), and of g.
struct ModulateGradsCall {
  int64_t kept_axes, reduced_axes;
  Axis kept[kMaxAxes], reduced[kMaxAxes], inner;
  bool inner_kept;
  const void *grad, *x, *scale;  // scale may be null where neither dx nor dscale is wanted
  void *dx, *dscale, *dshift;    // null where not wanted; the sums have the strides of kShift, and kY is dx
  Activation activation;
  double offset;
  bool whole[kOperands];
};

// A unit is what one sum is taken for: a chunk of the inner axis where it is kept, at one place of the kept axes.
// A block has `keeps` units and `threads / keeps` threads for each, which walk the places of one split in turn.
struct ModulateGradsPlan {
  int64_t chunks;         // along the inner axis
  int64_t units, places;  // places that a unit is summed over
  int64_t keeps;
  int64_t splits, step;  // parts of the places, whose sums are added in their order; places of a part
  int64_t blocks;        // of units; there are `splits` times as many
  int64_t partial_bytes;
};

ModulateGradsPlan plan_modulate_grads(const ModulateGradsCall&, DType, const Machine&);

}  // namespace mi_kernels::cuda
