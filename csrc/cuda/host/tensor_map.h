// Tensor maps, the descriptors of tensors for TMA.
#pragma once

#include <cuda.h>

#include "cuda/sm90/layout.h"

namespace mi_kernels::cuda::sm90 {

// Boxes of 64 elements by `rows` rows (dimension 2) with the 128-byte swizzle, of a tma_compatible tensor. Elements out
// of bounds read as 0 and are not written. The calling thread needs a current context, or it gets error 201.
CUtensorMap tensor_map(const TensorView& view, bool bfloat16, int rows);

}  // namespace mi_kernels::cuda::sm90
