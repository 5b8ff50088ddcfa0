#include "common/integers.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/simt.cuh"
#include "cuda/modulate/kernels.cuh"
#include "cuda/modulate/modulate.h"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kModulateThreads) modulate_kernel(const ModulateParams params) {
  modulate_block<Simt, T>(params);
}
template <class T>
__global__ void __launch_bounds__(kModulateThreads)
    grads_kernel(const ModulateGradsParams params, const ModulateGradsPlan plan, AccOf<T>* partials) {
  modulate_grads_block<Simt, T>(params, plan, partials);
}
template <class T>
__global__ void __launch_bounds__(kModulateThreads)
    reduce_splits_kernel(const ModulateGradsParams params, const ModulateGradsPlan plan, const AccOf<T>* partials) {
  modulate_grads_reduce_splits<Simt, T>(params, plan, partials);
}

}  // namespace

void launch_modulate(const DeviceStream& stream, DType dtype, const ModulateParams& params) {
  for_dtype(dtype, [&](auto t) {
    launch("modulate", stream, modulate_kernel<decltype(t)>, grid_of(params.blocks), kModulateThreads, 0, params);
  });
}

void launch_modulate_grads(const DeviceStream& stream, DType dtype, const ModulateGradsParams& params,
                           const ModulateGradsPlan& plan, void* partials) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    dim3 grid = grid_of(plan.blocks);
    grid.y = unsigned(plan.splits);
    launch("modulate_grads", stream, grads_kernel<T>, grid, kModulateThreads, modulate_grads_shared_bytes<T>(), params,
           plan, static_cast<AccOf<T>*>(partials));
    if (!partials) return;
    launch("modulate_grads", stream, reduce_splits_kernel<T>, grid_of(ceil_div(plan.units, kModulateThreads)),
           kModulateThreads, 0, params, plan, static_cast<AccOf<T>*>(partials));
  });
}

}  // namespace mi_kernels::cuda
