// A finite result may have intermediate products that overflow: z x may leave the range of float where z W x does not,
// and Inf times 0 is NaN. Such calls are recognised by their results, or by the magnitude of their inputs, and repeated
// in double.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "common/dtypes.h"
#include "common/tensor_args.h"

namespace mi_kernels {

// Whether a product of three elements of this dtype can overflow its accumulation type.
inline bool may_overflow(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16; }

// Whether a contiguous tensor of such a dtype has neither Inf nor NaN.
bool all_finite(const Tensor& t);

// Whether sums of `terms` products of one element from each operand stay finite in any order of multiplication.
bool products_fit(std::initializer_list<Tensor> operands, int64_t terms);

// The tensor in double. One that is the same for all groups stays so: a single group is converted.
Tensor in_double(const Tensor& t);
inline Optional in_double(const Optional& t) { return t.has_value() ? Optional(in_double(*t)) : t; }

// Replaces elements of `result` that are not finite with those of `exact`, which is in double. Both are contiguous.
void replace_not_finite(Tensor& result, const Tensor& exact);

}  // namespace mi_kernels
