// The elementwise gradients of two products that are multiplied: dp = g f'(p) h(q) and dq = g f(p) h'(q).
#pragma once

#include <cstdint>

#include "common/activation_kind.h"
#include "common/dtypes.h"
#include "cuda/modulate/modulate.h"

namespace mi_kernels::cuda {

// A matrix, read a chunk at a time if it is vectorized.
struct ElementwiseOperand {
  const void* data;
  int64_t row, col;  // strides
  bool vectorized;
};

struct DualLinearGradsParams {
  ElementwiseOperand grad, p, q;  // [rows][out], [rows][features] twice
  void* d;                        // [rows][2][features]: dp and dq
  bool stores_chunks;
  int64_t rows, features, out;
  int64_t chunks, blocks;  // chunks of 16 bytes along the features; their blocks of kModulateThreads
  Activation activation[2];
};

void launch_dual_linear_grads(const DeviceStream&, DType, const DualLinearGradsParams&);

}  // namespace mi_kernels::cuda
