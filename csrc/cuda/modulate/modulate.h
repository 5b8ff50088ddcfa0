// Modulation, y = F(scale) * x + shift, mixtures, and their gradients: parameters of the kernels and their launches.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtypes.h"
#include "common/modulate_operands.h"
#include "cuda/host/device_properties.h"

namespace torch::stable {
class Tensor;
}

namespace mi_kernels::cuda {

inline constexpr int kModulateThreads = 256;

struct ModulateParams : ModulateOperands {
  int64_t chunks;  // of 16 bytes, along the inner axis of y
  int64_t blocks;
  bool vectorized[kOperands];  // whether an operand is read or written a chunk at a time
};

struct ModulateGradsParams : ModulateGradsOperands {
  bool vectorized[kOperands];
};

// A unit is what a thread group reduces to: one position on the kept axes and, if the inner axis is kept, a chunk of
// it. Its terms are the positions on the reduced axes or, if the inner axis is reduced, the chunks on them.
struct ModulateGradsPlan {
  int64_t chunks;  // along the inner axis
  int64_t units, terms;
  int64_t units_per_block;     // which have equal shares of its threads
  int64_t splits, split_size;  // of the terms; the splits' sums are added in order
  int64_t blocks;              // of units; the grid has `splits` times as many
  int64_t partial_bytes;
};

ModulateGradsPlan plan_modulate_grads(const ModulateGradsParams&, DType, const DeviceProperties&);

// Sums grad over the dimensions in which `size` is 1.
void sum_to_size(const torch::stable::Tensor& grad, const std::vector<int64_t>& size, torch::stable::Tensor& result,
                 DType);

class DeviceStream;
void launch_modulate(const DeviceStream&, DType, const ModulateParams&);
void launch_modulate_grads(const DeviceStream&, DType, const ModulateGradsParams&, const ModulateGradsPlan&,
                           void* partials);

}  // namespace mi_kernels::cuda
