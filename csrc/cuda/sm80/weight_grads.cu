// dW, dU and dV.
#include "cuda/common/kernels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T, bool kMade>
__global__ void __launch_bounds__(kEngineThreads) weight_grads_kernel(const WeightGradsCall<T> call) {
  weight_grads_block<Ampere, WeightGradsMath<Ampere, T, kMade>, kMade>(call);
}

template <class T, bool kMade>
void start(const Place& place, const WeightGradsCall<T>& call) {
  launch("interaction_weight_grads", place, weight_grads_kernel<T, kMade>, grid_of(call.grid.blocks()), kEngineThreads,
         engine_shared_bytes<WeightGradsMath<Ampere, T, kMade>>(), call);
}

}  // namespace

template <class T>
void launch_weight_grads(const Place& place, const WeightGradsCall<T>& call) {
  call.made ? start<T, true>(place, call) : start<T, false>(place, call);
}
#define MI_INSTANCE(T) template void launch_weight_grads<T>(const Place&, const WeightGradsCall<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
