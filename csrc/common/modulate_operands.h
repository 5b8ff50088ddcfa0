// The operands of a modulation, on axes that they have in common.
#pragma once

#include <cstdint>

#include "common/activation_kind.h"

namespace mi_kernels {

// Upper bound of the number of merged axes.
inline constexpr int kMaxAxes = 16;

// Indices into the strides of an axis.
enum ModulateOperand : int { kX, kScale, kShift, kY, kGrad, kOperands };

struct Axis {
  int64_t size;
  int64_t stride[kOperands];
};

// y = (act(scale) + offset) * x + shift; the axes are in the memory order of y, the inner one last.
struct ModulateOperands {
  int64_t axes, rows;  // outer axes, and positions on them
  Axis outer[kMaxAxes], inner;
  const void *x, *scale, *shift;  // shift may be null
  void* y;                        // contiguous along the inner axis
  Activation activation;
  double offset;
};

// dx = (act(scale) + offset) g, dscale = act'(scale) times the sum of x g, dshift = the sum of g. Sums are over the
// reduced axes, which scale (or shift) lacks; the others are kept. The inner axis may be of either kind.
struct ModulateGradsOperands {
  int64_t kept_axes, reduced_axes;
  Axis kept[kMaxAxes], reduced[kMaxAxes], inner;
  bool inner_kept;
  const void *grad, *x, *scale;  // scale may be null if neither dx nor dscale is wanted
  void *dx, *dscale, *dshift;    // null if not wanted; dscale and dshift have the strides of kShift, dx those of kY
  Activation activation;
  double offset;
};

}  // namespace mi_kernels
