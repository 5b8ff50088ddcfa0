#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/simt.cuh"
#include "cuda/small_batch/forward.cuh"
#include "cuda/small_batch/forward_n_major.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kSmallBatchThreads, 2) small_batch_forward_kernel(const ForwardParams<T> params) {
  small_batch_forward_block<Simt, T>(params);
}

template <class T>
__global__ void __launch_bounds__(kSmallBatchThreads, 2)
    small_batch_forward_n_major_kernel(const ForwardParams<T> params) {
  small_batch_forward_n_major_block<Simt, T>(params);
}

}  // namespace

template <class T>
void launch_small_batch_forward(const DeviceStream& stream, const ForwardParams<T>& params) {
  const auto kernel = params.n_major ? small_batch_forward_n_major_kernel<T> : small_batch_forward_kernel<T>;
  const int shared =
      params.n_major ? small_batch_forward_n_major_shared_bytes<T>() : small_batch_forward_shared_bytes<T>();
  launch("interaction", stream, kernel, grid_of(params.grid.blocks()), kSmallBatchThreads, size_t(shared), params);
}
#define MI_INSTANCE(T) template void launch_small_batch_forward<T>(const DeviceStream&, const ForwardParams<T>&);
MI_FOR_EACH_STORED_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
