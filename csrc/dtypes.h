// The dtypes that compiled kernels take, in one place.
#pragma once

#include <cstdint>

namespace mi_kernels {

enum class DType : int { f64, f32, bf16, f16 };

constexpr int64_t storage_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
// Sums of 16-bit products are carried in float.
constexpr int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

}  // namespace mi_kernels
