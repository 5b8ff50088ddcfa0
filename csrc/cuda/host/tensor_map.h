// Tensor maps: what the copy engine has to know of a tensor.
#pragma once

#include <cuda.h>

#include "cuda/sm90/layout.h"

namespace mi_kernels::cuda::sm90 {

// Boxes of 64 elements and `rows` rows (dimension 2) of a tensor for which loadable() holds, 128-byte swizzle. What
// lies outside of the tensor reads as 0 and is not written. The calling thread needs a current context (else error
// 201).
CUtensorMap tensor_map(const View& view, bool bfloat16, int rows);

}  // namespace mi_kernels::cuda::sm90
