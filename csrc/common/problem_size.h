// The sizes of a call.
#pragma once

#include <cstdint>

namespace mi_kernels {

struct ProblemSize {
  int64_t groups, rows, context, width, out;  // G, B, Z, X, O
};

}  // namespace mi_kernels
