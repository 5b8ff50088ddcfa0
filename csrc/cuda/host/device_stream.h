// Where a call runs, and scratch memory of it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>

#include "cuda/host/device_properties.h"

namespace mi_kernels::cuda {

using torch::stable::Tensor;

// The device of a tensor and torch's current stream on it. For the lifetime of this object that device is the
// current one.
class Place {
 public:
  explicit Place(const Tensor& like);
  ~Place();
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;
  void* stream() const { return stream_; }
  const Machine& machine() const { return machine_; }

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
  void* stream_;
  Machine machine_;
};

// Scratch of a call, of torch's allocator, which gives it to the next call on the same stream at the earliest.
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
