#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/forward.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T, bool kPerContext, Major kWeightMajor>
__global__ void __launch_bounds__(kEngineThreads) forward_kernel(const ForwardParams<T> params) {
  using Mma = ForwardMma<Sm80, T, kPerContext>;
  if constexpr (kPerContext)
    forward_per_context_block<Sm80, Mma, kWeightMajor>(params);
  else
    forward_block<Sm80, Mma, kWeightMajor>(params);
}

template <class T, bool kPerContext>
void start(const DeviceStream& stream, const ForwardParams<T>& params) {
  const auto kernel =
      params.n_major ? forward_kernel<T, kPerContext, Major::mn> : forward_kernel<T, kPerContext, Major::k>;
  launch("interaction", stream, kernel, grid_of(params.grid.blocks()), kEngineThreads,
         engine_shared_bytes<ForwardMma<Sm80, T, kPerContext>>(), params);
}

}  // namespace

template <class T>
void launch_forward(const DeviceStream& stream, const ForwardParams<T>& params) {
  if constexpr (OuterProducts<T>::kWidens) {
    if (params.per_context) return start<T, true>(stream, params);
  }
  start<T, false>(stream, params);
}
#define MI_INSTANCE(T) template void launch_forward<T>(const DeviceStream&, const ForwardParams<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
