// dx and dz from one T = g W.
#include "cuda/common/kernels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads) input_grads_kernel(const InputGradsCall<T> call) {
  input_grads_block<Ampere, InputGradsMath<Ampere, T>>(call);
}

}  // namespace

template <class T>
void launch_input_grads(const Place& place, const InputGradsCall<T>& call) {
  launch("interaction_input_grads", place, input_grads_kernel<T>, grid_of(call.grid.blocks()), kEngineThreads,
         input_grads_shared_bytes<InputGradsMath<Ampere, T>>(), call);
}
#define MI_INSTANCE(T) template void launch_input_grads<T>(const Place&, const InputGradsCall<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
