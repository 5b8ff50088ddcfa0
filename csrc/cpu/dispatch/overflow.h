// Sums of products whose result is finite may pass through products that are not: z x leaves float where
// z W x does not, and times 0 it is NaN. Such calls are found afterwards, or by the size of their inputs, and
// repeated in double.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "common/dtypes.h"

namespace mi_kernels {

// Whether products of three elements of this dtype can leave the range in which they are made.
inline bool may_overflow(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16; }

// Whether no element of a contiguous tensor of such a dtype is Inf or NaN.
bool all_finite(const torch::stable::Tensor& t);

// Whether sums of `terms` products of one element from each of these operands stay finite on any way.
bool products_fit(std::initializer_list<torch::stable::Tensor> operands, int64_t terms);

// Puts `exact`, in double, where `result` is not finite. Both are contiguous.
void replace_not_finite(torch::stable::Tensor& result, const torch::stable::Tensor& exact);

}  // namespace mi_kernels
