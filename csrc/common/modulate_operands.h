// The axes of a modulation, walked by all its operands together.
#pragma once

#include <cstdint>

#include "common/activation_kind.h"

namespace mi_kernels {

// Axes that are left when those which follow each other in memory have become one.
inline constexpr int kMaxAxes = 16;

// The operands of a call, all walked together.
enum ModulateOperand : int { kX, kScale, kShift, kY, kGrad, kOperands };

struct Axis {
  int64_t size;
  int64_t stride[kOperands];
};

// y = (act(scale) + offset) * x + shift; the axes are in the order of y in memory, the inner one last.
struct ModulateOperands {
  int64_t axes, rows;  // outer axes, and places on them
  Axis outer[kMaxAxes], inner;
  const void *x, *scale, *shift;  // shift may be null
  void* y;                        // contiguous along the inner axis
  Activation activation;
  double offset;
};

// dx = (act(scale) + offset) g; sums over the reduced axes of x g, times act'(scale), and of g. Axes are those that
// scale (or shift) has, kept, and those it has not, reduced; the inner one is of either kind.
struct ModulateGradsOperands {
  int64_t kept_axes, reduced_axes;
  Axis kept[kMaxAxes], reduced[kMaxAxes], inner;
  bool inner_kept;
  const void *grad, *x, *scale;  // scale may be null where neither dx nor dscale is wanted
  void *dx, *dscale, *dshift;    // null where not wanted; the sums have the strides of kShift, and kY is dx
  Activation activation;
  double offset;
};

}  // namespace mi_kernels
