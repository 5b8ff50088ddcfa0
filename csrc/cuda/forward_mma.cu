// y = z^T W x + U z + V x + c, and a gate of it.
#include "launch.cuh"
#include "mma_kernels.h"
#include "ptx.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads) forward_kernel(const ForwardCall<T> call) {
  forward_block<Ampere, ProductMath<Ampere, T>>(call);
}

}  // namespace

template <class T>
void launch_forward(const Place& place, const ForwardCall<T>& call) {
  launch("interaction", place, forward_kernel<T>, grid_of(call.grid.blocks()), kEngineThreads, engine_shared_bytes<ProductMath<Ampere, T>>(), call);
}
#define MI_INSTANCE(T) template void launch_forward<T>(const Place&, const ForwardCall<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
