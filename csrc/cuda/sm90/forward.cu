// The kernels of the dense forward pass on the sm_90a engine and their launch. Compiled and run on the emulator of
// tests/sm90; not yet run on a GPU.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/host/sm90_args.h"
#include "cuda/host/tensor_map.h"

namespace mi_kernels::cuda::sm90 {
namespace {

template <class T, class Traits, bool kExact>
__global__ void __launch_bounds__(kThreads, 1) interaction_forward_sm90(const __grid_constant__ Params<Sm90> params) {
  extern __shared__ unsigned char memory[];
  forward<Sm90, T, Traits, kExact>(params, memory);
}

template <class T, class Traits, bool kExact>
void launch_traits(const ForwardArgs& args, const KernelConfig& kernel_config, cudaStream_t stream) {
  constexpr const char* op = "interaction (sm_90a)";
  const auto kernel = interaction_forward_sm90<T, Traits, kExact>;
  // This comes before the tensor maps because a call of the runtime makes a context current in a thread that has none,
  // which the driver's entry point for tensor maps does not do. cudaSetDevice would, but it would also replace a
  // context that the caller has made current.
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Traits::kSharedBytes),
        op);
  const Params<Sm90> params = forward_params<Sm90, Traits>(
      args, kernel_config.splits,
      [](const TensorView& view, int rows) { return tensor_map(view, T::kBfloat16, rows); });
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(kernel_config.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(Traits::kCluster * kernel_config.splits);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, params), op);
}

template <class T, int kTileN, bool kExact>
void launch_tile(const ForwardArgs& args, const KernelConfig& config, cudaStream_t stream) {
  if (config.splits > 1) {
    if constexpr (kTileN <= 128) return launch_traits<T, KernelTraits<kTileN, 1, true>, kExact>(args, config, stream);
    STD_TORCH_CHECK(false, "mi_kernels: no kernel for sm_90a shares tiles of ", kTileN, " outputs");
  }
  if (config.cluster == 1)
    launch_traits<T, KernelTraits<kTileN, 1>, kExact>(args, config, stream);
  else
    launch_traits<T, KernelTraits<kTileN, 2>, kExact>(args, config, stream);
}

}  // namespace

void launch_forward(const ForwardArgs& args, const KernelConfig& config, bool bfloat16, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  STD_TORCH_CHECK(config.exact == !bfloat16 && (config.cluster == 1 || (config.cluster == 2 && config.splits == 1)),
                  "mi_kernels: the plan names a kernel for sm_90a that does not exist");
  if (bfloat16) {
    switch (config.tile_n) {
      case 64: return launch_tile<Bf16, 64, false>(args, config, on);
      case 128: return launch_tile<Bf16, 128, false>(args, config, on);
      case 256: return launch_tile<Bf16, 256, false>(args, config, on);
    }
  } else {
    switch (config.tile_n) {
      case 64: return launch_tile<F16, 64, true>(args, config, on);
      case 128: return launch_tile<F16, 128, true>(args, config, on);
    }
  }
  STD_TORCH_CHECK(false, "mi_kernels: no kernel for sm_90a has tiles of ", config.tile_n, " outputs");
}

}  // namespace mi_kernels::cuda::sm90
