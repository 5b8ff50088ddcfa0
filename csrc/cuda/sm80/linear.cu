// Input gradients through U or V alone.
#include "cuda/common/kernels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads) linear_kernel(const LinearCall<T> call) {
  linear_block<Ampere, ProductMath<Ampere, T>>(call);
}

}  // namespace

template <class T>
void launch_linear(const Place& place, const LinearCall<T>& call) {
  launch("interaction_input_grads", place, linear_kernel<T>, grid_of(call.grid.blocks()), kEngineThreads,
         engine_shared_bytes<ProductMath<Ampere, T>>(), call);
}
#define MI_INSTANCE(T) template void launch_linear<T>(const Place&, const LinearCall<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
