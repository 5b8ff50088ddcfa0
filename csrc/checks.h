// What a kernel must be sure of before it touches memory. The public functions have checked every
// argument and say so in the user's words; these checks guard direct calls of the registered operations.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "dtypes.h"

namespace mi_kernels {

using torch::stable::Tensor;

inline DType dtype_of(torch::headeronly::ScalarType type, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, op, ": ", name, ": expected float64, float32, bfloat16 or float16");
  }
}

// The sizes are those expected after an optional leading dimension of groups, dtype and device those of `like`.
inline void check_sizes(const char* op, const char* name, const Tensor& tensor, const Tensor& like, int64_t groups,
                        bool grouped, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, ": expected the dtype of the first tensor");
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.is_cuda() == like.is_cuda() &&
                      tensor.get_device_index() == like.get_device_index(),
                  op, ": ", name, ": expected the device of the first tensor");
  const int64_t lead = grouped ? 1 : 0;
  STD_TORCH_CHECK(tensor.dim() == lead + int64_t(sizes.size()), op, ": ", name, ": expected ",
                  lead + int64_t(sizes.size()), " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(!grouped || tensor.size(0) == groups, op, ": ", name, ": expected ", groups, " groups, got ",
                  tensor.size(0));
  int64_t axis = lead;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(axis) == size, op, ": ", name, ": expected size ", size, " in dimension ", axis,
                    ", got ", tensor.size(axis));
    ++axis;
  }
}

}  // namespace mi_kernels
