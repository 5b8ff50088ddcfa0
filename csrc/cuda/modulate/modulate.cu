// The kernels of modulation; their text is in kernels.cuh.
#include "cuda/common/launch.cuh"
#include "cuda/common/simt.cuh"
#include "cuda/modulate/kernels.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kModulateThreads) modulate_kernel(const ModulateCall call) {
  modulate_block<Gpu, T>(call);
}

}  // namespace

void launch_modulate(const Place& place, DType dtype, const ModulateCall& call) {
  for_dtype(dtype, [&](auto t) {
    launch("modulate", place, modulate_kernel<decltype(t)>, grid_of(call.blocks), kModulateThreads, 0, call);
  });
}

}  // namespace mi_kernels::cuda
