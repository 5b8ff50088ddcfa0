// min and max of sizes. They are always inlined, so that no copy of one instruction set is linked into another.
#pragma once

#include "common/integers.h"

namespace mi_kernels {

MI_HOST_DEVICE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
MI_HOST_DEVICE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace mi_kernels
