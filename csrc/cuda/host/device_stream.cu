// The properties of GPUs and torch's current streams.
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

// The one function of libtorch_cuda that is needed, looked up in the copy that is already loaded: linking to that
// library would require a torch with CUDA on machines that only compile.
CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(torch_cuda, "mi_kernels: this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* found = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(found, "mi_kernels: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(found);
}

const DeviceProperties& properties_of(int device) {
  static constexpr int kDevices = 64;
  static std::array<DeviceProperties, kDevices> properties;
  static std::array<std::once_flag, kDevices> known;
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "mi_kernels: expected a device below ", kDevices, ", got ", device);
  std::call_once(known[size_t(device)], [device] {
    properties[size_t(device)] = {10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                      attribute(cudaDevAttrComputeCapabilityMinor, device),
                                  attribute(cudaDevAttrMultiProcessorCount, device)};
  });
  return properties[size_t(device)];
}

void* current_stream(int device) {
  static const CurrentStream get = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

}  // namespace

struct DeviceStream::Guard {
  torch::stable::accelerator::DeviceGuard device;
};

DeviceStream::DeviceStream(const Tensor& like) {
  const int device = int(like.get_device_index());
  guard_ = std::make_unique<Guard>(Guard{torch::stable::accelerator::DeviceGuard(device)});
  handle_ = current_stream(device);
  device_ = properties_of(device);
}
DeviceStream::~DeviceStream() = default;
void* stream_handle(const DeviceStream& stream) { return stream.handle(); }

}  // namespace mi_kernels::cuda
