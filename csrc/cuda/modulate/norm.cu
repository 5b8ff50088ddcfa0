#include "common/integers.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/simt.cuh"
#include "cuda/modulate/norm_sums.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T, int kSetThreads>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const NormParams params) {
  norm_block<Simt, T, kSetThreads>(params);
}
template <class T, int kSetThreads>
__global__ void __launch_bounds__(kNormThreads) norm_input_grads_kernel(const NormInputGradsParams params) {
  norm_input_grads_block<Simt, T, kSetThreads>(params);
}
template <class T>
__global__ void __launch_bounds__(kNormThreads) norm_sums_kernel(const NormSumsParams params, double* partials) {
  norm_sums_block<Simt, T>(params, partials);
}
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    norm_reduce_splits_kernel(const NormSumsParams params, const double* partials) {
  norm_sums_reduce_splits<Simt, T>(params, partials);
}

}  // namespace

void launch_norm(const DeviceStream& stream, DType dtype, const NormParams& params) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = norm_by_warp<T>(params) ? norm_kernel<T, kWarpThreads> : norm_kernel<T, kNormThreads>;
    launch("norm_modulate", stream, kernel, grid_of(norm_blocks<T>(params)), kNormThreads, norm_shared_bytes(1),
           params);
  });
}

void launch_norm_input_grads(const DeviceStream& stream, DType dtype, const NormInputGradsParams& params) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel =
        norm_by_warp<T>(params) ? norm_input_grads_kernel<T, kWarpThreads> : norm_input_grads_kernel<T, kNormThreads>;
    launch("norm_modulate_grads", stream, kernel, grid_of(norm_blocks<T>(params)), kNormThreads, norm_shared_bytes(2),
           params);
  });
}

void launch_norm_sums(const DeviceStream& stream, DType dtype, const NormSumsParams& params, double* partials) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    dim3 grid = grid_of(ceil_div(params.units, params.units_per_block));
    grid.y = unsigned(params.splits);
    launch("norm_modulate_grads", stream, norm_sums_kernel<T>, grid, kNormThreads, norm_sums_shared_bytes<T>(), params,
           partials);
    if (params.splits == 1) return;
    launch("norm_modulate_grads", stream, norm_reduce_splits_kernel<T>, grid_of(ceil_div(params.units, kNormThreads)),
           kNormThreads, 0, params, partials);
  });
}

}  // namespace mi_kernels::cuda
