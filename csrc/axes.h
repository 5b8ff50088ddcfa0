// The axes of a modulation, walked by all its operands together.
#pragma once

#include <cstdint>

namespace mi_kernels {

// Axes that are left when those which follow each other in memory have become one.
inline constexpr int kMaxAxes = 16;

// The operands of a call, all walked together.
enum ModulateOperand : int { kX, kScale, kShift, kY, kGrad, kOperands };

struct Axis {
  int64_t size;
  int64_t stride[kOperands];
};

}  // namespace mi_kernels
