// The kernels of the gradients of modulation; their text is in kernels.cuh.
#include "common/integers.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/simt.cuh"
#include "cuda/modulate/kernels.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kModulateThreads)
    grads_kernel(const ModulateGradsCall call, const ModulateGradsPlan plan, AccOf<T>* partials) {
  modulate_grads_block<Gpu, T>(call, plan, partials);
}
template <class T>
__global__ void __launch_bounds__(kModulateThreads)
    finish_kernel(const ModulateGradsCall call, const ModulateGradsPlan plan, const AccOf<T>* partials) {
  modulate_grads_finish<Gpu, T>(call, plan, partials);
}

}  // namespace

void launch_modulate_grads(const Place& place, DType dtype, const ModulateGradsCall& call,
                           const ModulateGradsPlan& plan, void* partials) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    dim3 grid = grid_of(plan.blocks);
    grid.y = unsigned(plan.splits);
    launch("modulate_grads", place, grads_kernel<T>, grid, kModulateThreads, modulate_grads_shared_bytes<T>(), call,
           plan, static_cast<AccOf<T>*>(partials));
    if (!partials) return;
    const int64_t blocks = ceil_div(plan.units, kModulateThreads);
    launch("modulate_grads", place, finish_kernel<T>, grid_of(blocks), kModulateThreads, 0, call, plan,
           static_cast<AccOf<T>*>(partials));
  });
}

}  // namespace mi_kernels::cuda
