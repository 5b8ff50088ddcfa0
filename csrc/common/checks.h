// What must hold before a kernel may access memory. The public functions have their own checks, with messages for
// users; these guard direct calls of the registered operations.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/dtypes.h"
#include "common/problem_size.h"

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

// None arrives as an undefined tensor.
inline void check_defined(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.defined(), op, ": ", name, ": expected a tensor, got None");
}

// Checks the sizes after an optional leading dimension of groups, and that dtype and device are those of `like`.
inline void check_sizes(const char* op, const char* name, const Tensor& tensor, const Tensor& like, int64_t groups,
                        bool grouped, std::initializer_list<int64_t> sizes) {
  check_defined(op, name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name,
                  ": expected the dtype of the first tensor");
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

// Upper bound of a product of sizes. Operations and bytes of a call, padded to whole vectors and tiles, then fit an
// int64_t.
inline constexpr int64_t kMaxProduct = int64_t(1) << 53;

inline bool in_range(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product) || product > kMaxProduct) return false;
  return true;
}

// `weight`: whether the call has W, and so a product over both the context and the width.
inline void check_products(const char* op, const char* name, const ProblemSize& p, bool weight) {
  const bool fits =
      weight ? in_range({p.groups, p.rows, p.context, p.width, p.out})
             : in_range({p.groups, p.rows, p.context, p.out}) && in_range({p.groups, p.rows, p.width, p.out});
  STD_TORCH_CHECK(fits, op, ": ", name, ": expected sizes whose product is at most 2^53, got G=", p.groups,
                  ", B=", p.rows, ", Z=", p.context, ", X=", p.width, ", O=", p.out);
}

// Checks the arguments of a plan query: sizes of `count` axes, and a bit mask of `bits` terms, whose first is W.
inline void check_plan_query(const char* op, const std::vector<int64_t>& sizes, size_t count, const char* axes,
                             int64_t terms, int bits) {
  STD_TORCH_CHECK(sizes.size() == count, op, ": sizes: expected ", axes, ", got ", sizes.size(), " sizes");
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(size >= 0, op, ": sizes: expected ", axes, " of 0 or more, got ", size);
  STD_TORCH_CHECK(terms >= 0 && terms < int64_t(1) << bits, op, ": terms: expected 0 to ", (int64_t(1) << bits) - 1,
                  ", got ", terms);
}
inline ProblemSize interaction_problem_size(const char* op, const std::vector<int64_t>& sizes, int64_t terms,
                                            int bits) {
  check_plan_query(op, sizes, 5, "[G, B, Z, X, O]", terms, bits);
  const ProblemSize p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  check_products(op, "sizes", p, terms & 1);
  return p;
}
inline ProblemSize gate_problem_size(const char* op, const std::vector<int64_t>& sizes, int64_t terms, int bits = 5) {
  check_plan_query(op, sizes, 3, "[B, Z, X]", terms, bits);
  const ProblemSize p{1, sizes[0], sizes[1], sizes[2], sizes[2]};
  check_products(op, "sizes", p, terms & 1);
  return p;
}

// Whether the results of a primitive have any elements; if not, it returns without a plan. `terms` are those of a plan
// query.
inline bool has_result(const ProblemSize& p, const std::string& primitive, int64_t terms) {
  if (primitive == "forward") return p.groups > 0 && p.rows > 0 && p.out > 0;
  if (primitive == "input_grads")
    return p.groups > 0 && p.rows > 0 && ((terms & 16 && p.width > 0) || (terms & 32 && p.context > 0));
  return true;
}

}  // namespace mi_kernels
