// y = z^T W x + U z + V x + c, and a gate of it, for a few rows.
#include "cuda/common/kernels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/simt.cuh"
#include "cuda/small_batch/forward.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads, 2) stream_kernel(const ForwardCall<T> call) {
  stream_block<Gpu, T>(call);
}

}  // namespace

template <class T>
void launch_stream(const Place& place, const ForwardCall<T>& call) {
  launch("interaction", place, stream_kernel<T>, grid_of(call.grid.blocks()), kEngineThreads, stream_shared_bytes<T>(),
         call);
}
#define MI_INSTANCE(T) template void launch_stream<T>(const Place&, const ForwardCall<T>&);
MI_FOR_EACH_STORED_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
