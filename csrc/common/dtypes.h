// The dtypes of compiled kernels.
#pragma once

#include <cstdint>

namespace mi_kernels {

// tf32 is not a dtype of tensors: float32 whose factors the CUDA kernels may round to tf32.
enum class DType : int { f64, f32, bf16, f16, tf32 };

constexpr int64_t storage_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 || dtype == DType::tf32 ? 4 : 2;
}
// Products of 16-bit elements are accumulated in float.
constexpr int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

}  // namespace mi_kernels
