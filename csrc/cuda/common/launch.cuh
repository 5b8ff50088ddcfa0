// Kernel launches on torch's current stream, with error checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace mi_kernels::cuda {

// Only declared: host/device_stream.h takes nvcc longer to compile than most kernels do.
class DeviceStream;
void* stream_handle(const DeviceStream&);

// The runtime is linked statically and its last error is this library's own: failures of other libraries are not
// reported here, nor are ours in torch.
inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": CUDA: ", cudaGetErrorString(status));
}

// A grid along x, the dimension that may have up to 2^31 - 1 blocks.
inline dim3 grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks > 0 && blocks < (int64_t(1) << 31),
                  "mi_kernels: expected a grid of 1 to 2^31 - 1 blocks, got ", blocks);
  return dim3(unsigned(blocks));
}

#if defined(__CUDACC__)
// Launches kernel<<<grid, threads, shared>>>(arguments...). The arguments are converted to the parameters' types.
template <class... Parameters, class... Arguments>
void launch(const char* op, const DeviceStream& stream, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared, Arguments&&... arguments) {
  // More than 48 KiB are an opt-in, an attribute of the function on each device. Setting it at every launch costs a
  // fraction of one and needs no flag per device.
  if (shared > (48 << 10))
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared)),
          op);
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream_handle(stream))>>>(Parameters(arguments)...);
  check(cudaGetLastError(), op);
}
#endif

}  // namespace mi_kernels::cuda
