// Host side of a launch: device guard, torch's current stream, scratch from torch's allocator, errors that are seen.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "machine.h"

namespace mi_kernels::cuda {

using torch::stable::Tensor;

// The runtime is linked statically and its last error is this library's alone, so nobody else's failure is
// reported here and none of ours is taken from torch.
inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": CUDA: ", cudaGetErrorString(status));
}

const Machine& machine_of(int device);
// torch's current stream on a device.
cudaStream_t current_stream(int device);

// Where a call runs: for the lifetime of this object its device is the current one.
class Place {
 public:
  explicit Place(const Tensor& like)
      : device_(int(like.get_device_index())), guard_(device_), stream_(current_stream(device_)) {}
  cudaStream_t stream() const { return stream_; }
  const Machine& machine() const { return machine_of(device_); }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Scratch of a call; torch's allocator gives it to the next call on the same stream at the earliest.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes)
      : bytes_(torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte)) {}
  template <class T>
  T* at(int64_t byte = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(bytes_.mutable_data_ptr()) + byte);
  }

 private:
  Tensor bytes_;
};

// Launches kernel<<<grid, threads, shared>>>(arguments...). The arguments are converted to the parameters' types.
template <class... Parameters, class... Arguments>
void launch(const char* op, const Place& place, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared,
            Arguments&&... arguments) {
  // Beyond 48 KiB a kernel has to opt in. It is a property of the function on a device, set again at each launch
  // because it costs a fraction of one and no flag per device has to be kept.
  if (shared > (48 << 10))
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared)),
          op);
  kernel<<<grid, threads, shared, place.stream()>>>(Parameters(arguments)...);
  check(cudaGetLastError(), op);
}

}  // namespace mi_kernels::cuda
