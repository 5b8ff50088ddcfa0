// dW, dU and dV.
#include "launch.cuh"
#include "mma_kernels.h"
#include "ptx.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads) weight_grads_kernel(const WeightGradsCall<T> call) {
  weight_grads_block<Ampere, ProductMath<Ampere, T>>(call);
}

}  // namespace

template <class T>
void launch_weight_grads(const Place& place, const WeightGradsCall<T>& call) {
  launch("interaction_weight_grads", place, weight_grads_kernel<T>, grid_of(call.grid.blocks()), kEngineThreads, engine_shared_bytes<ProductMath<Ampere, T>>(), call);
}
#define MI_INSTANCE(T) template void launch_weight_grads<T>(const Place&, const WeightGradsCall<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
