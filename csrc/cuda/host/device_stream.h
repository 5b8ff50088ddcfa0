// The device and stream of a call, and its scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>

#include "cuda/host/device_properties.h"

namespace mi_kernels::cuda {

using torch::stable::Tensor;

// The device of a tensor, which is the current one for the lifetime of this object, and torch's current stream on it.
class DeviceStream {
 public:
  explicit DeviceStream(const Tensor& like);
  ~DeviceStream();
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;
  void* handle() const { return handle_; }  // a cudaStream_t
  const DeviceProperties& device() const { return device_; }

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
  void* handle_;
  DeviceProperties device_;
};

// Scratch memory from torch's caching allocator, which reuses it only for later work on the same stream.
class __attribute__((visibility("hidden"))) Scratch {
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

}  // namespace mi_kernels::cuda
