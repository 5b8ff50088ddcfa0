// Thread and block indices, barrier and shared memory of a GPU. Kernels are templates over such a struct, `Arch`, so
// that the tests can run the same source on a host emulator; Sm80 and Sm90 in ptx.cuh add the instructions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/host_device.h"

namespace mi_kernels::cuda {

struct Simt {
  static MI_DEVICE int thread() { return int(threadIdx.x); }
  static MI_DEVICE int64_t block_x() { return blockIdx.x; }
  static MI_DEVICE int64_t block_y() { return blockIdx.y; }
  static MI_DEVICE void sync_block() { __syncthreads(); }
  // The value of the thread of the warp whose lane differs in these bits; all threads of a warp take part.
  static MI_DEVICE double shuffle_xor(double value, int bits) { return __shfl_xor_sync(0xffffffffu, value, bits); }
  static MI_DEVICE char* shared() {
    extern __shared__ __align__(128) char mi_shared[];
    return mi_shared;
  }
};

}  // namespace mi_kernels::cuda
