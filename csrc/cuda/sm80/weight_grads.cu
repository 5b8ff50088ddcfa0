#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/weight_grads.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T, bool kGenerated>
__global__ void __launch_bounds__(kEngineThreads) weight_grads_kernel(const WeightGradsParams<T> params) {
  weight_grads_block<Sm80, WeightGradsMma<Sm80, T, kGenerated>, kGenerated>(params);
}

template <class T, bool kGenerated>
void start(const DeviceStream& stream, const WeightGradsParams<T>& params) {
  launch("interaction_weight_grads", stream, weight_grads_kernel<T, kGenerated>, grid_of(params.grid.blocks()),
         kEngineThreads, engine_shared_bytes<WeightGradsMma<Sm80, T, kGenerated>>(), params);
}

}  // namespace

template <class T>
void launch_weight_grads(const DeviceStream& stream, const WeightGradsParams<T>& params) {
  params.generated ? start<T, true>(stream, params) : start<T, false>(stream, params);
}
#define MI_INSTANCE(T) template void launch_weight_grads<T>(const DeviceStream&, const WeightGradsParams<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
