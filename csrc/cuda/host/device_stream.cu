// The GPUs of this process and torch's streams on them.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>

#include "cuda/common/launch.cuh"
#include "cuda/host/device_stream.h"

namespace mi_kernels::cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// The one function of libtorch_cuda that is needed, found in the copy that is already loaded. Linking to that
// library would tie a build to a torch with CUDA, which a machine that only compiles need not have.
CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(torch_cuda, "mi_kernels: this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* found = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(found, "mi_kernels: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(found);
}

const Machine& machine_of(int device) {
  static constexpr int kDevices = 64;
  static std::array<Machine, kDevices> machines;
  static std::array<std::once_flag, kDevices> known;
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "mi_kernels: expected a device below ", kDevices, ", got ", device);
  std::call_once(known[size_t(device)], [device] {
    machines[size_t(device)] = {10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                    attribute(cudaDevAttrComputeCapabilityMinor, device),
                                attribute(cudaDevAttrMultiProcessorCount, device),
                                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  });
  return machines[size_t(device)];
}

void* current_stream(int device) {
  static const CurrentStream get = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

}  // namespace

struct Place::Guard {
  torch::stable::accelerator::DeviceGuard device;
};

Place::Place(const Tensor& like) {
  const int device = int(like.get_device_index());
  guard_ = std::make_unique<Guard>(Guard{torch::stable::accelerator::DeviceGuard(device)});
  stream_ = current_stream(device);
  machine_ = machine_of(device);
}
Place::~Place() = default;
void* stream_of(const Place& place) { return place.stream(); }

}  // namespace mi_kernels::cuda
