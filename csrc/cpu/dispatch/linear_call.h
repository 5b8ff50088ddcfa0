// Terms of a product without W.
#pragma once

#include "cpu/kernels/calls.h"

namespace mi_kernels {

// Absent where there is no matrix or nothing to sum.
inline LinearTerm linear_term(const TensorRef& rows, const TensorRef& matrix, int64_t depth) {
  return matrix.data && depth > 0 ? LinearTerm{rows, matrix, depth} : LinearTerm{};
}

}  // namespace mi_kernels
