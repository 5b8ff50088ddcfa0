// What the host and the kernels of modulation share: calls, and how they are cut into blocks.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/modulate_operands.h"
#include "cuda/host/device_properties.h"

namespace mi_kernels::cuda {

inline constexpr int kModulateThreads = 256;

struct ModulateCall : ModulateOperands {
  int64_t chunks;  // sixteen bytes of y each, along the inner axis
  int64_t blocks;
  bool whole[kOperands];  // of which operands a chunk is read or written at once
};

struct ModulateGradsCall : ModulateGradsOperands {
  bool whole[kOperands];
};

// A unit is what one sum is taken for: a chunk of the inner axis where it is kept, at one place of the kept axes.
// A block has `keeps` units and `threads / keeps` threads for each, which walk the places of one split in turn.
struct ModulateGradsPlan {
  int64_t chunks;         // along the inner axis
  int64_t units, places;  // places that a unit is summed over
  int64_t keeps;
  int64_t splits, step;  // parts of the places, whose sums are added in their order; places of a part
  int64_t blocks;        // of units; there are `splits` times as many
  int64_t partial_bytes;
};

ModulateGradsPlan plan_modulate_grads(const ModulateGradsCall&, DType, const Machine&);

class Place;
void launch_modulate(const Place&, DType, const ModulateCall&);
void launch_modulate_grads(const Place&, DType, const ModulateGradsCall&, const ModulateGradsPlan&, void* partials);

}  // namespace mi_kernels::cuda
