// A tensor as kernels take it.
#pragma once

#include <cstdint>

namespace mi_kernels {

// The address and the strides of up to three dimensions, groups x rows x columns; data is null where it is absent.
struct TensorRef {
  const void* data = nullptr;
  int64_t group = 0, row = 0, col = 0;
};

// W as kernels take it: the strides of groups x outputs x context x width.
struct WeightRef {
  const void* data = nullptr;
  int64_t group = 0, out = 0, context = 0, width = 0;
};

}  // namespace mi_kernels
