// The diagonal form: gate and shift in one tile.
#include "cuda/common/kernels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads) gate_kernel(const GateCall<T> call) {
  gate_block<Ampere, ProductMath<Ampere, T, true>>(call);
}

}  // namespace

template <class T>
void launch_gate(const Place& place, const GateCall<T>& call) {
  launch("diagonal", place, gate_kernel<T>, grid_of(call.grid.blocks()), kEngineThreads,
         engine_shared_bytes<ProductMath<Ampere, T, true>>(), call);
}
#define MI_INSTANCE(T) template void launch_gate<T>(const Place&, const GateCall<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
