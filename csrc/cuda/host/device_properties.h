// What the plans have to know of a GPU.
#pragma once

#include <cstdint>

namespace mi_kernels::cuda {

struct Machine {
  int arch;              // 10 * major + minor: 80, 89, 90, 100, 120
  int processors;        // streaming multiprocessors
  int64_t shared_bytes;  // shared memory that one block may ask for
};

}  // namespace mi_kernels::cuda
