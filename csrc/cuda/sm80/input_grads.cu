#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/input_grads.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T, Major kWeightMajor>
__global__ void __launch_bounds__(kEngineThreads) input_grads_kernel(const InputGradsParams<T> params) {
  input_grads_block<Sm80, InputGradsMma<Sm80, T>, kWeightMajor>(params);
}

}  // namespace

template <class T>
void launch_input_grads(const DeviceStream& stream, const InputGradsParams<T>& params) {
  auto kernel = input_grads_kernel<T, Major::mn>;
  if constexpr (!std::is_same_v<T, double>)  // the plan copies W: repacks_for_input_grads()
    if (params.n_major) kernel = input_grads_kernel<T, Major::k>;
  launch("interaction_input_grads", stream, kernel, grid_of(params.grid.blocks()), kEngineThreads,
         input_grads_shared_bytes<InputGradsMma<Sm80, T>>(), params);
}
#define MI_INSTANCE(T) template void launch_input_grads<T>(const DeviceStream&, const InputGradsParams<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
