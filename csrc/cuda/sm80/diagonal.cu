#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/diagonal.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kEngineThreads) diagonal_kernel(const DiagonalParams<T> params) {
  diagonal_block<Sm80, MatrixMma<Sm80, T, true>>(params);
}

}  // namespace

template <class T>
void launch_diagonal(const DeviceStream& stream, const DiagonalParams<T>& params) {
  launch("diagonal", stream, diagonal_kernel<T>, grid_of(params.grid.blocks()), kEngineThreads,
         engine_shared_bytes<MatrixMma<Sm80, T, true>>(), params);
}
#define MI_INSTANCE(T) template void launch_diagonal<T>(const DeviceStream&, const DiagonalParams<T>&);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
