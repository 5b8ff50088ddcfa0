// The tile of the small-batch kernels: plain C++, for device code and plans.
#pragma once

#include <cstdint>

namespace mi_kernels::cuda {

inline constexpr int kSmallBatchThreads = 256;
inline constexpr int kSmallBatchOutputs = 4;  // of a block of the forward pass
// Rows of a block: as many as leave registers for two blocks on a multiprocessor.
constexpr int small_batch_rows(int64_t element_bytes) { return element_bytes == 2 ? 2 : 4; }

}  // namespace mi_kernels::cuda
