// dx and dz of a few rows.
#include "cuda/common/kernels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/simt.cuh"
#include "cuda/small_batch/input_grads.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads, 2) stream_grads_kernel(const InputGradsCall<T> call) {
  stream_grads_block<Gpu, T>(call);
}

}  // namespace

template <class T>
void launch_stream_grads(const Place& place, const InputGradsCall<T>& call) {
  launch("interaction_input_grads", place, stream_grads_kernel<T>, grid_of(call.grid.blocks()), kEngineThreads,
         stream_grads_shared_bytes<T>(), call);
}
#define MI_INSTANCE(T) template void launch_stream_grads<T>(const Place&, const InputGradsCall<T>&);
MI_FOR_EACH_STORED_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
