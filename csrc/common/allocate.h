// Memory for results and scratch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <vector>

namespace mi_kernels {

using torch::stable::Tensor;

// torch::stable::new_empty without its search for the operation by name, which takes longer than many a small kernel.
inline Tensor allocate(const Tensor& like, const int64_t* sizes, int64_t dimensions, int32_t* type = nullptr) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), sizes, dimensions, type, nullptr, nullptr, 0, nullptr, &result));
  return Tensor(result);
}
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes.begin(), int64_t(sizes.size()));
}
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes) {
  return allocate(like, sizes.data(), int64_t(sizes.size()));
}
// In the memory format of `like`.
inline Tensor allocate_like(const Tensor& like) {
  int64_t expected = 1;
  for (int64_t d = like.dim() - 1; d >= 0; expected *= like.size(d--))
    if (like.stride(d) != expected) return torch::stable::empty_like(like);
  return allocate(like, like.sizes().data(), like.dim());
}
inline Tensor allocate_bytes(const Tensor& like, int64_t bytes) {
  int32_t type = aoti_torch_dtype_uint8();
  return allocate(like, &bytes, 1, &type);
}

}  // namespace mi_kernels
