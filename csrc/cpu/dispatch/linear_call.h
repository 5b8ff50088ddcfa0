// What the CPU kernels make of tensors beyond strided operands.
#pragma once

#include <array>
#include <vector>

#include "common/tensor_args.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {

// A term of a product without W, absent where it has no matrix or nothing to sum.
inline LinearTerm term(const TensorRef& rows, const TensorRef& matrix, int64_t depth) {
  return matrix.data && depth > 0 ? LinearTerm{rows, matrix, depth} : LinearTerm{};
}

// A tensor that is the same for all groups stays so: one group is converted.
inline Tensor in_double(const Tensor& t) {
  using torch::headeronly::ScalarType;
  if (t.dim() == 0 || t.size(0) < 2 || t.stride(0) != 0) return torch::stable::to(t, ScalarType::Double);
  const Tensor one = torch::stable::to(torch::stable::narrow(const_cast<Tensor&>(t), 0, 0, 1), ScalarType::Double);
  std::vector<int64_t> sizes(size_t(t.dim()), -1);
  sizes[0] = t.size(0);
  using torch::stable::detail::from;
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes);
  std::array<StableIValue, 3> stack{from(one), from(shape), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
inline Optional in_double(const Optional& t) { return t.has_value() ? Optional(in_double(*t)) : t; }

}  // namespace mi_kernels
