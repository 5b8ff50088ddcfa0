// y = z^T W x + U z + V x + c, and a gate of it.
#include "cuda/common/kernels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T, bool kByItems>
__global__ void __launch_bounds__(kEngineThreads) forward_kernel(const ForwardCall<T> call) {
  using Math = ForwardMath<Ampere, T, kByItems>;
  if constexpr (kByItems)
    forward_items_block<Ampere, Math>(call);
  else
    forward_block<Ampere, Math>(call);
}

template <class T, bool kByItems>
void start(const Place& place, const ForwardCall<T>& call) {
  launch("interaction", place, forward_kernel<T, kByItems>, grid_of(call.grid.blocks()), kEngineThreads,
         engine_shared_bytes<ForwardMath<Ampere, T, kByItems>>(), call);
}

}  // namespace

template <class T>
void launch_forward(const Place& place, const ForwardCall<T>& call) {
  if constexpr (Products<T>::kWidens) {
    if (call.by_items) return start<T, true>(place, call);
  }
  start<T, false>(place, call);
}
#define MI_INSTANCE(T) template void launch_forward<T>(const Place&, const ForwardCall<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
