// The dtypes that compiled kernels take, in one place.
#pragma once

#include <cstdint>

namespace mi_kernels {

// tf32: float32 whose products may be rounded to tf32; a choice of the CUDA kernels, no dtype of a tensor.
enum class DType : int { f64, f32, bf16, f16, tf32 };

constexpr int64_t storage_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 || dtype == DType::tf32 ? 4 : 2;
}
// Sums of 16-bit products are carried in float.
constexpr int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

}  // namespace mi_kernels
