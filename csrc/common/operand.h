// Sizes and strided operands, as every backend takes them.
#pragma once

#include <cstdint>

namespace mi_kernels {

struct Problem {
  int64_t groups, rows, context, width, out;  // G, B, Z, X, O
};

// A strided operand of up to three dimensions, groups x rows x columns; data is null where it is absent.
struct Operand {
  const void* data = nullptr;
  int64_t group = 0, row = 0, col = 0;
};

}  // namespace mi_kernels
