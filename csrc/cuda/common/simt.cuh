// Where a thread is. Kernels are functions of this struct, so that the tests can run the same text on the host, on
// another struct with these members.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/host_device.h"

namespace mi_kernels::cuda {

struct Gpu {
  static MI_DEVICE int thread() { return int(threadIdx.x); }
  static MI_DEVICE int64_t block_x() { return blockIdx.x; }
  static MI_DEVICE int64_t block_y() { return blockIdx.y; }
  static MI_DEVICE int64_t block_z() { return blockIdx.z; }
  static MI_DEVICE void sync_block() { __syncthreads(); }
  static MI_DEVICE char* shared() {
    extern __shared__ __align__(128) char mi_shared[];
    return mi_shared;
  }
};

}  // namespace mi_kernels::cuda
