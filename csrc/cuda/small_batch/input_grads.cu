#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/simt.cuh"
#include "cuda/small_batch/input_grads.cuh"
#include "cuda/small_batch/input_grads_n_major.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kSmallBatchThreads, 2)
    small_batch_input_grads_kernel(const InputGradsParams<T> params) {
  small_batch_input_grads_block<Simt, T>(params);
}

template <class T>
__global__ void __launch_bounds__(kSmallBatchThreads, 2)
    small_batch_input_grads_n_major_kernel(const InputGradsParams<T> params) {
  small_batch_input_grads_n_major_block<Simt, T>(params);
}

}  // namespace

template <class T>
void launch_small_batch_input_grads(const DeviceStream& stream, const InputGradsParams<T>& params) {
  const auto kernel = params.n_major ? small_batch_input_grads_n_major_kernel<T> : small_batch_input_grads_kernel<T>;
  const int shared =
      params.n_major ? small_batch_input_grads_n_major_shared_bytes<T>() : small_batch_input_grads_shared_bytes<T>();
  launch("interaction_input_grads", stream, kernel, grid_of(params.grid.blocks()), kSmallBatchThreads, size_t(shared),
         params);
}
#define MI_INSTANCE(T) template void launch_small_batch_input_grads<T>(const DeviceStream&, const InputGradsParams<T>&);
MI_FOR_EACH_STORED_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
