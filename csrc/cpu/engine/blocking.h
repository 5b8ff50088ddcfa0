// Block sizes of the engine, which plans have to know too.
#pragma once

#include <cstdint>

namespace mi_kernels {

// Rows of the A operand that are packed at a time, and words along K: a packed block of A has 128 KiB.
inline constexpr int64_t kBlockM = 128;
inline constexpr int64_t kBlockWords = 256;

}  // namespace mi_kernels
