// What plans depend on of a GPU.
#pragma once

namespace mi_kernels::cuda {

struct DeviceProperties {
  int arch;      // 10 * major + minor: 80, 89, 90, 100, 120
  int sm_count;  // streaming multiprocessors
};

}  // namespace mi_kernels::cuda
