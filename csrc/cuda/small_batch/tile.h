// The tile of the small-batch kernels: plain C++, for device code and plans.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace mi_kernels::cuda {

inline constexpr int kSmallBatchThreads = 256;
inline constexpr int kSmallBatchOutputs = 4;  // of a block of the forward pass
// Rows of a block: as many as leave registers for two blocks on a multiprocessor.
constexpr int small_batch_rows(int64_t element_bytes) { return element_bytes == 2 ? 2 : 4; }

// If W is contiguous along the outputs: chunks of it, or elements, that a thread has in flight, and how many threads
// lie along `chunks` of outputs. Together they read 128 bytes at a time.
inline constexpr int kSmallBatchInFlight = 4;
MI_HOST_DEVICE int small_batch_group_threads(int64_t chunks, bool vectorized) {
  int threads = 1;
  while (threads < (vectorized ? 8 : 32) && threads < chunks) threads *= 2;
  return threads;
}

}  // namespace mi_kernels::cuda
