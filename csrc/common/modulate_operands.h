// The operands of a modulation, on axes that they have in common.
#pragma once

#include <cstdint>

#include "common/activation_kind.h"

namespace mi_kernels {

// Upper bound of the number of merged axes.
inline constexpr int kMaxAxes = 16;

// Indices into the strides of an axis.
enum ModulateOperand : int { kX, kScale, kShift, kY, kGrad, kOther, kOperands };

struct Axis {
  int64_t size;
  int64_t stride[kOperands];
};

// F(scale) = factor * act(scale) + offset, what x is multiplied by.
struct ScaleFunction {
  Activation activation;
  double offset = 0, factor = 1;
};

// y = F(scale) * x + shift, or y = F(scale) * (x - shift) + shift, which mixes the two; the axes are in the memory
// order of y, the inner one last.
struct ModulateOperands {
  int64_t axes, rows;  // outer axes, and positions on them
  Axis outer[kMaxAxes], inner;
  const void *x, *scale, *shift;  // shift may be null
  void* y;                        // contiguous along the inner axis
  ScaleFunction function;
  bool mixes;
};

// dx = F(scale) g, dscale = F'(scale) times the sum of x g, dshift = the sum of g. Sums are over the reduced axes,
// which scale (or shift) lacks; the others are kept. The inner axis may be of either kind. Of a mixture of x and
// `other` (a shift of the size of x), dscale has the sum of (x - other) g, and dshift = g - F(scale) g is no sum.
struct ModulateGradsOperands {
  int64_t kept_axes, reduced_axes;
  Axis kept[kMaxAxes], reduced[kMaxAxes], inner;
  bool inner_kept;
  const void *grad, *x, *scale;  // scale may be null if neither dx nor dscale is wanted
  const void* other;             // null if nothing is mixed
  // Null if not wanted. Sums have the strides of kShift, results of the size of x those of kY.
  void *dx, *dscale, *dshift;
  ScaleFunction function;
};

}  // namespace mi_kernels
