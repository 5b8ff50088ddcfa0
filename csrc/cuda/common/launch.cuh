// Launches on torch's stream, whose errors are seen.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace mi_kernels::cuda {

class Place;  // host/device_stream.h takes nvcc longer than most kernels
void* stream_of(const Place&);

// The runtime is linked statically and its last error is this library's alone, so nobody else's failure is
// reported here and none of ours is taken from torch.
inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": CUDA: ", cudaGetErrorString(status));
}

// A grid of one dimension, which is the one that may be long.
inline dim3 grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks > 0 && blocks < (int64_t(1) << 31),
                  "mi_kernels: expected a grid of 1 to 2^31 - 1 blocks, got ", blocks);
  return dim3(unsigned(blocks));
}

#if defined(__CUDACC__)
// Launches kernel<<<grid, threads, shared>>>(arguments...). The arguments are converted to the parameters' types.
template <class... Parameters, class... Arguments>
void launch(const char* op, const Place& place, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            Arguments&&... arguments) {
  // Beyond 48 KiB a kernel has to opt in. It is a property of the function on a device, set again at each launch
  // because it costs a fraction of one and no flag per device has to be kept.
  if (shared > (48 << 10))
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared)),
          op);
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream_of(place))>>>(Parameters(arguments)...);
  check(cudaGetLastError(), op);
}
#endif

}  // namespace mi_kernels::cuda
