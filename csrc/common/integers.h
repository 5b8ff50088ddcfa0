// Integer arithmetic of sizes.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace mi_kernels {

MI_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MI_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace mi_kernels
